"""What one does before and after training, each run as ``python -m tools.NAME``."""

"""A search for good options: ``python -m tools.tune``."""

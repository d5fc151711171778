"""timm's hub form of a trained model, and its upload: ``python -m tools.export --format hub``."""

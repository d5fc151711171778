"""Speed beside timm's and a plain loop's: ``python -m tools.bench``."""

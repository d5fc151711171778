"""Look at a data set, split it, pack it: ``python -m tools.data explore|split|pack``."""

"""A trained model as an HTTP service: ``python -m tools.serve``, docs/serve.md."""

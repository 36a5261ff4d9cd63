import nanochat  # noqa: F401  first: what is set there comes before PyTorch is loaded

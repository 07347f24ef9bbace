"""Speed of a model or a bundle, relative to the hardware's limits."""

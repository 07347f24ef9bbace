"""Speed of a model or a bundle, beside what the hardware allows."""

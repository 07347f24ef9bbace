"""Image autoencoders: images as arrays of numbers, and back."""

"""Encoders of images that are read."""

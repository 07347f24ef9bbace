"""Encoders of pictures that are read."""

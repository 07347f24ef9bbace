"""Adaptors: features to the backbone's hidden size."""

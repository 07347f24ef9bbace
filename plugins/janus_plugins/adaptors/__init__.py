"""Adaptors: features to the backbone's width."""

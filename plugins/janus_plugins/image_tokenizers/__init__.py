"""Tokenizers of images that are drawn."""

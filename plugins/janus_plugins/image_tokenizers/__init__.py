"""Tokenizers of pictures that are drawn."""

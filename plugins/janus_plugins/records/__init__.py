"""Readers of training records: files of JSON, conversations, image-text pairs."""

"""Streams of training samples."""

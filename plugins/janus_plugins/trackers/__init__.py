"""Keepers of what training measures."""

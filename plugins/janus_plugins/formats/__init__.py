"""Checkpoint formats of other projects."""

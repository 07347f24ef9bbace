"""Checkpoints: reading anybody's weights lazily, writing our own so that nothing is ever half-written.

Start with ``weights`` (files as a mapping), then ``native`` (our layout) and ``convert`` (all others).
"""

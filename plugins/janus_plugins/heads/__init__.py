"""Heads: hidden states to code logits."""

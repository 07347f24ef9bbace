"""Guess what an unknown word was meant to be: its new name, or the word that was mistyped."""

from collections.abc import Iterable
from difflib import get_close_matches

from janus_modular.renamed import renamed


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"Did you mean 'width'?"`` or what a renamed word is called now; "" where no word is close."""
    words = list(known)
    if successor := renamed(word, words):
        return f"It is called {successor} now."
    close = get_close_matches(word, words, n=1)
    return f"Did you mean '{close[0]}'?" if close else ""

"""Suggests corrections of unknown words: the new name of a renamed word, or a similar known word."""

from collections.abc import Iterable
from difflib import get_close_matches

from janus_modular.renamed import renamed


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"Did you mean 'heads'?"`` or a renamed word's new name; "" if no known word is similar."""
    words = list(known)
    if successor := renamed(word, words):
        return f"It is called {successor} now."
    close = get_close_matches(word, words, n=1)
    return f"Did you mean '{close[0]}'?" if close else ""

"""Suggests corrections of unknown words: the new name of a renamed word, or a similar known word."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from janus_modular.renamed import renamed


def new_name(word: str, known: Collection[str]) -> str:
    """Return ``"It is called 'heads' now."`` for a renamed word; "" for all others."""
    successor = renamed(word, known)
    return f"It is called {successor} now." if successor else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"Did you mean 'heads'?"`` or a renamed word's new name; "" if no known word is similar."""
    words = list(known)
    if sentence := new_name(word, words):
        return sentence
    close = get_close_matches(word, words, n=1)
    return f"Did you mean '{close[0]}'?" if close else ""

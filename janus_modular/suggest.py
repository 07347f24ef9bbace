"""Suggests corrections of unknown words: the new name of a renamed word, or a similar known word."""

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches

from janus_modular.renamed import renamed


def new_name(word: str, known: Collection[str]) -> str:
    """Return ``"It is called 'heads' now."`` for a renamed word; "" for all others."""
    successor = renamed(word, known)
    return f"It is called {successor} now." if successor else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"Did you mean 'heads'?"`` or a renamed word's new name; "" if no known word is similar.

    Words of which ``word`` is a part are suggested too: ``encoder`` for ``understanding-encoder``.
    """
    words = list(known)
    if sentence := new_name(word, words):
        return sentence
    containing = [name for name in dict.fromkeys(words) if word in re.split(r"\W|_", name)]
    close = get_close_matches(word, words, n=1) or containing[:3]
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else ""

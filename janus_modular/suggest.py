"""Guess what a mistyped word was meant to be."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"Did you mean 'width'?"``, or nothing where no known word is close."""
    close = get_close_matches(word, list(known), n=1)
    return f"Did you mean '{close[0]}'?" if close else ""

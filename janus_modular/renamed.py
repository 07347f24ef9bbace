"""Names of the version before, and their successors: whoever uses an old name is told the new one."""

from __future__ import annotations

from collections.abc import Container, Mapping

RENAMED: Mapping[str, tuple[str, ...]] = {}
"""Old name -> its successors: names of the public API, members of interfaces, config keys, graphs, options.

An old name with several meanings has a successor for each.
"""


def renamed(word: str, known: Container[str]) -> str | None:
    """Return what an old name is called now, if its successor is among the ``known``; otherwise None."""
    return next((name for name in RENAMED.get(word, ()) if name in known), None)

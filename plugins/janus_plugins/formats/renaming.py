"""Names of one checkpoint format as names of another, by a table that is read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable


class Renaming:
    """Rows of (theirs, ours); the first that fits is taken.

    ``{n}`` stands for an index. A row that ends with a dot renames all that begins like it, another one
    name alone.
    """

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        rows = list(rows)
        self._to_native = [(_pattern(theirs), _template(ours)) for theirs, ours in rows]
        self._from_native = [(_pattern(ours), _template(theirs)) for theirs, ours in rows]

    def to_native(self, name: str) -> str | None:
        """Return our name for theirs, None where no row fits."""
        return _renamed(name, self._to_native)

    def from_native(self, name: str) -> str | None:
        """Return their name for ours, None where no row fits."""
        return _renamed(name, self._from_native)


def _pattern(row: str) -> re.Pattern[str]:
    tail = "(.+)" if row.endswith(".") else ""
    return re.compile(re.escape(row).replace(r"\{n\}", r"(\d+)") + tail)


def _template(row: str) -> str:
    return row.replace("{n}", "{}") + ("{}" if row.endswith(".") else "")


def _renamed(name: str, table: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in table:
        if match := pattern.fullmatch(name):
            return template.format(*match.groups())
    return None

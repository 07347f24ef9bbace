"""Renames weights between two checkpoint formats, by a table for both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable


class Renaming:
    """A table of rows (foreign, native); the first row that matches a name renames it.

    ``{n}`` stands for an index. A row that ends with a dot renames a prefix, any other row a single name.
    """

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        rows = list(rows)
        self._to_native = [(_pattern(foreign), _template(native)) for foreign, native in rows]
        self._from_native = [(_pattern(native), _template(foreign)) for foreign, native in rows]

    def to_native(self, name: str) -> str | None:
        """Return the native name of a foreign one, None if no row matches."""
        return _renamed(name, self._to_native)

    def from_native(self, name: str) -> str | None:
        """Return the foreign name of a native one, None if no row matches."""
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

"""Strict reading of JSON objects: a key is used, known to have no effect, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from reprlib import Repr
from typing import Any

from janus_modular import DataError

HARMLESS = (
    *("id", "_id", "idx", "index", "uid", "uuid", "sample_id", "question_id", "conversation_id"),
    *(
        "source",
        "data_source",
        "dataset",
        "subset",
        "split",
        "metadata",
        "meta",
        "tags",
        "license",
        "language",
    ),
    *("width", "height", "input_image_resolution", "output_image_resolution", "created_at", "timestamp"),
)
"""Keys about a record's origin, which are not learned from. docs/how-to/data-formats.md lists them."""

VIDEO = "video cannot be read by this version"
AUDIO = "audio cannot be read by this version"
TOOLS = "calls of tools are not supported"
PREFERENCE = "preference pairs are not supported: write the answer to learn as `messages`"
REASONING = "the field for an assistant's reasoning is `reasoning_content`: rename it"
INSTRUCTION = "write instruction and answer as `messages` of a user and an assistant"
REASONS = {
    **dict.fromkeys(("video", "videos"), VIDEO),
    **dict.fromkeys(("audio", "audios"), AUDIO),
    **dict.fromkeys(("tools", "tool_calls", "tool_call_id", "function_call", "functions"), TOOLS),
    **dict.fromkeys(("thinking", "thought", "thoughts", "thinking_content"), REASONING),
    **dict.fromkeys(("chosen", "rejected", "preference"), PREFERENCE),
    **dict.fromkeys(("instruction", "prompt", "question", "query"), INSTRUCTION),
    **dict.fromkeys(("output", "response", "completion", "answer"), INSTRUCTION),
}
"""Keys of other tools that cannot be used, with the reason."""

EMPTY: tuple[Any, ...] = ("", [], {})

BRIEF = Repr()
BRIEF.maxstring, BRIEF.maxlevel = 80, 3
"""Quotes a value in an error, shortened."""


class Fields:
    """The keys of a JSON object; `close` raises an error for keys that were not read.

    A key whose value is null counts as absent: exports of tables fill what a row lacks with null.
    """

    def __init__(self, value: Any, where: str = "", *, ignore: Iterable[str] = ()) -> None:
        """Take an object; ``where`` is its path in the record, keys in ``ignore`` count as absent.

        Raises:
            DataError: the value is not an object.
        """
        self.where = f"{where}: " if where else ""
        if not isinstance(value, Mapping):
            raise DataError(f"{self.where}found {BRIEF.repr(value)}; expected a JSON object.")
        ignored = set(ignore)
        self.values = {k: item for k, item in value.items() if item is not None and k not in ignored}
        self.unread = dict.fromkeys(self.values)
        self.names: list[str] = []  # of keys that were read, or would have been

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, *names: str) -> Any:
        """Return the value under one of several spellings of a key; None where there is none.

        Raises:
            DataError: the object has several of the spellings.
        """
        self.names += names
        present = [name for name in names if name in self.values]
        if len(present) > 1:
            raise DataError(f"{self.where}has {' and '.join(present)}; expected only one of them.")
        if not present:
            return None
        self.unread.pop(present[0], None)
        return self.values[present[0]]

    def text(self, *names: str) -> str | None:
        """Return a text that is not blank; None where there is none.

        Raises:
            DataError: the value is of another type, blank, or not Unicode.
        """
        value = self.take(*names)
        return None if value is None else text_of(value, f"{self.where}{self._present(names)}")

    def close(self) -> None:
        """Check that all keys were read.

        Raises:
            DataError: keys were not read; names them, and similar keys.
        """
        unread = [k for k in self.unread if k not in HARMLESS and self.values[k] not in EMPTY]
        if not unread:
            return
        known = ", ".join(dict.fromkeys(self.names))
        raise DataError(
            f"{self.where}found the unknown keys {', '.join(map(repr, unread))}; expected {known}."
            f"{self.hint()} Add keys without effect to the source's `ignore`."
        )

    def hint(self, names: Iterable[str] = ()) -> str:
        """Return why an unread key cannot be used, or which of ``names`` is similar; "" without either."""
        unread = [key for key in self.unread if key not in HARMLESS]
        if reason := next((f" '{key}': {REASONS[key]}." for key in unread if key in REASONS), ""):
            return reason
        names = [name for name in [*names, *self.names] if name not in self.values]
        close = [match for key in unread for match in get_close_matches(key, names, n=1)]
        return f" Did you mean '{close[0]}'?" if close else ""

    def _present(self, names: Iterable[str]) -> str:
        return next(name for name in names if name in self.values)


def text_of(value: Any, where: str, *, blank: bool = False) -> str:
    """Return ``value`` if it is text.

    Raises:
        DataError: the value is of another type, blank and must not be, or has half a surrogate pair.
    """
    if not isinstance(value, str) or not (blank or value.strip()):
        raise DataError(f"{where}: found {BRIEF.repr(value)}; expected text.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            surrogate = value[error.start]
            raise DataError(
                f"{where}: has {surrogate!r}, half of a surrogate pair; expected Unicode. Was the text cut in"
                " the middle of a character, or not read as UTF-8?"
            ) from error
    return value


def list_of(value: Any, where: str, convert: Callable[[Any, str], Any]) -> list[Any]:
    """Return ``convert(item, path)`` of the items of a list that must not be empty.

    Raises:
        DataError: the value is of another type, or empty.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: found {BRIEF.repr(value)}; expected a list that is not empty.")
    return [convert(item, f"{where}[{i}]") for i, item in enumerate(value)]

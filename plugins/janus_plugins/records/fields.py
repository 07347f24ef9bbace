"""Reading JSON objects strictly: every key is used, known to have no effect, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from reprlib import Repr
from typing import Any

from janus_modular import DataError

HARMLESS = (
    *("id", "_id", "idx", "index", "uid", "uuid", "sample_id", "question_id", "conversation_id"),
    *("source", "dataset", "subset", "split", "metadata", "meta", "tags", "license", "language"),
    *("width", "height", "created_at", "timestamp"),
)
"""Keys that say where a record comes from, and nothing to learn. docs/how-to/data-formats.md lists them."""

VIDEO = "video cannot be read by this version"
AUDIO = "audio cannot be read by this version"
TOOLS = "calls of tools are not supported"
PREFERENCE = "preference pairs are not supported: write the answer to learn as `messages`"
THINKING = "the field for an assistant's reasoning is `reasoning_content`: rename it"
INSTRUCTION = "write instruction and answer as `messages` of a user and an assistant"
REASONS = {
    **dict.fromkeys(("video", "videos"), VIDEO),
    **dict.fromkeys(("audio", "audios"), AUDIO),
    **dict.fromkeys(("tools", "tool_calls", "tool_call_id", "function_call", "functions"), TOOLS),
    **dict.fromkeys(("thinking", "thought", "thoughts", "thinking_content"), THINKING),
    **dict.fromkeys(("chosen", "rejected", "preference"), PREFERENCE),
    **dict.fromkeys(("instruction", "prompt", "question", "query"), INSTRUCTION),
    **dict.fromkeys(("output", "response", "completion", "answer"), INSTRUCTION),
}
"""Keys that people's files have and that cannot be used, with the reason."""

EMPTY: tuple[Any, ...] = ("", [], {})

BRIEF = Repr()
BRIEF.maxstring, BRIEF.maxlevel = 80, 3
"""How a value is quoted in an error, however large or deep it is."""


class Fields:
    """The keys of a JSON object, which must all have been read by the time of `close`.

    A key whose value is null counts as absent: exports of tables fill what a row lacks with null.
    """

    def __init__(self, value: Any, where: str = "", *, ignore: Iterable[str] = ()) -> None:
        """Take an object; ``where`` is its place in the record, keys in ``ignore`` count as absent.

        Raises:
            DataError: it is not an object.
        """
        self.where = f"{where}: " if where else ""
        if not isinstance(value, Mapping):
            raise DataError(f"{self.where}found {BRIEF.repr(value)}; expected a JSON object.")
        ignored = set(ignore)
        self.values = {k: item for k, item in value.items() if item is not None and k not in ignored}
        self.unread = dict.fromkeys(self.values)
        self.names: list[str] = []  # that were looked for

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, *names: str) -> Any:
        """Return the value under one of several spellings of a key; None where there is none.

        Raises:
            DataError: several of the spellings are there.
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
            DataError: it is of another type, blank, or not Unicode.
        """
        value = self.take(*names)
        return None if value is None else text_of(value, f"{self.where}{self._present(names)}")

    def close(self) -> None:
        """Check that nothing is left of which the sample would not know.

        Raises:
            DataError: names the keys that were not read, and what could have been meant.
        """
        unread = [k for k in self.unread if k not in HARMLESS and self.values[k] not in EMPTY]
        if not unread:
            return
        known = ", ".join(dict.fromkeys(self.names))
        raise DataError(
            f"{self.where}nothing reads {', '.join(map(repr, unread))}; expected {known}.{self.hint()} Keys"
            " that are to have no effect go into the source's `ignore`."
        )

    def hint(self, names: Iterable[str] = ()) -> str:
        """Return why an unread key cannot be used, or which of ``names`` it could be; or nothing."""
        unread = [key for key in self.unread if key not in HARMLESS]
        if reason := next((f" '{key}': {REASONS[key]}." for key in unread if key in REASONS), ""):
            return reason
        names = [name for name in [*names, *self.names] if name not in self.values]
        close = [match for key in unread for match in get_close_matches(key, names, n=1)]
        return f" Did you mean '{close[0]}'?" if close else ""

    def _present(self, names: Iterable[str]) -> str:
        return next(name for name in names if name in self.values)


def text_of(value: Any, where: str, *, blank: bool = False) -> str:
    """Return ``value`` as the text it must be.

    Raises:
        DataError: it is of another type, blank where that is not allowed, or holds half a surrogate pair.
    """
    if not isinstance(value, str) or not (blank or value.strip()):
        raise DataError(f"{where}: found {BRIEF.repr(value)}; expected text.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise DataError(
                f"{where}: holds {half!r}, half of a surrogate pair; expected Unicode. Was the text cut in"
                " the middle of a character, or not read as UTF-8?"
            ) from error
    return value


def list_of(value: Any, where: str, each: Callable[[Any, str], Any]) -> list[Any]:
    """Return ``each(item, place)`` of a list that must not be empty.

    Raises:
        DataError: it is of another type, or empty.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: found {BRIEF.repr(value)}; expected a list that is not empty.")
    return [each(item, f"{where}[{i}]") for i, item in enumerate(value)]

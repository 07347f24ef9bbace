"""Your own data: a file with a JSON object a line, pictures as files beside it.

A line is one of::

    {"text": "Plain text to learn."}
    {"image": "cats/1.png", "caption": "A cat on a mat."}         # kind: read describes it, draw paints it
    {"image": "cats/2.png", "class": "tabby cat"}                 # a caption by `templates`
    {"messages": [{"role": "user", "content": ["What is this?", {"image": "cats/1.png"}]},
                  {"role": "assistant", "content": "A cat. I can draw one too:"}]}

In messages, content is a text or a list of texts and pictures. A picture is read where the user shows it
and drawn where the assistant does; ``{"read": FILE}`` and ``{"draw": FILE}`` say it themselves. What the
assistant says is supervised.
"""

from __future__ import annotations

import json
import logging
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from janus_modular import (
    DataError,
    Message,
    PartConfig,
    PictureError,
    PictureToDraw,
    PictureToRead,
    Registry,
    Sample,
    Segment,
    Source,
    Text,
    hookimpl,
    open_picture,
)

log = logging.getLogger(__name__)
ROLES = ("system", "user", "assistant")
KEYS = ("text", "messages", "image", "caption", "class")
EXPECTED = "text, messages, or image and caption or class"
MOST_BAD = 100  # lines in a row that `on_bad: skip` passes over


@dataclass
class JsonlConfig(PartConfig):
    """Which file, and what captions are for."""

    path: str = ""  # the .jsonl file
    pictures: str | None = None  # folder of the pictures; null: the file's own
    kind: Literal["read", "draw"] = "read"  # of captions and classes: describe the picture, or draw it
    templates: list[str] = field(
        default_factory=lambda: ["{}"]
    )  # what a caption or class is put into; one is drawn
    questions: list[str] = field(
        default_factory=lambda: ["Describe this picture."]
    )  # kind read; one is drawn
    outside: bool = False  # allow pictures outside the folder (absolute paths, ..)
    on_bad: Literal["error", "skip"] = "error"  # skip: take the next line instead, count and log it

    def __post_init__(self) -> None:
        """Check what needs no file."""
        if not self.path:
            raise ValueError("path: missing; expected a .jsonl file.")
        if not self.templates or not self.questions or not all("{}" in one for one in self.templates):
            raise ValueError(
                f"templates {self.templates}, questions {self.questions}: expected at least one of each, and"
                " {} in every template, where the caption goes."
            )


class Jsonl:
    """The lines of a file as samples. Only where each line begins is held in memory: 8 bytes a line."""

    def __init__(self, config: JsonlConfig) -> None:
        """Find the lines.

        Raises:
            DataError: there is no such file, or it has no lines.
        """
        self.config = config
        self.path = Path(config.path).expanduser()
        if not self.path.is_file():
            raise DataError(
                f"'{config.path}' is no file: set `path` to your own .jsonl file, one sample a line."
            )
        if not self.path.stat().st_size:
            raise DataError(f"'{config.path}' is empty: expected a JSON object a line.")
        self.folder = Path(config.pictures).expanduser() if config.pictures else self.path.parent
        if not self.folder.is_dir():
            raise DataError(f"the folder of pictures '{self.folder}' does not exist: set `pictures`.")
        self.skipped: set[int] = set()  # lines, each told of once
        with self.path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts = _line_starts(self._bytes)

    def __len__(self) -> int:
        return len(self._starts)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return the sample of line ``index``; ``rng`` chooses among templates and questions.

        Raises:
            DataError: says the file, the line, and what is wrong with it.
        """
        most = min(MOST_BAD, len(self))
        for at in ((index + tried) % len(self) for tried in range(most)):
            try:
                return self._sample(at, rng)
            except (DataError, PictureError) as error:
                where = f"{self.path}, line {self._line(at)}: {error}"
                if self.config.on_bad == "error":
                    raise DataError(where) from error
                if at not in self.skipped:
                    self.skipped.add(at)
                    log.warning("skipped (%d so far): %s", len(self.skipped), where)
        first = self._line(index)
        lines = f"{most} lines in a row from line {first}" if most > 1 else f"line {first}, the only one,"
        raise DataError(f"{self.path}: {lines} cannot be used.")

    def _sample(self, index: int, rng: np.random.Generator) -> Sample:
        start = int(self._starts[index])
        end = self._bytes.find(b"\n", start)
        try:
            line = json.loads(self._bytes[start : len(self._bytes) if end < 0 else end])
        except ValueError as error:
            raise DataError(f"not JSON: {error}.") from error
        if not isinstance(line, Mapping):
            raise DataError(f"a {type(line).__name__}; expected an object with {EXPECTED}.")
        if "messages" in line:
            return Sample(_list(line["messages"], "messages", self._message))
        if "image" in line and ("caption" in line or "class" in line):
            return self._pair(line, rng)
        if "text" in line:
            return Sample([Message("assistant", [Text(_text(line["text"], "text"), True)])], template=False)
        meant = [close for key in line if key not in KEYS for close in get_close_matches(key, KEYS, n=1)]
        hint = f" Did you mean '{meant[0]}'?" if meant else ""
        raise DataError(f"has {', '.join(line) or 'nothing'}; expected {EXPECTED}.{hint}")

    def _pair(self, line: Mapping[str, Any], rng: np.random.Generator) -> Sample:
        key = "caption" if "caption" in line else "class"
        words = _one_of(self.config.templates, rng).replace("{}", _text(line[key], key).strip())
        picture = self._open(line["image"], "image")
        if self.config.kind == "draw":
            return Sample([Message("user", [Text(words)]), Message("assistant", [PictureToDraw(picture)])])
        question = Text(_one_of(self.config.questions, rng))
        return Sample(
            [Message("user", [PictureToRead(picture), question]), Message("assistant", [Text(words, True)])]
        )

    def _message(self, message: Any) -> Message:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise DataError(f"a message with role {role!r}; expected {', '.join(ROLES)}.")
        content = message.get("content")
        items = [content] if isinstance(content, str) else content
        return Message(role, _list(items, f"content of {role}", lambda item: self._segment(item, role)))

    def _segment(self, item: Any, role: str) -> Segment:
        speaks = role == "assistant"
        if isinstance(item, str):
            return Text(item, supervised=speaks)
        if isinstance(item, Mapping):
            if "text" in item:
                return Text(_text(item["text"], "text"), supervised=speaks)
            for key in ("read", "draw", "image"):
                if key in item:
                    picture = self._open(item[key], key)
                    draws = key == "draw" or (key == "image" and speaks)
                    return PictureToDraw(picture, supervised=speaks) if draws else PictureToRead(picture)
        raise DataError(
            f"found {item!r} in a message of {role}; expected a text, {{image: FILE}} or {{text: ...}}."
        )

    def _open(self, name: Any, key: str) -> Any:
        path = self.folder / _text(name, key)
        if not self.config.outside and not path.resolve().is_relative_to(self.folder.resolve()):
            raise DataError(
                f"the picture '{name}' lies outside {self.folder}: move it there, or set outside: true."
            )
        return open_picture(path)

    def _line(self, index: int) -> int:
        """Count to a sample's line, from 1; only errors ask."""
        return self._bytes[: int(self._starts[index])].count(b"\n") + 1


def _line_starts(content: mmap.mmap, chunk: int = 1 << 26) -> NDArray[np.int64]:
    """Return where each line that is not blank begins."""
    breaks = [
        np.flatnonzero(np.frombuffer(content[at : at + chunk], np.uint8) == ord("\n")) + at
        for at in range(0, len(content), chunk)
    ]
    ends = np.concatenate([*breaks, [len(content)]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    short = np.flatnonzero(ends - starts < 8)  # the only ones that can be blank are looked at
    blank = [i for i in short if not content[int(starts[i]) : int(ends[i])].strip()]
    return np.delete(starts, blank)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key}: found {value!r}; expected text.")
    return value


def _list(value: Any, key: str, each: Callable[[Any], Any]) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{key}: found {value!r}; expected a list that is not empty.")
    return [each(item) for item in value]


def _one_of(choices: list[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


@hookimpl
def register_sources(registry: Registry[Source]) -> None:
    """Offer ``jsonl``."""
    registry.add("jsonl", Jsonl, JsonlConfig)

"""Conversations: ``messages`` of OpenAI's and LLaMA-Factory's form, ``conversations`` of LLaVA and ShareGPT.

The forms differ in the names of their keys and in where images are written: inside the content, or in a list
beside the content, with a marker in the text for each image. All become `Message`s here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from janus_modular import (
    DataError,
    ImageInput,
    ImageTarget,
    Message,
    Sample,
    Segment,
    Text,
    UnsupervisedError,
)
from janus_plugins.records.fields import BRIEF, EMPTY, Fields, list_of, text_of
from janus_plugins.records.images import ImageOpener
from janus_plugins.records.markers import LITERAL, split_at_markers, without_markers

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    "developer": "system",
}
"""The roles of a `Message`, by the names that records have for them."""

IMAGE_KEYS = ("read", "draw", "image", "image_url", "url", "path")
"""Keys of a content part that hold an image; ``read`` and ``draw`` also choose the path."""

PART_TYPES = ("text", "image", "image_url")


@dataclass(frozen=True)
class _ImagePosition:
    """The position of an image in a content; without a reference, the image is the next one listed."""

    where: str
    is_target: bool
    supervised: bool
    reference: Any = None


@dataclass
class _Turn:
    role: str
    content: list[Text | _ImagePosition] = field(default_factory=list)
    reasoning: Text | None = None


@dataclass(frozen=True)
class ConversationReader:
    """Reads the conversation of a record."""

    images: ImageOpener
    markers: bool = True  # `<image>` in a text stands for an image
    ignore: tuple[str, ...] = ()  # keys that are not used

    def sample(self, record: Fields) -> Sample:
        """Return the conversation of a record that has ``messages`` or ``conversations``.

        Raises:
            DataError: something in it is not used, or markers and images do not agree.
            ImageError: an image cannot be read.
        """
        name = "messages" if "messages" in record else "conversations"
        messages = record.take("messages", "conversations")
        flags: list[bool] = []
        turns: list[_Turn] = list_of(messages, name, lambda item, where: self._turn(item, where, flags))
        system = record.take("system")
        if system is not None and text_of(system, "system", blank=True).strip():
            if turns[0].role == "system":
                raise DataError(
                    "has `system`, and a first message with the role system; expected only one of them."
                )
            self._check_no_markers(system, "system")
            turns.insert(0, _Turn("system", [Text(system)]))
        listed = record.take("images", "image")
        record.close()
        if not isinstance(listed, list):
            listed = [] if listed is None or listed in EMPTY else [listed]
        return Sample(list(self._messages(turns, listed)), exact_supervision=bool(flags))

    def _turn(self, value: Any, where: str, flags: list[bool]) -> _Turn:
        fields = Fields(value, where, ignore=self.ignore)
        role_name = fields.take("role", "from")
        role = ROLES.get(role_name) if isinstance(role_name, str) else None
        if role is None:
            raise DataError(
                f"{where}: a message with role {BRIEF.repr(role_name)}; expected {', '.join(ROLES)}."
            )
        content = fields.take("content", "value")
        flag = _flag(fields)
        reasoning = fields.take("reasoning_content", "reasoning")
        fields.close()
        if flag is not None:
            flags.append(flag)
        supervised = role == "assistant" if flag is None else flag
        content_path = f"{where}: content of {role}"
        parts = [content] if isinstance(content, str) else content
        turn = _Turn(role)
        if reasoning is not None and reasoning not in EMPTY:
            if role != "assistant":
                raise DataError(
                    f"{where}: has reasoning_content, and the role {role}; expected the role assistant."
                )
            turn.reasoning = Text(text_of(reasoning, f"{where}: reasoning_content"), supervised)
            self._check_no_markers(turn.reasoning.text, f"{where}: reasoning_content")
        list_of(
            parts,
            content_path,
            lambda part, path: turn.content.extend(self._part(part, path, role, supervised)),
        )
        if role != "system" and not any(
            isinstance(item, _ImagePosition) or item.text.strip() for item in turn.content
        ):
            error_type = UnsupervisedError if supervised else DataError
            raise error_type(f"{content_path}: is empty; expected text or an image.")
        return turn

    def _part(self, part: Any, where: str, role: str, supervised: bool) -> Iterator[Text | _ImagePosition]:
        is_assistant = role == "assistant"
        if isinstance(part, str):
            yield from self._text(part, where, is_assistant, supervised)
            return
        fields = Fields(part, where, ignore=self.ignore)
        part_type = fields.take("type")
        if part_type is not None and (not isinstance(part_type, str) or part_type not in PART_TYPES):
            raise DataError(f"{where}: has type {BRIEF.repr(part_type)}; expected {', '.join(PART_TYPES)}.")
        if part_type == "text" or (part_type is None and "text" in fields):
            text = fields.take("text")
            fields.close()
            yield from self._text(text, where, is_assistant, supervised)
            return
        key = next((key for key in IMAGE_KEYS if key in fields), "image")
        reference = fields.take(*IMAGE_KEYS)
        fields.close()
        if reference is None and part_type is None:
            raise DataError(
                f"{where}: found {BRIEF.repr(part)}; expected a text, {{image: FILE}} or {{text: ...}}."
            )
        is_target = key == "draw" or (key != "read" and is_assistant)
        yield _ImagePosition(where, is_target, supervised, reference)

    def _text(
        self, value: Any, where: str, is_assistant: bool, supervised: bool
    ) -> Iterator[Text | _ImagePosition]:
        text = text_of(value, where, blank=True)
        texts = split_at_markers(text, where) if self.markers else [text]
        for i, part in enumerate(texts):
            if i:
                yield _ImagePosition(where, is_assistant, supervised)
            if part or len(texts) == 1:
                yield Text(part, supervised)

    def _check_no_markers(self, text: str, where: str) -> None:
        """Raise DataError for a marker in a text beside the content, which has no images."""
        if self.markers:
            without_markers(text, where, "Images stand in the content of messages.")

    def _messages(self, turns: list[_Turn], listed: list[Any]) -> Iterator[Message]:
        """Yield the messages with opened images; ``listed`` has those without a reference, in order."""
        positions = [part for turn in turns for part in turn.content if isinstance(part, _ImagePosition)]
        unlisted = [position for position in positions if position.reference is None]
        if len(unlisted) != len(listed):
            first = f" (the first in {unlisted[0].where})" if unlisted else ""
            raise DataError(
                f"positions for images: {len(unlisted)}{first}; images listed beside the content:"
                f" {len(listed)}. Expected an `<image>` for each of `images`, or images in the content."
                f"{f' {LITERAL}' if unlisted else ''}"
            )
        remaining = enumerate(listed)

        def open_image(part: Text | _ImagePosition) -> Segment:
            if isinstance(part, Text):
                return part
            where, reference = part.where, part.reference
            if reference is None:
                number, reference = next(remaining)
                where = f"images[{number}]"
            image = self.images.open(reference, where)
            return ImageTarget(image, part.supervised) if part.is_target else ImageInput(image)

        for turn in turns:
            yield Message(turn.role, [open_image(part) for part in turn.content], turn.reasoning)


def _flag(fields: Fields) -> bool | None:
    """Return whether a turn is supervised by its ``train``, ``loss`` or ``weight``; None without any."""
    value = fields.take("train", "loss", "weight")
    if value is None:
        return None
    if value not in (0, 1):  # True and False are equal to them
        raise DataError(
            f"{fields.where}found {BRIEF.repr(value)} as train, loss or weight; expected true or false,"
            " 1 or 0: a turn is supervised as a whole, or not at all."
        )
    return bool(value)

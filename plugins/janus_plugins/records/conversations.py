"""Conversations: ``messages`` of OpenAI's and LLaMA-Factory's form, ``conversations`` of LLaVA and ShareGPT.

They differ in the names of their keys and in where images are written: inside the content, or in a list
beside it with a marker in the text for each. All of them become `Message`s here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from janus_modular import DataError, ImageInput, ImageTarget, Message, Sample, Segment, Text
from janus_plugins.records.fields import BRIEF, EMPTY, Fields, list_of, text_of
from janus_plugins.records.images import ImageFolder
from janus_plugins.records.markers import LITERAL, split_at_markers, without_markers

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
}
"""What people call the three roles."""

IMAGE_KEYS = ("read", "draw", "image", "image_url", "url", "path")
"""Keys of a content part that hold an image; ``read`` and ``draw`` say what for."""

PART_TYPES = ("text", "image", "image_url")


@dataclass(frozen=True)
class _ImageSlot:
    """Where an image belongs; without a reference, it is the next of the record's list."""

    where: str
    draws: bool
    supervised: bool
    reference: Any = None


@dataclass
class _Turn:
    role: str
    content: list[Text | _ImageSlot] = field(default_factory=list)
    reasoning: Text | None = None


@dataclass(frozen=True)
class ConversationReader:
    """Reads the conversation of a record."""

    images: ImageFolder
    markers: bool = True  # `<image>` in a text stands for an image
    ignore: tuple[str, ...] = ()  # keys without effect

    def sample(self, record: Fields) -> Sample:
        """Return the conversation of a record that has ``messages`` or ``conversations``.

        Raises:
            DataError: something in it is not used, or markers and images do not agree.
            ImageError: an image cannot be read.
        """
        name = "messages" if "messages" in record else "conversations"
        turns_given = record.take("messages", "conversations")
        flags: list[bool] = []
        turns: list[_Turn] = list_of(turns_given, name, lambda one, where: self._turn(one, where, flags))
        system = record.take("system")
        if system is not None and text_of(system, "system", blank=True).strip():
            if turns[0].role == "system":
                raise DataError("has `system`, and a first message of the system: expected only one of them.")
            self._refuse_markers(system, "system")
            turns.insert(0, _Turn("system", [Text(system)]))
        listed = record.take("images", "image")
        record.close()
        if not isinstance(listed, list):
            listed = [] if listed is None or listed in EMPTY else [listed]
        return Sample(list(self._filled(turns, listed)), exact_supervision=bool(flags))

    def _turn(self, value: Any, where: str, flags: list[bool]) -> _Turn:
        fields = Fields(value, where, ignore=self.ignore)
        called = fields.take("role", "from")
        role = ROLES.get(called) if isinstance(called, str) else None
        if role is None:
            raise DataError(
                f"{where}: a message with role {BRIEF.repr(called)}; expected {', '.join(ROLES)}."
            )
        content = fields.take("content", "value")
        flag = _flag(fields)
        thought = fields.take("reasoning_content", "reasoning")
        fields.close()
        if flag is not None:
            flags.append(flag)
        supervised = role == "assistant" if flag is None else flag
        place = f"{where}: content of {role}"
        parts = [content] if isinstance(content, str) else content
        turn = _Turn(role)
        if thought is not None and thought not in EMPTY:
            if role != "assistant":
                raise DataError(
                    f"{where}: has reasoning_content, and role {role}; expected it of assistants."
                )
            turn.reasoning = Text(text_of(thought, f"{where}: reasoning_content"), supervised)
            self._refuse_markers(turn.reasoning.text, f"{where}: reasoning_content")
        list_of(parts, place, lambda one, at: turn.content.extend(self._part(one, at, role, supervised)))
        if role != "system" and not any(isinstance(s, _ImageSlot) or s.text.strip() for s in turn.content):
            raise DataError(f"{place}: is empty; expected text or an image.")
        return turn

    def _part(self, part: Any, where: str, role: str, supervised: bool) -> Iterator[Text | _ImageSlot]:
        speaks = role == "assistant"
        if isinstance(part, str):
            yield from self._text(part, where, speaks, supervised)
            return
        fields = Fields(part, where, ignore=self.ignore)
        kind = fields.take("type")
        if kind is not None and (not isinstance(kind, str) or kind not in PART_TYPES):
            raise DataError(f"{where}: has type {BRIEF.repr(kind)}; expected {', '.join(PART_TYPES)}.")
        if kind == "text" or (kind is None and "text" in fields):
            text = fields.take("text")
            fields.close()
            yield from self._text(text, where, speaks, supervised)
            return
        used = next((key for key in IMAGE_KEYS if key in fields), "image")
        reference = fields.take(*IMAGE_KEYS)
        fields.close()
        if reference is None and kind is None:
            raise DataError(
                f"{where}: found {BRIEF.repr(part)}; expected a text, {{image: FILE}} or {{text: ...}}."
            )
        draws = used == "draw" or (used != "read" and speaks)
        yield _ImageSlot(where, draws, supervised, reference)

    def _text(self, value: Any, where: str, speaks: bool, supervised: bool) -> Iterator[Text | _ImageSlot]:
        text = text_of(value, where, blank=True)
        stretches = split_at_markers(text, where) if self.markers else [text]
        for i, stretch in enumerate(stretches):
            if i:
                yield _ImageSlot(where, speaks, supervised)
            if stretch or len(stretches) == 1:
                yield Text(stretch, supervised)

    def _refuse_markers(self, text: str, where: str) -> None:
        """Refuse a marker in a text beside the content, which holds no images."""
        if self.markers:
            without_markers(text, where, "Images stand in the content of messages.")

    def _filled(self, turns: list[_Turn], listed: list[Any]) -> Iterator[Message]:
        """Yield the messages with their images opened, those without a reference in the order of the list."""
        slots = [part for turn in turns for part in turn.content if isinstance(part, _ImageSlot)]
        waiting = [slot for slot in slots if slot.reference is None]
        if len(waiting) != len(listed):
            first = f" (the first in {waiting[0].where})" if waiting else ""
            raise DataError(
                f"images that the text has places for: {len(waiting)}{first}; images listed beside it:"
                f" {len(listed)}. Expected an `<image>` for each of `images`, or images in the content."
                f"{f' {LITERAL}' if waiting else ''}"
            )
        following = enumerate(listed)

        def opened(part: Text | _ImageSlot) -> Segment:
            if isinstance(part, Text):
                return part
            where, reference = part.where, part.reference
            if reference is None:
                number, reference = next(following)
                where = f"images[{number}]"
            image = self.images.open(reference, where)
            return ImageTarget(image, part.supervised) if part.draws else ImageInput(image)

        for turn in turns:
            yield Message(turn.role, [opened(part) for part in turn.content], turn.reasoning)


def _flag(fields: Fields) -> bool | None:
    """Return whether a turn says itself that it is learned: by ``train``, ``loss`` or ``weight``."""
    value = fields.take("train", "loss", "weight")
    if value is None:
        return None
    if value not in (0, 1):  # True and False are equal to them
        raise DataError(
            f"{fields.where}found {BRIEF.repr(value)} as train, loss or weight; expected true or false,"
            " 1 or 0: a turn is learned or not, and never in part."
        )
    return bool(value)

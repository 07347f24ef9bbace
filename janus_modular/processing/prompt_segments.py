"""A conversation as the parts of a sequence: text, special tokens and images, each learned or not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from janus_modular.processing.template_spans import Render, Said, render_marked
from janus_modular.processing.text_tokenizer import Piece, TextTokenizer
from janus_modular.sequence import ImageInput, ImageTarget, Message, Sample, Segment, Text

Supervise = Literal["answers", "all"]


@dataclass(frozen=True)
class PromptSegment:
    """A piece of the prompt, whether it is to be learned, and the image that it stands for."""

    piece: Piece
    learned: bool = False
    image: ImageInput | ImageTarget | None = None


class PartMaker:
    """Turns conversations and bare segments into parts, for one tokenizer and one template."""

    def __init__(self, tokenizer: TextTokenizer, render: Render, *, learn_image_ends: bool = False) -> None:
        self.tokenizer = tokenizer
        self.render = render
        self.learn_image_ends = learn_image_ends

    def conversation(self, messages: Sequence[Message], *, answer: bool = False) -> list[PromptSegment]:
        """Render messages; with ``answer``, up to where the assistant begins to speak."""
        rendered = render_marked(self.render, messages, answer=answer, special=self.tokenizer.special_pattern)
        parts: list[PromptSegment] = []
        previous: Said | None = None
        for i, text in enumerate(rendered.between):
            said = rendered.said[i] if i < len(rendered.said) else None
            if said and previous and said.message == previous.message:  # whitespace within a message
                parts += self._template(text, learned=self._learned(previous))
            else:
                lead = rendered.speech.get(said.message, len(text)) if said else len(text)
                parts += self._tail(text[:lead], previous)
                parts += self._lead(text[lead:], said)
            parts += self._segment(said.segment) if said else []
            previous = said
        return parts

    def document(self, segments: Sequence[Segment]) -> list[PromptSegment]:
        """Write bare segments: what they say, then EOS."""
        parts = [part for segment in segments for part in self._segment(segment)]
        learned = bool(segments) and self._learned(Said(segments[-1], 0, "assistant"))
        return [*parts, PromptSegment(Piece(self.tokenizer.names["eos"] or "", special=True), learned)]

    def _template(self, text: str, *, learned: bool = False) -> list[PromptSegment]:
        return [PromptSegment(piece, learned) for piece in self.tokenizer.cut(text)]

    def _learned(self, said: Said) -> bool:
        """Whether the template's text around a segment is learned with it."""
        if said.role != "assistant" or isinstance(said.segment, ImageInput):
            return False
        return said.segment.supervised and (isinstance(said.segment, Text) or self.learn_image_ends)

    def _lead(self, text: str, said: Said | None) -> list[PromptSegment]:
        """What leads to a first word. To an image no space does: its prompt has none either."""
        if said and isinstance(said.segment, ImageTarget) and not text.strip():
            return []
        return self._template(text, learned=said is not None and self._learned(said))

    def _tail(self, text: str, said: Said | None) -> list[PromptSegment]:
        """What follows a message: the token that ends its turn is learned with it, the rest is not."""
        if said is None or not self._learned(said):
            return self._template(text)
        end = re.match(rf"\s*(?:{self.tokenizer.special_pattern.pattern})", text)
        cut = end.end() if end else 0
        return self._template(text[:cut], learned=True) + self._template(text[cut:])

    def _segment(self, segment: Segment) -> list[PromptSegment]:
        if isinstance(segment, Text):
            return [PromptSegment(Piece(segment.text), segment.supervised)]
        names = self.tokenizer.names
        begin, end, placeholder = (
            Piece(names[name] or "", special=True) for name in ("begin_image", "end_image", "placeholder")
        )
        ends = self.learn_image_ends and isinstance(segment, ImageTarget) and segment.supervised
        return [
            PromptSegment(begin, ends),
            PromptSegment(placeholder, image=segment),
            PromptSegment(end, ends),
        ]


def with_supervision(sample: Sample) -> Sample:
    """Mark what is learned where the sample's source left it open: no text marked, and nothing to draw.

    Then it is what the assistant says, or the whole of a plain text.
    """
    segments = [segment for message in sample.messages for segment in message.content]
    marked = any(isinstance(s, Text) and s.supervised for s in segments)
    draws = any(isinstance(s, ImageTarget) and s.supervised for s in segments)
    if marked or draws or sample.exact_supervision:
        return sample
    return replace(
        sample,
        messages=[
            replace(
                m,
                content=[_marked(s) for s in m.content],
                reasoning_content=m.reasoning_content and replace(m.reasoning_content, supervised=True),
            )
            if m.role == "assistant" or not sample.template
            else m
            for m in sample.messages
        ],
    )


def _marked(segment: Segment) -> Segment:
    return replace(segment, supervised=True) if isinstance(segment, Text) else segment

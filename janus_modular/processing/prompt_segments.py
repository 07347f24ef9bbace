"""Conversations as prompt segments: text, special tokens and images, each supervised or not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from janus_modular.errors import PromptError
from janus_modular.processing.template_spans import MessageSegment, Render, render_conversation
from janus_modular.processing.text_tokenizer import Encoded, TextSpan, TextTokenizer
from janus_modular.sequence import ImageInput, ImageTarget, Message, Sample, Segment, Text

Supervise = Literal["answers", "all"]


@dataclass(frozen=True)
class PromptSegment:
    """A span of the prompt's text, whether it is supervised, and the image whose placeholder it is."""

    span: TextSpan
    supervised: bool = False
    image: ImageInput | ImageTarget | None = None
    begins_answer: bool = False  # the prompt for a supervised answer ends before this segment


class SegmentBuilder:
    """Builds prompt segments from conversations and documents, for one tokenizer and one template."""

    def __init__(self, tokenizer: TextTokenizer, render: Render, *, learn_image_ends: bool = False) -> None:
        self.tokenizer = tokenizer
        self.render = render
        self.learn_image_ends = learn_image_ends

    def conversation(self, messages: Sequence[Message], *, answer: bool = False) -> list[PromptSegment]:
        """Render messages; with ``answer``, up to where the assistant's next answer begins."""
        rendered = render_conversation(
            self.render, messages, answer=answer, special=self.tokenizer.special_pattern
        )
        segments: list[PromptSegment] = []
        previous: MessageSegment | None = None
        for i, text in enumerate(rendered.template_texts):
            current = rendered.segments[i] if i < len(rendered.segments) else None
            answer_start: int | None = None  # where a supervised answer begins in `segments`
            if current and previous and current.message == previous.message:  # whitespace within a message
                segments += self._template_text(text, supervised=self._is_supervised(previous))
            else:
                start = rendered.answer_starts.get(current.message, len(text)) if current else len(text)
                segments += self._after_message(text[:start], previous)
                if current and current.message in rendered.answer_starts and self._is_supervised(current):
                    answer_start = len(segments)
                segments += self._before_message(text[start:], current)
            segments += self._content(current.segment) if current else []
            if answer_start is not None:
                segments[answer_start] = replace(segments[answer_start], begins_answer=True)
            previous = current
        return segments

    def document(self, content: Sequence[Segment]) -> list[PromptSegment]:
        """Return the segments of plain text and images, which no template frames, and of EOS behind them."""
        segments = [segment for part in content for segment in self._content(part)]
        supervised = bool(content) and self._is_supervised(MessageSegment(content[-1], 0, "assistant"))
        eos = TextSpan(self.tokenizer.names["eos"] or "", special=True)
        return [*segments, PromptSegment(eos, supervised)]

    def _template_text(self, text: str, *, supervised: bool = False) -> list[PromptSegment]:
        spans = self.tokenizer.split_at_special_tokens(text)
        return [PromptSegment(span, supervised) for span in spans]

    def _is_supervised(self, item: MessageSegment) -> bool:
        """Return True if the template's text around a segment is supervised with the segment."""
        if item.role != "assistant" or isinstance(item.segment, ImageInput):
            return False
        return item.segment.supervised and (isinstance(item.segment, Text) or self.learn_image_ends)

    def _before_message(self, text: str, first: MessageSegment | None) -> list[PromptSegment]:
        """Return the template's text before a message's first segment.

        Whitespace before an image target is left out, as the prompt of the image has none either.
        """
        if first and isinstance(first.segment, ImageTarget) and not text.strip():
            return []
        return self._template_text(text, supervised=first is not None and self._is_supervised(first))

    def _after_message(self, text: str, last: MessageSegment | None) -> list[PromptSegment]:
        """Return the template's text after a message, of which the token that ends the turn is supervised."""
        if last is None or not self._is_supervised(last):
            return self._template_text(text)
        match = re.match(rf"\s*(?:{self.tokenizer.special_pattern.pattern})", text)
        end = match.end() if match else 0
        return self._template_text(text[:end], supervised=True) + self._template_text(text[end:])

    def _content(self, segment: Segment) -> list[PromptSegment]:
        if isinstance(segment, Text):
            return [PromptSegment(TextSpan(segment.text), segment.supervised)]
        names = self.tokenizer.names
        begin, end, placeholder = (
            TextSpan(names[name] or "", special=True) for name in ("begin_image", "end_image", "placeholder")
        )
        ends = self.learn_image_ends and isinstance(segment, ImageTarget) and segment.supervised
        return [
            *([PromptSegment(begin, ends)] if begin.text else []),
            PromptSegment(placeholder, image=segment),
            PromptSegment(end, ends),
        ]


def with_supervision(sample: Sample) -> Sample:
    """Return the sample with the assistant's texts supervised, if nothing in it is supervised yet.

    In a plain text (``template=False``), all messages are supervised. Exact supervision is not changed.
    """
    segments = [segment for message in sample.messages for segment in message.content]
    has_text = any(isinstance(segment, Text) and segment.supervised for segment in segments)
    has_target = any(isinstance(segment, ImageTarget) and segment.supervised for segment in segments)
    if has_text or has_target or sample.exact_supervision:
        return sample
    return replace(
        sample,
        messages=[
            replace(
                message,
                content=[_supervised(segment) for segment in message.content],
                reasoning_content=message.reasoning_content
                and replace(message.reasoning_content, supervised=True),
            )
            if message.role == "assistant" or not sample.template
            else message
            for message in sample.messages
        ],
    )


def _supervised(segment: Segment) -> Segment:
    return replace(segment, supervised=True) if isinstance(segment, Text) else segment


def check_answer_starts(
    tokenizer: TextTokenizer, encoded: Encoded, segments: Sequence[PromptSegment]
) -> None:
    """Check that no token spans the end of a prompt and the beginning of its supervised answer.

    Such a token is in training alone: the tokens of the prompt would be no prefix of the sequence.

    Raises:
        PromptError: there is such a token.
    """
    for k, segment in enumerate(segments):
        if not segment.begins_answer:
            continue
        spanning = encoded.ids[(encoded.first < k) & (encoded.last >= k)]
        if len(spanning):
            text = "".join(later.span.text for later in segments[k:])
            raise PromptError(
                f"the token {tokenizer.decode(spanning[:1])!r} spans the end of the prompt and the"
                f" beginning of the answer, {text[:40]!r}: the prompt alone has other tokens than in"
                " training. Expected a prompt that ends at the boundary of a token: remove whitespace"
                " from the beginning of the answer, or from the end of what the tokenizer's"
                " chat_template.jinja writes before an answer, or choose another processor.template."
            )

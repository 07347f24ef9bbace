"""Renders a conversation so that the template's text can be distinguished from the messages' content.

A chat template may be any program, so its output is not searched for the content of messages. Instead, each
text and each image is replaced by a private sentinel before rendering. Text between sentinels was written by
the template, and only there can special tokens stand. Whitespace around a text stays outside its sentinel, so
that a template that strips its messages strips the whitespace.

Prompts are also compared with training here: a model that learns an answer after one text, and is prompted
with another, was trained for nothing.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from janus_modular.errors import PromptError
from janus_modular.processing.template_process import TemplateStoppedError
from janus_modular.sequence import ImageTarget, Message, Segment, Text

Turn = dict[str, str]
"""A message as a template gets it: ``role``, ``content``, and ``reasoning_content`` where there is any."""

NONCE = secrets.token_hex(8)  # new in every process, so that no message can contain it
SENTINEL = re.compile(rf"x{NONCE}n(\d+)x")
NOTHING = re.compile(r"(?!)")


class Render(Protocol):
    """A template: writes turns as text."""

    @property
    def search_strings(self) -> Sequence[str]:
        """Strings for which the template searches the content of messages: reasoning tags, for example."""
        ...

    @property
    def variable_names(self) -> Sequence[str]:
        """Names of the variables that can be set for the template."""
        ...

    def __call__(self, turns: Sequence[Turn], answer: bool) -> str:
        """Write the turns; with ``answer``, up to where the assistant's next answer begins."""
        ...


@dataclass(frozen=True)
class MessageSegment:
    """A segment, with the index and the role of its message."""

    segment: Segment
    message: int
    role: str
    is_reasoning: bool = False  # a template may leave reasoning out of earlier turns


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it."""

    segments: list[MessageSegment]  # n, in order
    template_texts: list[str]  # n + 1: the template's text before, between and after the segments
    # Index of an assistant's message -> where the answer begins in the template's text before the message.
    answer_starts: dict[int, int]


class Sentinels:
    """The sentinels of one conversation, and the segments that they stand for."""

    def __init__(self, tags: Sequence[str] = (), special: re.Pattern[str] = NOTHING) -> None:
        """Begin without sentinels; ``tags`` in texts are kept, between sentinels, for the template to find.

        Tags that hold a ``special`` token are kept in the assistant's messages alone.
        """
        self.segments: list[MessageSegment] = []
        self._tags = {True: _any_of(tags), False: _any_of([tag for tag in tags if not special.search(tag)])}

    def turn(self, message: Message, index: int) -> Turn:
        """Return a message with a sentinel in place of each text and each image."""
        turn = {"role": message.role}
        if message.reasoning_content is not None:
            turn["reasoning_content"] = self._text(message.reasoning_content, index, message.role, True)
        turn["content"] = "".join(
            self._text_with_tags(segment, index, message.role)
            if isinstance(segment, Text)
            else self._sentinel(segment, index, message.role)
            for segment in message.content
        )
        return turn

    def restore(self, rendered: str) -> str:
        """Return a rendered text with each text in place of its sentinel; images keep their sentinels."""

        def text_of(match: re.Match[str]) -> str:
            segment = self.segments[int(match[1])].segment
            return segment.text if isinstance(segment, Text) else match[0]

        return SENTINEL.sub(text_of, rendered)

    def _text_with_tags(self, text: Text, index: int, role: str) -> str:
        """Replace a text around the tags that it holds; what tags enclose may be reasoning."""
        parts = self._tags[role == "assistant"].split(text.text)  # every second part is a tag
        return "".join(
            part if i % 2 else self._text(replace(text, text=part), index, role, len(parts) > 1)
            for i, part in enumerate(parts)
        )

    def _text(self, text: Text, index: int, role: str, is_reasoning: bool = False) -> str:
        core = text.text.strip()
        if not core:  # whitespace alone needs no sentinel
            return text.text
        before, after = text.text.split(core, 1)
        return before + self._sentinel(replace(text, text=core), index, role, is_reasoning) + after

    def _sentinel(self, segment: Segment, index: int, role: str, is_reasoning: bool = False) -> str:
        self.segments.append(MessageSegment(segment, index, role, is_reasoning))
        return f"x{NONCE}n{len(self.segments) - 1}x"


def render_conversation(
    render: Render, messages: Sequence[Message], *, answer: bool, special: re.Pattern[str] = NOTHING
) -> Rendered:
    """Render a conversation; return its segments and the template's text around them.

    An assistant's answer begins where a prompt for the answer would end: a space that the template writes
    before the first word belongs to the answer. ``special`` matches the tokenizer's special tokens.

    Raises:
        PromptError: the template refuses the conversation, drops or reorders content, or precedes something
            supervised by another text than in the prompt for it.
    """
    sentinels, turns, rendered = _render_with_sentinels(render, messages, answer, special)
    matches = list(SENTINEL.finditer(rendered))
    order = [int(match[1]) for match in matches]
    missing = [i for i in range(len(sentinels.segments)) if i not in order]
    if order != sorted(set(order)) or not all(sentinels.segments[i].is_reasoning for i in missing):
        raise PromptError(
            f"the chat template was given {len(sentinels.segments)} segments of content and rendered"
            f" {', '.join(map(str, order)) or 'none'}: it drops, repeats or reorders content. Expected each"
            " segment once, in order; choose another processor.template."
        )
    for i in missing:
        _check_omitted_reasoning(render, sentinels.segments[i], turns, f"x{NONCE}n{i}x")
    segments = [sentinels.segments[i] for i in order]
    starts = [0, *(match.end() for match in matches)]
    ends = [*(match.start() for match in matches), len(rendered)]
    answer_starts = {}
    for k, item in enumerate(segments):
        if item.role != "assistant":
            continue
        if isinstance(item.segment, ImageTarget) and item.segment.supervised:
            prompt = _drawing_prompt(render, turns, item.message, matches[k][0])
            _check_prefix(render, sentinels, item, rendered[: ends[k]], prompt)
        if k == 0 or segments[k - 1].message != item.message:
            answer_prompt = _answer_prompt(render, turns[: item.message])
            if answer_prompt is not None and isinstance(item.segment, Text) and item.segment.supervised:
                _check_prefix(render, sentinels, item, rendered[: ends[k]], answer_prompt, exact=False)
            is_prefix = answer_prompt is not None and rendered[: ends[k]].startswith(answer_prompt)
            start = len(answer_prompt) if answer_prompt and is_prefix else ends[k]
            answer_starts[item.message] = max(start - starts[k], 0)
    template_texts = [rendered[start:end] for start, end in zip(starts, ends, strict=True)]
    return Rendered(segments, template_texts, answer_starts)


def _render_with_sentinels(
    render: Render, messages: Sequence[Message], answer: bool, special: re.Pattern[str]
) -> tuple[Sentinels, list[Turn], str]:
    """Render sentinels, so that they come out as the texts would.

    Sentinels for whole texts are tried first, then sentinels around the tags that the template searches for.

    Raises:
        PromptError: the template refuses the conversation, or changes texts.
    """
    attempts: list[Sequence[str]] = [(), render.search_strings] if render.search_strings else [()]
    tokens = _special_tokens_in(render.search_strings, special)
    texts = [
        segment.text
        for message in messages
        if message.role == "assistant"
        for segment in message.content
        if isinstance(segment, Text)
    ]
    if any(token in text for token in tokens for text in texts):
        attempts.insert(0, tokens)  # as tokens, which they are where the template itself writes them
    for tags in attempts:
        sentinels = Sentinels(tags, special)
        turns = [sentinels.turn(message, i) for i, message in enumerate(messages)]
        original = [{key: sentinels.restore(value) for key, value in turn.items()} for turn in turns]
        expected = render(original, answer)
        try:
            rendered = render(turns, answer)
        except PromptError as error:  # the template searches the texts for something
            if tags == attempts[-1] or isinstance(error, TemplateStoppedError):
                raise
            continue
        if sentinels.restore(rendered) == expected:
            return sentinels, turns, rendered
    raise PromptError(
        "the chat template changes the content of messages. Expected content to be rendered as it is; remove"
        " what the template searches for (such as reasoning tags), or choose another processor.template."
    )


def _special_tokens_in(strings: Sequence[str], special: re.Pattern[str]) -> list[str]:
    """Return the special tokens among a template's search strings, and the opening tags of closing ones."""
    opening = [f"<{string[2:]}" for string in strings if string.startswith("</")]
    return [string for string in dict.fromkeys([*strings, *opening]) if special.fullmatch(string)]


def _answer_prompt(render: Render, turns: Sequence[Turn]) -> str | None:
    """Return the prompt for the next answer; None where no user's message precedes it."""
    if not any(turn["role"] == "user" for turn in turns):
        return None
    return render(turns, True)


def _drawing_prompt(render: Render, turns: Sequence[Turn], index: int, sentinel: str) -> str:
    """Return the prompt for an image in message ``index``: the text before it where nothing follows it."""
    content = turns[index]["content"]
    content = content[: content.index(sentinel) + len(sentinel)]
    return render([*turns[:index], {**turns[index], "content": content}], False).partition(sentinel)[0]


def _check_prefix(
    render: Render,
    sentinels: Sentinels,
    item: MessageSegment,
    trained: str,
    prompt: str,
    *,
    exact: bool = True,
) -> None:
    """Check the text before a supervised segment in training against the prompt for the segment.

    Raises:
        PromptError: the texts differ (``exact``), or the prompt is no prefix of the text in training.
    """
    if trained == prompt or (not exact and trained.startswith(prompt)):
        return
    trained, prompt = sentinels.restore(trained), sentinels.restore(prompt)
    difference = next(i for i in range(len(trained) + 1) if trained[i : i + 1] != prompt[i : i + 1])
    start = max(difference - 30, 0)
    dots = "..." if start else ""
    name = "answer" if isinstance(item.segment, Text) else "image to draw"
    raise PromptError(
        f"the chat template writes other text before the {name} of message {item.message} in training than in"
        " the prompt for it:\n"
        f"  trained: {dots}{trained[start : start + 120]!r}\n"
        f"  prompt:  {dots}{prompt[start : start + 120]!r}\n"
        f"{_hint(render, is_last=item.message == sentinels.segments[-1].message)}"
    )


def _check_omitted_reasoning(
    render: Render, item: MessageSegment, turns: Sequence[Turn], sentinel: str
) -> None:
    """Check that reasoning which a template leaves out is earlier reasoning, and not supervised.

    Raises:
        PromptError: the reasoning is supervised, or the template never writes ``reasoning_content``.
    """
    assert isinstance(item.segment, Text)
    if item.segment.supervised:
        raise PromptError(
            f"the chat template leaves out supervised reasoning of message {item.message}:"
            f" {item.segment.text[:60]!r}. Expected it to be rendered; make the turn the last of a sample,"
            " leave the reasoning out, or choose another processor.template."
        )
    if sentinel in turns[item.message].get("reasoning_content", "") and sentinel not in render(
        turns[: item.message + 1], False
    ):
        raise PromptError(
            f"the chat template never writes reasoning_content, which message {item.message} has. Leave it"
            " out, or choose another processor.template."
        )


def _hint(render: Render, *, is_last: bool) -> str:
    names = ", ".join(render.variable_names)
    variables = f"set processor.template_variables (it reads {names}), " if names else ""
    last = "" if is_last else "make what is learned the last turn of a sample, "
    return (
        f"Expected the prompt to be a prefix of the text in training: {variables}{last}change the tokenizer's"
        " chat_template.jinja, or choose another processor.template."
    )


def _any_of(strings: Sequence[str]) -> re.Pattern[str]:
    """Match any of some strings as a group, the longest first."""
    choices = "|".join(map(re.escape, sorted(strings, key=len, reverse=True)))
    return re.compile(f"({choices})") if choices else re.compile(r"((?!))")

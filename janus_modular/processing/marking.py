"""Which characters of a rendered conversation are whose: the template's, or somebody's words.

A chat template may be any program, so its output is not searched for what people said. Instead every
word of theirs is replaced by a private mark before rendering: what comes out between the marks was
written by the template, and only there can a special token stand. Whitespace around the words stays
as it is, outside the mark, so that a template that strips its messages strips it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from janus_modular.errors import PromptError
from janus_modular.sequence import Message, Segment, Text

Turn = dict[str, str]
"""What a template is given: ``{"role": ..., "content": ...}``."""

Render = Callable[[Sequence[Turn], bool], str]
"""A template: turns, and whether to end where the assistant begins to speak."""

NONCE = secrets.token_hex(8)  # new in every process, so that nobody can have written it into a message
MARK = re.compile(rf"x{NONCE}n(\d+)x")


@dataclass(frozen=True)
class Said:
    """A segment, and the message that it stands in."""

    segment: Segment
    message: int
    role: str


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it."""

    said: list[Said]  # n segments, in order
    between: list[str]  # n + 1 stretches of the template's text: before, between and after them
    speech: dict[int, int]  # an assistant's message -> where it begins in the stretch before its first word


class Marks:
    """The private marks of one prompt, and what each stands for."""

    def __init__(self) -> None:
        self.said: list[Said] = []

    def turn(self, message: Message, index: int) -> Turn:
        """Write a message with a mark in place of each text and each picture."""
        content = ""
        for segment in message.content:
            before = after = ""
            if isinstance(segment, Text):
                core = segment.text.strip()
                if not core:  # whitespace alone needs no mark
                    content += segment.text
                    continue
                before, after = segment.text.split(core, 1)
                segment = Text(core, segment.supervised)
            content += f"{before}x{NONCE}n{len(self.said)}x{after}"
            self.said.append(Said(segment, index, message.role))
        return {"role": message.role, "content": content}

    def reveal(self, marked: str) -> str:
        """Put the words back where their marks stand; pictures keep their marks."""

        def words(match: re.Match[str]) -> str:
            segment = self.said[int(match[1])].segment
            return segment.text if isinstance(segment, Text) else match[0]

        return MARK.sub(words, marked)

    def between(self, rendered: str) -> list[tuple[int, str]]:
        """Return the template's own stretches of what was rendered, and where each begins.

        Raises:
            PromptError: the template left something out, repeated it, or changed the order.
        """
        found = list(MARK.finditer(rendered))
        if [int(match[1]) for match in found] != list(range(len(self.said))):
            order = ", ".join(match[1] for match in found) or "none"
            raise PromptError(
                f"the chat template was given {len(self.said)} pieces of content and rendered {order}: "
                "it drops, repeats or reorders what was said. Expected each once, in order; choose "
                "another processor.template."
            )
        starts = [0, *(match.end() for match in found)]
        ends = [*(match.start() for match in found), len(rendered)]
        return [(start, rendered[start:end]) for start, end in zip(starts, ends, strict=True)]


def render_marked(
    render: Render, messages: Sequence[Message], *, answer: bool, rewritten: bool = False
) -> Rendered:
    """Render a conversation and tell the template's text from what was said.

    What the assistant has to say begins where a prompt for it would end: the space that a template
    puts before the first word is its own to say. ``rewritten`` is for this function's own use.

    Raises:
        PromptError: the template refuses the conversation, or loses track of what was said.
    """
    marks = Marks()
    turns = [marks.turn(message, i) for i, message in enumerate(messages)]
    rendered = render(turns, answer)
    between = marks.between(rendered)
    real = [{**turn, "content": marks.reveal(turn["content"])} for turn in turns]
    if marks.reveal(rendered) != render(real, answer):  # content was looked into, and changed
        if rewritten:
            raise PromptError(_REWRITES)
        changed = [_rewritten(render, m, turns, i, real[i], answer) for i, m in enumerate(messages)]
        return render_marked(render, changed, answer=answer, rewritten=True)
    speech = {}
    for i, said in enumerate(marks.said):
        first = i == 0 or marks.said[i - 1].message != said.message
        if first and said.role == "assistant":
            at, text = between[i]
            start = _prompt_length(render, turns[: said.message], rendered) - at
            speech[said.message] = start if 0 <= start <= len(text) else len(text)
    return Rendered(marks.said, [text for _, text in between], speech)


_REWRITES = (
    "the chat template rewrites what was said, and cannot be followed. Expected messages to be rendered as "
    "they are; take out what the template looks for (reasoning tags, say) or choose another "
    "processor.template."
)


def _prompt_length(render: Render, turns: Sequence[Turn], rendered: str) -> int:
    """How long the prompt for the next answer is; -1 where the template would have prompted otherwise."""
    try:
        prompt = render(turns, True)
    except PromptError:  # no conversation begins like this
        return -1
    return len(prompt) if rendered.startswith(prompt) else -1


def _rewritten(
    render: Render, message: Message, turns: Sequence[Turn], index: int, real: Turn, answer: bool
) -> Message:
    """Return a message with the words that the template makes of it (earlier reasoning removed, say).

    Rendered alone among marked ones: what differs from the marked rendering is this message's.
    """
    if len(message.content) != 1 or not isinstance(message.content[0], Text) or not real["content"].strip():
        return message
    mark = turns[index]["content"].strip()
    before, after = render(turns, answer).split(mark, 1)
    text = render([*turns[:index], real, *turns[index + 1 :]], answer)
    if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before + after)):
        raise PromptError(_REWRITES)
    words = text[len(before) : len(text) - len(after)]
    return Message(message.role, [replace(message.content[0], text=words)])

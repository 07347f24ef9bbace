"""Which characters of a rendered conversation are whose: the template's, or somebody's words.

A chat template may be any program, so its output is not searched for what people said. Instead every
word of theirs is replaced by a private mark before rendering: what comes out between the marks was
written by the template, and only there can a special token stand. Whitespace around the words stays
as it is, outside the mark, so that a template that strips its messages strips it.

Here too what is trained is held against what is asked for: a model that learns an answer behind one text, and
is asked for it behind another, was trained for nothing.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from janus_modular.errors import PromptError
from janus_modular.sequence import ImageTarget, Message, Segment, Text

Turn = dict[str, str]
"""What a template is given: ``role``, ``content``, and ``reasoning_content`` where a message has it."""

NONCE = secrets.token_hex(8)  # new in every process, so that nobody can have written it into a message
MARK = re.compile(rf"x{NONCE}n(\d+)x")
NOTHING = re.compile(r"(?!)")


class Render(Protocol):
    """A template: writes turns as text."""

    @property
    def searched(self) -> Sequence[str]:
        """Strings that the template looks for in what was said: reasoning tags, say."""
        ...

    @property
    def reads(self) -> Sequence[str]:
        """Names of the variables that can be set for it."""
        ...

    def __call__(self, turns: Sequence[Turn], answer: bool) -> str:
        """Write the turns; with ``answer``, up to where the assistant begins to speak."""
        ...


@dataclass(frozen=True)
class Said:
    """A segment, and the message that it stands in."""

    segment: Segment
    message: int
    role: str
    is_reasoning: bool = False  # a template may leave it out of earlier turns


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it."""

    said: list[Said]  # n segments, in order
    between: list[str]  # n + 1 stretches of the template's text: before, between and after them
    speech: dict[int, int]  # an assistant's message -> where it begins in the stretch before its first word


class Marks:
    """The private marks of one prompt, and what each stands for."""

    def __init__(self, tags: Sequence[str] = (), special: re.Pattern[str] = NOTHING) -> None:
        """Begin without marks; ``tags`` are kept as they are, between marks, for the template to find.

        Of those that hold a ``special`` token only what the assistant says is searched.
        """
        self.said: list[Said] = []
        self._tags = {True: _any_of(tags), False: _any_of([t for t in tags if not special.search(t)])}

    def turn(self, message: Message, index: int) -> Turn:
        """Write a message with a mark in place of each text and each image."""
        turn = {"role": message.role}
        if message.reasoning_content is not None:
            turn["reasoning_content"] = self._text(message.reasoning_content, index, message.role, True)
        turn["content"] = "".join(
            self._words(segment, index, message.role)
            if isinstance(segment, Text)
            else self._mark(segment, index, message.role)
            for segment in message.content
        )
        return turn

    def reveal(self, marked: str) -> str:
        """Put the words back where their marks stand; images keep their marks."""

        def words(match: re.Match[str]) -> str:
            segment = self.said[int(match[1])].segment
            return segment.text if isinstance(segment, Text) else match[0]

        return MARK.sub(words, marked)

    def _words(self, text: Text, index: int, role: str) -> str:
        """Mark a text around the tags that it holds; what they enclose may be reasoning."""
        pieces = self._tags[role == "assistant"].split(text.text)
        return "".join(
            piece if i % 2 else self._text(replace(text, text=piece), index, role, len(pieces) > 1)
            for i, piece in enumerate(pieces)
        )

    def _text(self, text: Text, index: int, role: str, is_reasoning: bool = False) -> str:
        core = text.text.strip()
        if not core:  # whitespace alone needs no mark
            return text.text
        before, after = text.text.split(core, 1)
        return before + self._mark(replace(text, text=core), index, role, is_reasoning) + after

    def _mark(self, segment: Segment, index: int, role: str, is_reasoning: bool = False) -> str:
        self.said.append(Said(segment, index, role, is_reasoning))
        return f"x{NONCE}n{len(self.said) - 1}x"


def render_marked(
    render: Render, messages: Sequence[Message], *, answer: bool, special: re.Pattern[str] = NOTHING
) -> Rendered:
    """Render a conversation and tell the template's text from what was said.

    What the assistant has to say begins where a prompt for it would end: the space that a template
    puts before the first word is its own to say. ``special`` matches the tokenizer's special tokens.

    Raises:
        PromptError: the template refuses the conversation, loses track of what was said, or writes what
            precedes something that is learned otherwise than where it is asked for.
    """
    marks, turns, rendered = _followed(render, messages, answer, special)
    found = list(MARK.finditer(rendered))
    order = [int(match[1]) for match in found]
    missing = [i for i in range(len(marks.said)) if i not in order]
    if order != sorted(set(order)) or not all(marks.said[i].is_reasoning for i in missing):
        raise PromptError(
            f"the chat template was given {len(marks.said)} pieces of content and rendered"
            f" {', '.join(map(str, order)) or 'none'}: it drops, repeats or reorders what was said. Expected"
            " each once, in order; choose another processor.template."
        )
    for i in missing:
        _check_left_out(render, marks.said[i], turns, f"x{NONCE}n{i}x")
    said = [marks.said[i] for i in order]
    starts = [0, *(match.end() for match in found)]
    ends = [*(match.start() for match in found), len(rendered)]
    speech = {}
    for k, each in enumerate(said):
        if each.role != "assistant":
            continue
        if isinstance(each.segment, ImageTarget) and each.segment.supervised:
            asked = _drawing_prompt(render, turns, each.message, found[k][0])
            _check_prefix(render, marks, each, rendered[: ends[k]], asked)
        if k == 0 or said[k - 1].message != each.message:
            prompt = _answer_prompt(render, turns[: each.message])
            if prompt is not None and isinstance(each.segment, Text) and each.segment.supervised:
                _check_prefix(render, marks, each, rendered[: ends[k]], prompt, whole=False)
            begins = prompt is not None and rendered[: ends[k]].startswith(prompt)
            start = len(prompt) if prompt and begins else ends[k]
            speech[each.message] = max(start - starts[k], 0)
    return Rendered(said, [rendered[start:end] for start, end in zip(starts, ends, strict=True)], speech)


def _followed(
    render: Render, messages: Sequence[Message], answer: bool, special: re.Pattern[str]
) -> tuple[Marks, list[Turn], str]:
    """Render marks that come out as the words would, around tags where the template looks for those.

    Raises:
        PromptError: the template refuses the conversation, or writes something else for the words.
    """
    ways: list[Sequence[str]] = [(), render.searched] if render.searched else [()]
    tokens = _tokens_among(render.searched, special)
    texts = [s.text for m in messages if m.role == "assistant" for s in m.content if isinstance(s, Text)]
    if any(token in text for token in tokens for text in texts):
        ways.insert(0, tokens)  # as tokens, which they are where the template itself writes them
    for tags in ways:
        marks = Marks(tags, special)
        turns = [marks.turn(message, i) for i, message in enumerate(messages)]
        real = [{key: marks.reveal(value) for key, value in turn.items()} for turn in turns]
        expected = render(real, answer)
        try:
            rendered = render(turns, answer)
        except PromptError:  # it misses something in the words
            if tags == ways[-1]:
                raise
            continue
        if marks.reveal(rendered) == expected:
            return marks, turns, rendered
    raise PromptError(
        "the chat template rewrites what was said, and cannot be followed. Expected messages to be rendered"
        " as they are; take out what the template looks for (reasoning tags, say) or choose another"
        " processor.template."
    )


def _tokens_among(strings: Sequence[str], special: re.Pattern[str]) -> list[str]:
    """Return the special tokens among what a template looks for, and those that open what they close."""
    opening = [f"<{string[2:]}" for string in strings if string.startswith("</")]
    return [string for string in dict.fromkeys([*strings, *opening]) if special.fullmatch(string)]


def _answer_prompt(render: Render, turns: Sequence[Turn]) -> str | None:
    """Return the prompt for the next answer; None where nothing was asked before it."""
    if not any(turn["role"] == "user" for turn in turns):
        return None
    return render(turns, True)


def _drawing_prompt(render: Render, turns: Sequence[Turn], index: int, mark: str) -> str:
    """Return what precedes an image in message ``index`` when it is asked for: nothing follows it then."""
    content = turns[index]["content"]
    content = content[: content.index(mark) + len(mark)]
    return render([*turns[:index], {**turns[index], "content": content}], False).partition(mark)[0]


def _check_prefix(
    render: Render, marks: Marks, said: Said, trained: str, asked: str, *, whole: bool = True
) -> None:
    """Hold what precedes a learned segment in training against what precedes it when it is asked for.

    Raises:
        PromptError: they differ (``whole``), or the second is no beginning of the first.
    """
    if trained == asked or (not whole and trained.startswith(asked)):
        return
    trained, asked = marks.reveal(trained), marks.reveal(asked)
    same = next(i for i in range(len(trained) + 1) if trained[i : i + 1] != asked[i : i + 1])
    at = max(same - 30, 0)
    dots = "..." if at else ""
    what = "answer" if isinstance(said.segment, Text) else "image to draw"
    raise PromptError(
        f"the chat template writes what precedes the {what} of message {said.message} otherwise in training"
        f" than where it is asked for:\n"
        f"  trained: {dots}{trained[at : at + 120]!r}\n"
        f"  asked:   {dots}{asked[at : at + 120]!r}\n"
        f"{_remedy(render, is_last=said.message == marks.said[-1].message)}"
    )


def _check_left_out(render: Render, said: Said, turns: Sequence[Turn], mark: str) -> None:
    """Allow a template to leave out earlier reasoning that is only read.

    Raises:
        PromptError: it would be learned, or the template never writes ``reasoning_content``.
    """
    assert isinstance(said.segment, Text)
    if said.segment.supervised:
        raise PromptError(
            f"the chat template leaves out reasoning of message {said.message}, which cannot be learned so:"
            f" {said.segment.text[:60]!r}. Expected it to be rendered; make the turn the last of a sample,"
            " leave the reasoning out, or choose another processor.template."
        )
    if mark in turns[said.message].get("reasoning_content", "") and mark not in render(
        turns[: said.message + 1], False
    ):
        raise PromptError(
            f"the chat template never writes reasoning_content, which message {said.message} has. Leave it"
            " out, or choose another processor.template."
        )


def _remedy(render: Render, *, is_last: bool) -> str:
    reads = ", ".join(render.reads)
    variables = f"set processor.template_variables (it reads {reads}), " if reads else ""
    last = "" if is_last else "make what is learned the last turn of a sample, "
    return (
        f"Expected the second to be a beginning of the first: {variables}{last}change the tokenizer's"
        " chat_template.jinja, or choose another processor.template."
    )


def _any_of(strings: Sequence[str]) -> re.Pattern[str]:
    """Match any of some strings as a group, the longest first."""
    choices = "|".join(map(re.escape, sorted(strings, key=len, reverse=True)))
    return re.compile(f"({choices})") if choices else re.compile(r"((?!))")

"""Streams the text of an answer: only whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from janus_modular.processing.text_tokenizer import TextSpan, TextTokenizer

REPLACEMENT = "\ufffd"  # what a decoder writes for an incomplete or invalid character


@dataclass(frozen=True)
class StopRule:
    """When an answer ends: at one of these ids, or before one of these strings."""

    ids: tuple[int, ...]
    strings: tuple[str, ...] = ()

    @classmethod
    def after(
        cls, text: str, spans: Sequence[TextSpan], tokenizer: TextTokenizer, stop_strings: Sequence[str]
    ) -> StopRule:
        """Return a template's rule, for the spans of a conversation whose last answer is ``text``.

        An answer ends at EOS, before the template's stop strings, and at the special token behind the answer.
        """
        answer = max(i for i, span in enumerate(spans) if span.text == text)
        behind = next((span for span in spans[answer + 1 :] if span.text.strip()), None)
        ends = [behind.text] if behind and behind.special else []
        strings = [tokenizer.names["eos"], *ends, *stop_strings]
        ids = {string: tokenizer.core.token_to_id(string) for string in strings if string}
        return cls(
            tuple(dict.fromkeys(id for id in ids.values() if id is not None)),
            tuple(string for string, id in ids.items() if id is None),
        )


class TextStream:
    """Turns the tokens of one answer into text as they come.

    Text that may still change is held back: bytes of an incomplete character, and text that may be the
    beginning of a stop string.
    """

    def __init__(self, tokenizer: TextTokenizer, stop: StopRule | None = None) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop or StopRule(())
        self._ids: list[int] = []
        self._start = 0  # decoding starts here, before the ids that are new: spaces depend on earlier ids
        self._decoded = 0  # the ids before this index are in the text
        self._text = ""  # decoded, and not yet returned

    def is_stop(self, id: int) -> bool:
        """Return True if the answer ends at this id."""
        return id in self._stop.ids

    def push(self, id: int) -> str:
        """Take the next token; return the text that will not change."""
        if self.stopped:
            return ""
        if self.is_stop(id):
            self.stopped = True
            return self._flush()
        self._ids.append(id)
        self._decode(final=False)
        return self._release(hold=True)

    def finish(self) -> str:
        """Return the text that was held back; the answer ends here."""
        if self.stopped:
            return ""
        self.stopped = True
        return self._flush()

    def _flush(self) -> str:
        self._decode(final=True)
        return self._release(hold=False)

    def _decode(self, *, final: bool) -> None:
        before = self._tokenizer.decode(self._ids[self._start : self._decoded])
        text = self._tokenizer.decode(self._ids[self._start :])
        waiting = len(self._ids) - self._decoded
        if final or not text.endswith(REPLACEMENT) or waiting > 8:  # no character has more than four bytes
            self._text += text[len(before) :]
            self._start, self._decoded = self._decoded, len(self._ids)

    def _release(self, *, hold: bool) -> str:
        """Return text up to a stop string, or with ``hold`` up to what may become a stop string."""
        ends = [index for s in self._stop.strings if (index := self._text.find(s)) >= 0]
        if ends:
            self.stopped = True
            text, self._text = self._text[: min(ends)], ""
            return text
        keep = 0
        if hold:
            starts = {s[:n] for s in self._stop.strings for n in range(1, len(s))}
            keep = max((len(s) for s in starts if self._text.endswith(s)), default=0)
        end = len(self._text) - keep
        text, self._text = self._text[:end], self._text[end:]
        return text

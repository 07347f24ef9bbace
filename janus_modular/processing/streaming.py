"""Text as it is being said: token by token, never half a letter, and no further than a stop."""

from __future__ import annotations

from dataclasses import dataclass

from janus_modular.processing.text_tokenizer import TextTokenizer

HALF = "\ufffd"  # what a decoder writes for bytes that are no letter (yet)


@dataclass(frozen=True)
class StopRule:
    """When an answer is over: at one of these ids, or before one of these strings."""

    ids: tuple[int, ...]
    strings: tuple[str, ...] = ()


class TextStream:
    """Turns the tokens of one answer into text as they come.

    Held back is what may still change: bytes of an unfinished letter, and text that may be the
    beginning of a stop string.
    """

    def __init__(self, tokenizer: TextTokenizer, stop: StopRule | None = None) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop or StopRule(())
        self._ids: list[int] = []
        self._from = 0  # decoding starts here, a finished stretch earlier: spaces depend on what precedes
        self._done = 0  # ids before this one are in the text
        self._text = ""  # decoded, and not yet given out

    def push(self, id: int) -> str:
        """Take the next token and return what can be shown now."""
        if self.stopped:
            return ""
        if id in self._stop.ids:
            self.stopped = True
            return self._flush()
        self._ids.append(id)
        self._decode(final=False)
        return self._release(hold=True)

    def finish(self) -> str:
        """Return what was held back; the answer ends here."""
        if self.stopped:
            return ""
        self.stopped = True
        return self._flush()

    def _flush(self) -> str:
        self._decode(final=True)
        return self._release(hold=False)

    def _decode(self, *, final: bool) -> None:
        before = self._tokenizer.decode(self._ids[self._from : self._done])
        text = self._tokenizer.decode(self._ids[self._from :])
        waiting = len(self._ids) - self._done
        if final or not text.endswith(HALF) or waiting > 8:  # no letter has more than four bytes
            self._text += text[len(before) :]
            self._from, self._done = self._done, len(self._ids)

    def _release(self, *, hold: bool) -> str:
        """Give out text up to a stop string, or (``hold``) up to what may become one."""
        ends = [at for s in self._stop.strings if (at := self._text.find(s)) >= 0]
        if ends:
            self.stopped = True
            shown, self._text = self._text[: min(ends)], ""
            return shown
        keep = 0
        if hold:
            starts = {s[:n] for s in self._stop.strings for n in range(1, len(s))}
            keep = max((len(s) for s in starts if self._text.endswith(s)), default=0)
        cut = len(self._text) - keep
        shown, self._text = self._text[:cut], self._text[cut:]
        return shown

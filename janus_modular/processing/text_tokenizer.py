"""Text to ids and back, on a ``tokenizer.json``. The text of messages cannot become a special token.

Special tokens are found by their strings, since ids differ between releases. A prompt is encoded in one call,
so that the vocabulary decides where text is split. A second tokenizer is kept for that: special tokens are
plain text to it, and private stand-ins, which no text can contain, have their place and their flags (such as
which spaces they absorb).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from janus_modular.errors import ConfigError, PromptError
from janus_modular.foreign import foreign_errors, printable

TOKENIZER_HINT = "Check the tokenizer's tokenizer.json, or leave the text out."


@dataclass(frozen=True)
class TextSpan:
    """A span of a prompt: text, or the string of one special token."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class Encoded:
    """Ids, and the first and the last span from which the characters of each id come."""

    ids: NDArray[np.int64]  # (T,)
    first: NDArray[np.int64]  # (T,) index of a span
    last: NDArray[np.int64]  # (T,)


class TextTokenizer:
    """A tokenizer with its special tokens by name; see `tokenizer_files.load_tokenizer`."""

    def __init__(
        self,
        core: Tokenizer,
        names: dict[str, str | None],
        *,
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
        adds_bos: bool = False,
        added: Sequence[str] = (),
    ) -> None:
        core.no_padding()
        core.no_truncation()
        self.core = core
        self.names = names  # bos, eos, pad, begin_image, end_image, placeholder -> string
        self.config = config or {}  # tokenizer_config.json, as it was read
        self.chat_template = chat_template
        self.adds_bos = adds_bos  # whether this tokenizer starts a text with BOS
        self.added = tuple(added)  # special tokens that its vocabulary lacked

    @property
    def vocab_size(self) -> int:
        """The rows that the backbone's embedding must have."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    def id_of(self, string: str) -> int:
        """Return the id of a token by its string; KeyError where there is none."""
        id = self.core.token_to_id(string)
        if id is None:
            raise KeyError(string)
        return id

    def special_id(self, name: str) -> int | None:
        """Return the id of a special token by its name (``bos``, ``placeholder`` ...), None without one."""
        string = self.names.get(name)
        return None if string is None else self.id_of(string)

    @cached_property
    def special(self) -> dict[str, int]:
        """Ids by string: of the tokens that the tokenizer marks as special, and of the named ones."""
        added = self.core.get_added_tokens_decoder()
        strings = [token.content for token in added.values() if token.special]
        return {s: self.id_of(s) for s in dict.fromkeys([*strings, *filter(None, self.names.values())])}

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """A pattern that matches any special token, the longest first."""
        return re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or r"(?!)")

    def split_at_special_tokens(self, text: str) -> list[TextSpan]:
        """Split a template's text at its special tokens; never to be called with the text of messages."""
        spans, start = [], 0
        for match in self.special_pattern.finditer(text):
            spans += [TextSpan(text[start : match.start()]), TextSpan(match[0], special=True)]
            start = match.end()
        return [span for span in [*spans, TextSpan(text[start:])] if span.text]

    def encode(self, spans: Sequence[TextSpan]) -> Encoded:
        """Encode a prompt; only spans that are special become special tokens.

        Raises:
            PromptError: a special token is lost, or a text can be encoded only as a special token.
        """
        strings = [self._stand_ins[span.text] if span.special else span.text for span in spans]
        text = "".join(strings)
        ids, offsets = self._encode(text)
        if not self._special_only_ids.isdisjoint(ids):
            ids, offsets = self._spell_out(ids, offsets, text)
        token_ids = np.array(ids, np.int64)
        start, end = np.array(offsets, np.int64).reshape(-1, 2).T
        span_of = np.repeat(np.arange(len(strings)), [len(string) for string in strings])  # (characters,)
        span_of = np.append(span_of, len(strings) - 1)
        first, last = span_of[start], span_of[np.maximum(start, end - 1)]
        is_stand_in = token_ids >= self._first_stand_in
        specials = [i for i, span in enumerate(spans) if span.special]
        if is_stand_in.sum() != len(specials):
            raise PromptError(
                f"the template has {len(specials)} special tokens, and {is_stand_in.sum()} were encoded: the"
                " tokenizer takes one of them only as a separate word. Put spaces around it in the template."
            )
        token_ids[is_stand_in] = self._special_ids[token_ids[is_stand_in] - self._first_stand_in]
        first[is_stand_in] = last[is_stand_in] = specials
        return Encoded(token_ids, first, last)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without special tokens.

        Raises:
            PromptError: the tokenizer's decoder fails on them.
        """
        hidden = set(self.special.values())
        visible = [int(id) for id in ids if id not in hidden]
        with foreign_errors(f"the tokens {visible[:8]}", PromptError, TOKENIZER_HINT):
            return self.core.decode(visible, skip_special_tokens=False)

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids and offsets of a text in which stand-ins are the only special tokens.

        Raises:
            PromptError: the text is not Unicode, or the tokenizer fails on it.
        """
        if surrogate := re.search(r"[\ud800-\udfff]", text):
            raise PromptError(
                f"the text holds {surrogate[0]!r}, which is no character; expected Unicode. Read it as UTF-8."
            )
        with foreign_errors(f"the text '{printable(text, 60)}'", PromptError, TOKENIZER_HINT):
            encoding = self._plain.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets

    @cached_property
    def _nonce(self) -> str:
        return secrets.token_hex(8)

    @cached_property
    def _stand_ins(self) -> dict[str, str]:
        return {string: f"<{self._nonce}:{i}>" for i, string in enumerate(self.special)}

    @cached_property
    def _special_ids(self) -> NDArray[np.int64]:
        return np.array(list(self.special.values()), np.int64)

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer for which special tokens are text, and the stand-ins are tokens."""
        parsed = json.loads(self.core.to_str())
        parsed["post_processor"] = None  # it adds tokens, and trims spaces off the offsets
        added_tokens = {token["content"]: token for token in parsed["added_tokens"]}
        for string in self.special:
            added_tokens[string]["special"] = True
        plain = Tokenizer.from_str(json.dumps(parsed))
        plain.encode_special_tokens = True
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        plain.add_tokens(
            [
                AddedToken(stand_in, special=False, **{flag: added_tokens[string][flag] for flag in flags})
                for string, stand_in in self._stand_ins.items()
            ]
        )
        return plain

    @cached_property
    def _first_stand_in(self) -> int:
        """The id of the first stand-in; the others follow in the order of ``special``."""
        ids = [self._plain.token_to_id(stand_in) for stand_in in self._stand_ins.values()]
        if ids != list(range(self.vocab_size, self.vocab_size + len(ids))):
            raise ConfigError(
                "the tokenizer's ids have gaps, so that no token can be added. Renumber the ids without gaps."
            )
        return self.vocab_size

    @cached_property
    def _special_only_ids(self) -> set[int]:
        """Ids that text must not become, though a vocabulary (Unigram, for example) may allow it.

        The tokens of unknown characters and of bytes are text, even where a tokenizer marks them as special.
        """
        unknown = (self.config.get("unk_token"), "<unk>", "[UNK]")
        return {
            id
            for s, id in self.special.items()
            if s not in unknown and not re.fullmatch("<0x[0-9A-F]{2}>", s)
        }

    def _spell_out(
        self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode text that would become a special token character by character."""
        new_ids: list[int] = []
        new_offsets: list[tuple[int, int]] = []
        for id, (start, end) in zip(ids, offsets, strict=True):
            spelt = [id]
            if id in self._special_only_ids:
                characters = [self._encode(c)[0] for c in text[start:end]]
                spelt = [inner for character in characters for inner in character]
                if not spelt or not self._special_only_ids.isdisjoint(spelt):
                    raise PromptError(
                        f"the tokenizer has no other spelling of {text[start:end]!r} than a special token. "
                        "Take it out of the text."
                    )
            new_ids += spelt
            new_offsets += [(start, end)] * len(spelt)
        return new_ids, new_offsets

"""Words to ids and back, on a ``tokenizer.json``, in which nobody's words can become a special token.

Special tokens are found by their strings; ids differ between releases. A prompt is encoded in one call,
so that what belongs together is cut as the vocabulary wants it. For that, a second tokenizer is kept,
in which every special token is plain text, and in its place stands a private stand-in with the same
habits (which spaces it swallows), that no text can contain.
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


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt: text, or one special token by its string."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class Encoded:
    """Ids, and the pieces that the characters of each come from: ``first`` to ``last``, both included."""

    ids: NDArray[np.int64]  # (T,)
    first: NDArray[np.int64]  # (T,) index of a piece
    last: NDArray[np.int64]  # (T,)


class TextTokenizer:
    """A tokenizer with its special tokens by name. Made by ``tokenizer_files.load_tokenizer``."""

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
        """Rows that the backbone's embedding must have."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    def id_of(self, string: str) -> int:
        """Return the id of a token by its string; KeyError where there is none."""
        id = self.core.token_to_id(string)
        if id is None:
            raise KeyError(string)
        return id

    def named(self, name: str) -> int | None:
        """Return the id of a special token by its name (``bos``, ``placeholder`` ...), None without one."""
        string = self.names.get(name)
        return None if string is None else self.id_of(string)

    @cached_property
    def special(self) -> dict[str, int]:
        """Special tokens, string to id: those the tokenizer marks as special, and the named ones."""
        added = self.core.get_added_tokens_decoder()
        strings = [token.content for token in added.values() if token.special]
        return {s: self.id_of(s) for s in dict.fromkeys([*strings, *filter(None, self.names.values())])}

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches any special token, the longest first."""
        return re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or r"(?!)")

    def cut(self, text: str) -> list[Piece]:
        """Cut a TEMPLATE's text at its special tokens. Never call it on anybody's words."""
        pieces, at = [], 0
        for match in self.special_pattern.finditer(text):
            pieces += [Piece(text[at : match.start()]), Piece(match[0], special=True)]
            at = match.end()
        return [piece for piece in [*pieces, Piece(text[at:])] if piece.text]

    def encode(self, pieces: Sequence[Piece]) -> Encoded:
        """Encode a prompt: text as text, whatever it says; special tokens where the pieces say so.

        Raises:
            PromptError: a special token did not survive, or a text cannot be kept from becoming one.
        """
        strings = [self._stand_ins[piece.text] if piece.special else piece.text for piece in pieces]
        text = "".join(strings)
        try:
            encoding = self._plain.encode(text, add_special_tokens=False)
        except TypeError as error:
            half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
            if half is None:  # not from bytes that are no UTF-8
                raise
            raise PromptError(
                f"the text holds {half!r}, which is no letter: expected Unicode. Was it read as UTF-8?"
            ) from error
        ids, spans = encoding.ids, encoding.offsets
        if not self._forbidden.isdisjoint(ids):
            ids, spans = self._spell_out(ids, spans, text)
        own = np.array(ids, np.int64)
        start, end = np.array(spans, np.int64).reshape(-1, 2).T
        owner = np.repeat(np.arange(len(strings)), [len(string) for string in strings])  # (letters,)
        owner = np.append(owner, len(strings) - 1)
        first, last = owner[start], owner[np.maximum(start, end - 1)]
        at = own >= self._first_stand_in
        specials = [i for i, piece in enumerate(pieces) if piece.special]
        if at.sum() != len(specials):
            raise PromptError(
                f"{len(specials)} special tokens were put in, and {at.sum()} came out: the tokenizer wants "
                "one of them as a word of its own. Put spaces around it in the template."
            )
        own[at] = self._special_ids[own[at] - self._first_stand_in]
        first[at] = last[at] = specials
        return Encoded(own, first, last)

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text, special tokens left out."""
        hidden = set(self.special.values())
        return self.core.decode([int(id) for id in ids if id not in hidden], skip_special_tokens=False)

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
        habits = {token["content"]: token for token in parsed["added_tokens"]}
        for string in self.special:
            habits[string]["special"] = True
        plain = Tokenizer.from_str(json.dumps(parsed))
        plain.encode_special_tokens = True
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        plain.add_tokens(
            [
                AddedToken(stand_in, special=False, **{flag: habits[string][flag] for flag in flags})
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
                "the tokenizer's ids have gaps, so that no token can be added. Number them through."
            )
        return self.vocab_size

    @cached_property
    def _forbidden(self) -> set[int]:
        """Ids that text must not become, though the vocabulary would let it (a Unigram one may).

        Unknown letters and single bytes are text, even where a tokenizer marks their tokens as special.
        """
        unknown = (self.config.get("unk_token"), "<unk>", "[UNK]")
        return {
            id
            for s, id in self.special.items()
            if s not in unknown and not re.fullmatch("<0x[0-9A-F]{2}>", s)
        }

    def _spell_out(
        self, ids: Sequence[int], spans: Sequence[tuple[int, int]], text: str
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode letter by letter what would have become a special token."""
        new_ids: list[int] = []
        new_spans: list[tuple[int, int]] = []
        for id, (start, end) in zip(ids, spans, strict=True):
            spelt = [id]
            if id in self._forbidden:
                letters = [self._plain.encode(c, add_special_tokens=False).ids for c in text[start:end]]
                spelt = [each for letter in letters for each in letter]
                if not spelt or not self._forbidden.isdisjoint(spelt):
                    raise PromptError(
                        f"the tokenizer has no other spelling of {text[start:end]!r} than a special token. "
                        "Take it out of the text."
                    )
            new_ids += spelt
            new_spans += [(start, end)] * len(spelt)
        return new_ids, new_spans

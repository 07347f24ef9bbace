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
from tokenizers import AddedToken, Tokenizer

from janus_modular.errors import PromptError


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt: text, or one special token by its string."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class Token:
    """An id, and the pieces that its characters come from: ``first`` to ``last``, both included."""

    id: int
    first: int
    last: int


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

    def encode(self, pieces: Sequence[Piece]) -> list[Token]:
        """Encode a prompt: text as text, whatever it says; special tokens where the pieces say so.

        Raises:
            PromptError: a special token did not survive, or a text cannot be kept from becoming one.
        """
        text, starts, specials = "", [], []
        for i, piece in enumerate(pieces):
            starts.append(len(text))
            text += self._stand_ins[piece.text] if piece.special else piece.text
            specials += [i] if piece.special else []
        encoding = self._plain.encode(text, add_special_tokens=False)
        owner = _owners(starts, len(text))
        tokens = []
        expected = iter(specials)
        for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id in self._stood_for:
                i = next(expected)
                tokens.append(Token(self._stood_for[id], i, i))
            else:
                first, last = owner[start], owner[max(start, end - 1)]
                ids = self._spelt(text[start:end]) if id in self._forbidden else [id]
                tokens += [Token(id, first, last) for id in ids]
        if next(expected, None) is not None:
            raise PromptError(
                f"special tokens got lost beside other text: {len(specials)} were put in. The tokenizer "
                "wants one of them as a single word; put spaces around it in the template."
            )
        return tokens

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
    def _stood_for(self) -> dict[int, int]:
        """Id of a stand-in -> id of its special token."""
        ids = self._plain.get_vocab(with_added_tokens=True)
        return {ids[stand_in]: self.special[string] for string, stand_in in self._stand_ins.items()}

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

    def _spelt(self, text: str) -> list[int]:
        """Encode a text that happens to be a special token's string letter by letter."""
        ids = [id for letter in text for id in self._plain.encode(letter, add_special_tokens=False).ids]
        if self._forbidden.intersection(ids) or not text:
            raise PromptError(
                f"the tokenizer has no other spelling of {text!r} than a special token. "
                "Take it out of the text."
            )
        return ids


def _owners(starts: Sequence[int], length: int) -> list[int]:
    """Return for each character, and for the end, the piece that it belongs to."""
    owners: list[int] = np.repeat(np.arange(len(starts)), np.diff([*starts, length])).tolist()
    return [*owners, max(len(starts) - 1, 0)]

"""A tokenizer without training: one id a byte, then the special tokens. For demos and tiny models."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def byte_tokenizer(special: list[str]) -> Tokenizer:
    """Build it: id 0 to 255 is the byte itself, ``special`` follow in order."""
    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return tokenizer


def _letters() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies (as in GPT-2's).

    Bytes that print in Latin-1 stand for themselves; the others take the letters from U+0100 on.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(spare)) for byte in range(256)]

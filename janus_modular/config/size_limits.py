"""Limits of the whole numbers in a model's config, checked before anything is built.

A config decides how many modules are built and how large they are, and it may come from an untrusted source.
Numbers that no model has are errors that name their key; `janus_modular.model.build` also counts weights
while a model is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from janus_modular.config import to_plain
from janus_modular.config.errors import FieldError, config_error

MAX_LAYERS = 1_000
"""The depth of the deepest published transformers; a layer takes milliseconds to build, without weights."""

MAX_NUMBER = 2**40
"""Above every size of a model; RoPE bases for very long contexts reach 5e10."""

LAYERS = re.compile(r"(?:layer|depth|block)s?(?:\[\d+\])?$")
"""Keys that count layers, alone or in a list: ``num_hidden_layers``, ``depths[0]``; not ``block_ff_dim``."""


def check_numbers(config: Any, root: str = "") -> None:
    """Check that no whole number of a config exceeds its limit; ``root`` is its path in the user's config.

    Raises:
        ConfigError: lists every key with a number that no model has.
    """
    errors = []
    for path, number in numbers_in(to_plain(config), root):
        key = path.rpartition(".")[2]
        most = MAX_LAYERS if LAYERS.search(key) and "size" not in key else MAX_NUMBER
        if abs(number) > most:
            errors.append(FieldError(path, f"found {_short(number)}", f"at most {most:,}"))
    if errors:
        raise config_error(errors)


def numbers_in(tree: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Yield each whole number in mappings and lists with its path: ``backbone.config.hidden_size``."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from numbers_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from numbers_in(value, f"{path}[{index}]")
    elif isinstance(tree, int) and not isinstance(tree, bool):
        yield path, tree


def largest_numbers(config: Any, most: int = 3) -> str:
    """Return the largest whole numbers of a config with their keys, for errors about size."""
    ranked = sorted(numbers_in(to_plain(config)), key=lambda pair: -abs(pair[1]))[:most]
    return ", ".join(f"{path} {_short(number)}" for path, number in ranked)


def _short(number: int) -> str:
    return f"{number:,}" if abs(number) < 10**15 else f"a number of {number.bit_length()} bits"

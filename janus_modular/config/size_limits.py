"""Bounds on what a config may ask for, before anything of its size is built.

A config decides how many modules are made and how large they are, and it may come from anybody. Numbers that
no model has are refused by their key; `janus_modular.model.build` counts weights while a model is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from janus_modular.config import to_plain
from janus_modular.config.errors import FieldError, config_error

MAX_LAYERS = 1_000
"""As many as the deepest published transformers have; each takes milliseconds to build without weights."""

MAX_NUMBER = 2**40
"""No size of a model comes near; bases of rotary embeddings of very long contexts reach 5e10."""

LAYERS = re.compile(r"(?:layer|depth|block)s?(?:\[\d+\])?$")
"""Keys that count layers, alone or in a list: ``num_hidden_layers``, ``depths[0]``; not ``block_ff_dim``."""


def check_numbers(config: Any, root: str = "") -> None:
    """Refuse a config with a whole number that no model has; ``root`` is where it stands in the user's.

    Raises:
        ConfigError: a fault for each such key.
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
    """Return the largest whole numbers of a config, by key: what to look at where something is too large."""
    ranked = sorted(numbers_in(to_plain(config)), key=lambda pair: -abs(pair[1]))[:most]
    return ", ".join(f"{path} {_short(number)}" for path, number in ranked)


def _short(number: int) -> str:
    return f"{number:,}" if abs(number) < 10**15 else f"a number of {number.bit_length()} bits"

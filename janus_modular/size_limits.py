"""Bounds on what a config may ask for, before anything of its size is built.

A config decides how many modules are made and how large they are, and it may come from anybody. Numbers that
no model has are refused by their key; while a model is built, its weights are counted against the number in
the checkpoint, or against the machine's memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from janus_modular.config import to_plain
from janus_modular.config.errors import Fault, config_error
from janus_modular.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

MAX_TENSORS = 200_000
"""Most weights of a model where no checkpoint says how many; the largest have some tens of thousands."""

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
    faults = []
    for path, number in numbers_in(to_plain(config), root):
        key = path.rpartition(".")[2]
        most = MAX_LAYERS if LAYERS.search(key) and "size" not in key else MAX_NUMBER
        if abs(number) > most:
            faults.append(Fault(path, f"found {_short(number)}", f"at most {most:,}"))
    if faults:
        raise config_error(faults)


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


@contextmanager
def bounded_weights(most_tensors: int = MAX_TENSORS) -> Iterator[None]:
    """Stop building modules that have more weights than expected, or than fit into the machine's memory.

    Weights on the meta device take no memory, and are only counted.

    Raises:
        ConfigError: a module went beyond a limit; says which limit.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    memory = _physical_memory()
    tensors = size = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, size
        if parameter is None:
            return
        tensors += 1
        if not parameter.is_meta:
            size += parameter.numel() * parameter.element_size()
        if tensors > most_tensors:
            raise ConfigError(f"it has more than {most_tensors:,} weights, the most that are expected")
        if size > memory:
            raise ConfigError(
                f"its weights take more than {size / 1e9:,.1f} GB, and this machine has"
                f" {memory / 1e9:,.1f} GB of memory"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _physical_memory() -> float:
    """Return the bytes of this machine's memory; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _short(number: int) -> str:
    return f"{number:,}" if abs(number) < 10**15 else f"a number of {number.bit_length()} bits"

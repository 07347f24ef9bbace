"""A small decoder of the same family, to check before training what depends on the family alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

MAX_WEIGHTS = 150_000_000
"""Most weights of a small decoder: more would take seconds, and gigabytes."""


def small_decoder(family: PreTrainedConfig, build: Callable[[PreTrainedConfig, str | None], Any]) -> Any:
    """Build a decoder of one layer of each type, with random weights; None where that is large or fails.

    The state of the random generator stays as it is.
    """
    try:
        small = shortened(family)
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in build(small, None).parameters())
        if weights > MAX_WEIGHTS:
            return None
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            return build(small, None).float().eval()
    except Exception:  # a config that does not shrink this way: training checks the whole decoder
        return None


def shortened(family: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config of one narrow layer of each type, and of eight tokens."""
    small = copy.deepcopy(family)
    types = getattr(small, "layer_types", None)
    layers = max(map(types.index, types)) + 1 if types else 1
    if types:
        small.layer_types = types[:layers]
    for key in ("intermediate_size", "moe_intermediate_size", "ffn_dim"):  # of layers that mix no positions
        if isinstance(width := getattr(small, key, None), int):
            setattr(small, key, min(width, 64))
    small.num_hidden_layers, small.vocab_size = layers, 8
    small.bos_token_id = small.eos_token_id = small.pad_token_id = None
    return small

"""Image tokenizers: weights of layers that the config lacks are errors; unused weights are skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_modular import CheckpointError
from janus_modular.weights.files import Weights
from janus_modular.weights.loading import load_weights
from janus_plugins.image_tokenizers.fsq import FsqConfig, FsqTokenizer
from janus_plugins.image_tokenizers.ibq import IbqConfig, IbqTokenizer
from janus_plugins.image_tokenizers.llamagen import LlamaGenConfig, LlamaGenTokenizer
from janus_plugins.image_tokenizers.open_magvit2 import OpenMagvit2Config, OpenMagvit2Tokenizer
from janus_plugins.image_tokenizers.vqgan import VqganConfig, VqganTokenizer

SMALL: dict[str, Any] = {"channels": 8, "channel_multipliers": [1, 2], "residual_blocks": 1}
CODES: dict[str, Any] = {"latent_channels": 8, "num_codes": 16, "code_dim": 4}
MAKE: dict[str, Callable[[], Any]] = {
    "vqgan": lambda: VqganTokenizer(VqganConfig(**SMALL, **CODES)),
    "ibq": lambda: IbqTokenizer(IbqConfig(**SMALL, **CODES)),
    "llamagen": lambda: LlamaGenTokenizer(LlamaGenConfig(**SMALL, **CODES)),
    "fsq": lambda: FsqTokenizer(FsqConfig(**SMALL, factor=4, patch_size=2)),
    "open-magvit2": lambda: OpenMagvit2Tokenizer(OpenMagvit2Config(**SMALL)),
}


def file_of(
    name: str, tokenizer: Any, prefix: str, taming_weights: Callable[..., dict[str, Tensor]]
) -> dict[str, Tensor]:
    weights = taming_weights(tokenizer) if name in ("vqgan", "ibq") else tokenizer.state_dict()
    return {f"{prefix}{one}": weight for one, weight in weights.items()}


@pytest.mark.parametrize("prefix", ["", "model.tokenizer."])
@pytest.mark.parametrize("name", MAKE)
def test_a_layer_too_many_is_refused(name: str, prefix: str, taming_weights: Any) -> None:
    tokenizer = MAKE[name]()
    weights = file_of(name, tokenizer, prefix, taming_weights)
    load_weights(tokenizer, tokenizer.read_pretrained(weights)).check("the file")
    for stranger in ("decoder.extra.weight", "encoder.conv_in.scale"):
        offered = {**weights, f"{prefix}{stranger}": torch.zeros(1)}
        with pytest.raises(CheckpointError, match=rf"1 unexpected:\n +{stranger}"):
            load_weights(tokenizer, tokenizer.read_pretrained(offered)).check("the file")


@pytest.mark.parametrize("name", MAKE)
def test_other_parts_of_a_file_are_left_over(name: str, taming_weights: Any) -> None:
    tokenizer = MAKE[name]()
    held = file_of(name, tokenizer, "", taming_weights) | {"text.decoder.extra.weight": torch.zeros(1)}
    weights = Weights(None, {one: lambda x=x: x for one, x in held.items()})  # type: ignore[arg-type,misc]
    load_weights(tokenizer, tokenizer.read_pretrained(weights)).check("the file")
    assert weights.unexpected_keys() == ["text.decoder.extra.weight"]


def test_the_counts_of_a_codebook_of_averages_are_of_no_use(taming_weights: Any) -> None:
    tokenizer = MAKE["vqgan"]()
    counts = {f"quantize.embedding.{one}": torch.zeros(16) for one in ("cluster_size", "embed_avg")}
    weights = file_of("vqgan", tokenizer, "", taming_weights) | counts
    load_weights(tokenizer, tokenizer.read_pretrained(weights)).check("the file")

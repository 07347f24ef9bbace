"""The table of sizes in docs/how-to/image-sizes.md, against the components."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_modular.config import resolve
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import default_plugins

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "image-sizes.md"
ROW = r"^\| (image tokenizers|image autoencoders|understanding encoders) \| `(\S+)` \| ([^|]*) \|"
ROWS = re.findall(ROW, PAGE.read_text("utf-8"), re.MULTILINE)
CONVOLUTIONAL = {
    "channels": 8, "channel_multipliers": [1, 2], "residual_blocks": 1, "latent_channels": 8, "num_codes": 16,
    "code_dim": 4,
}  # fmt: skip
HF = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20,
    "patch_size": 8, "image_size": 32,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "vq": {"channels": [8, 8, 16], "num_codes": 16, "code_dim": 4},
    "llamagen": CONVOLUTIONAL,
    "vqgan": CONVOLUTIONAL,
    "ibq": CONVOLUTIONAL,
    "open-magvit2": {"channels": 8, "channel_multipliers": [1, 1, 2], "residual_blocks": 1, "bits": [2, 3]},
    "fsq": {
        "channels": 8, "channel_multipliers": [1, 2], "residual_blocks": 1, "patch_size": 2, "factor": 8,
        "latent_channels": 8, "levels": [4, 3],
    },
    "hf-vq": {
        "config": {
            "model_type": "emu3_vqgan", "base_channels": 32, "channel_multiplier": [1, 1], "hidden_size": 32,
            "num_res_blocks": 1, "attn_resolutions": [1], "codebook_size": 16,
        },
    },
    "autoencoder-kl": {"channels": 8, "channel_multipliers": [1, 2], "residual_blocks": 1},
    "vit": {"feature_dim": 16, "layers": 1, "heads": 2, "stem": [8, 8, 16]},
    "siglip": {
        "feature_dim": 16, "layers": 1, "heads": 2, "intermediate": 20, "patch_size": 8, "image_size": 32,
        "pixels": {"height": 32, "width": 32},
    },
    "hf-vision": {"config": {"model_type": "dinov2", **HF}},
    "tokenizer-features": {"height": 32, "width": 32, "tokenizer": {"name": "llamagen", **CONVOLUTIONAL}},
    "lora": {"encoder": {"name": "vit", "feature_dim": 16, "layers": 1, "heads": 2, "stem": [8, 8, 16]}},
    "joined": {
        "resize": "crop",
        "encoders": [
            {
                "name": "vit", "feature_dim": 16, "layers": 1, "heads": 2, "stem": [8, 8, 16],
                "pixels": {"height": 32, "width": 32},
            },
            {"name": "hf-vision", "config": {"model_type": "clip_vision_model", **HF}},
        ],
    },
}  # fmt: skip


def built(slot: str, name: str) -> Any:
    torch.manual_seed(0)
    plugins = default_plugins()
    config = resolve(OPTIONS[name], plugins.entry(slot, name).config)
    return ModelBuilder(plugins)(ComponentSpec(slot, name, config)).eval()


def factor_of(component: Any, slot: str) -> int:
    """Return the pixels of a side for one position, from the grid of an image of 64 x 64."""
    if slot == "image_autoencoders":
        return 64 // component.encoded_shape(64, 64)[1]
    return 64 // component.grid(64, 64)[0]


def test_the_table_has_a_row_for_each_component() -> None:
    for slot in ("image_tokenizers", "image_autoencoders", "understanding_encoders"):
        own = {info.name for info in default_plugins().entry_points if info.slot == slot}
        assert {name for kind, name, _ in ROWS if kind.replace(" ", "_") == slot} == own


@pytest.mark.parametrize(("kind", "name", "sizes"), ROWS, ids=[name for _, name, _ in ROWS])
@torch.no_grad()
def test_a_component_takes_the_sizes_of_the_table(kind: str, name: str, sizes: str) -> None:
    slot = kind.replace(" ", "_")
    component = built(slot, name)
    factor = factor_of(component, slot)
    height, width = 3 * factor, 5 * factor
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    off = torch.nn.functional.pad(pixels, (1, 0))
    if slot == "understanding_encoders":
        assert component.grid(height, width) == (3, 5)
        features = component(pixels.abs())
        assert features.shape == (1, 15, component.feature_dim)
        if sizes.startswith("whole patches"):
            assert component.grid(height, width + 1) == (3, 5)
            assert component(off).shape == features.shape
            return
    elif slot == "image_tokenizers":
        assert component.grid(height, width) == (3, 5)
        codes = component.encode(pixels)
        assert codes.shape[:2] == (1, 15)
        assert component.decode(codes, height=height, width=width).shape == pixels.shape
    else:
        encoded = component.encode(pixels)
        assert encoded.shape[2:] == (3, 5)
        assert component.decode(encoded, height=height, width=width).shape == pixels.shape
    assert sizes.startswith(("multiples of its factor", "those of "))
    size = component.encoded_shape if slot == "image_autoencoders" else component.grid
    with pytest.raises(ValueError, match=f"{height}x{width + 1}|grid"):
        size(height, width + 1)

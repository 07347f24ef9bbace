"""The built-in components, tested by the contract classes that plugin authors use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_modular.config import resolve
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import default_plugins
from janus_modular.testing import (
    BackboneContract,
    GenerationPathContract,
    HeadContract,
    ImageSamplerContract,
    SamplingExample,
    SourceContract,
    TextSamplerContract,
    parametrize_with_checks,
)
from janus_modular.testing.examples import NumpySession, prompt
from janus_plugins.heads.factorized import FactorizedHead, FactorizedHeadConfig
from janus_plugins.heads.mlp import MlpHead, MlpHeadConfig
from janus_plugins.samplers.autoregressive import DrawSettings, draw
from janus_plugins.samplers.parallel import ParallelSettings
from janus_plugins.samplers.parallel import draw as draw_in_parallel
from janus_plugins.samplers.prompt_lookup import PromptLookupSettings
from janus_plugins.samplers.prompt_lookup import sample_text as sample_text_by_lookup
from janus_plugins.samplers.text import TextSettings, sample_text
from janus_plugins.sources.digits import Digits, DigitsConfig
from janus_plugins.trackers.jsonl import JsonlConfig, JsonlTracker
from janus_plugins.trackers.tensorboard import TensorboardConfig, TensorboardTracker

EXAMPLE = Path(__file__).parents[2] / "plugins" / "examples" / "efficientnet_lite0.py"
HF = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
    "patch_size": 8,
}  # fmt: skip
LLAMAGEN = {
    "name": "llamagen", "channels": 8, "channel_multipliers": [1, 2], "residual_blocks": 1,
    "latent_channels": 8, "num_codes": 16, "code_dim": 4,
}  # fmt: skip
VQGAN = {**LLAMAGEN, "name": "vqgan"}
IBQ = {**LLAMAGEN, "name": "ibq"}
EMU3 = {
    "name": "hf-vq",
    "config": {
        "model_type": "emu3_vqgan", "base_channels": 32, "channel_multiplier": [1, 1], "hidden_size": 32,
        "num_res_blocks": 1, "attn_resolutions": [1], "codebook_size": 16,
    },
}  # fmt: skip
VQ = {"name": "vq", "channels": [8, 8, 16], "num_codes": 16, "code_dim": 4, "continuous_steps": 0}
PERCEIVER = {"name": "perceiver", "queries": 3, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4}
OPEN_MAGVIT2 = {
    "name": "open-magvit2",
    "channels": 8,
    "channel_multipliers": [1, 1, 2],
    "residual_blocks": 1,
    "bits": [2, 3],
}
FSQ = {
    "name": "fsq", "channels": 8, "channel_multipliers": [1, 2], "residual_blocks": 1, "patch_size": 2,
    "factor": 8, "latent_channels": 8, "levels": [4, 3],
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "siglip": {
        "name": "siglip", "feature_dim": 16, "layers": 2, "heads": 2, "intermediate": 20, "patch_size": 8,
        "image_size": 32, "pixels": {"height": 32, "width": 32},
    },
    "vit": {"name": "vit", "feature_dim": 16, "layers": 1, "heads": 2, "stem": [8, 8, 16]},
    "siglip2": {
        "name": "hf-vision", "config": {"model_type": "siglip2_vision_model", "num_patches": 16, **HF},
    },
    "clip": {"name": "hf-vision", "config": {"model_type": "clip_vision_model", "image_size": 32, **HF}},
    "dinov2": {"name": "hf-vision", "config": {"model_type": "dinov2", "image_size": 32, **HF}},
    **{
        kind: {"name": "hf-vision", "config": {"model_type": kind, "image_size": 32, **HF}}
        for kind in ("dinov2_with_registers", "aimv2_vision_model", "ijepa")
    },
    "dinov3_vit": {  # with registers, as published: without, transformers has an empty parameter
        "name": "hf-vision",
        "config": {"model_type": "dinov3_vit", "image_size": 32, "num_register_tokens": 4, **HF},
    },
    "shared": {"name": "tokenizer-features", "height": 32, "width": 32, "tokenizer": LLAMAGEN},
    "bits": {"name": "tokenizer-features", "height": 32, "width": 32, "tokenizer": OPEN_MAGVIT2},
    "joined": {
        "name": "joined",
        "resize": "crop",
        "encoders": [
            {"name": "vit", "feature_dim": 16, "layers": 1, "heads": 2, "stem": [8, 8, 16]},
            {
                "name": "hf-vision",  # in another size of its own
                "config": {"model_type": "clip_vision_model", "image_size": 28, **HF, "patch_size": 7},
            },
        ],
    },
    "efficientnet": {"name": "efficientnet-lite0", "height": 32, "width": 32},
}  # fmt: skip
ENCODERS["lora"] = {"name": "lora", "rank": 2, "encoder": ENCODERS["siglip"]}
Make = Callable[[], tuple[Any, Tensor]]


def built(slot: str, raw: dict[str, Any], *neighbours: Any) -> Any:
    """Build a component from what its YAML would say."""
    torch.manual_seed(0)
    plugins = default_plugins()
    if raw["name"] == "efficientnet-lite0":
        plugins.add_file(EXAMPLE)
    entry = plugins.entry(slot, raw["name"])
    config = resolve({key: value for key, value in raw.items() if key != "name"}, entry.config)
    return ModelBuilder(plugins)(ComponentSpec(slot, raw["name"], config), *neighbours)


def pixels(rows: int = 2, size: int = 32) -> Tensor:
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@parametrize_with_checks(
    "understanding_encoders",
    {
        name: lambda raw=raw: (built("understanding_encoders", raw), pixels())
        for name, raw in ENCODERS.items()
    },
    expected_failures={
        "clip": {"gradients": "CLIP's last norm is for its pooled output, which no feature comes from"},
        **{
            name: {"gradients": "choosing a code has no gradient: the tokenizer stays as it was trained"}
            for name in ("shared", "bits")
        },
        **{
            kind: {"gradients": "its mask token is for pretraining on masked patches alone"}
            for kind in ("dinov2", "dinov2_with_registers", "dinov3_vit")
        },
        "joined": {"gradients": "CLIP is one of them; see there"},
    },
)
def test_understanding_encoders(component: Make, check: Callable[[Make], None]) -> None:
    check(component)


@parametrize_with_checks(
    "image_tokenizers",
    {
        raw["name"]: lambda raw=raw: (built("image_tokenizers", raw), pixels())
        for raw in (VQ, LLAMAGEN, VQGAN, IBQ, EMU3, OPEN_MAGVIT2, FSQ)
    },
)
def test_image_tokenizers(component: Make, check: Callable[[Make], None]) -> None:
    check(component)


@parametrize_with_checks(
    "adaptors",
    {
        raw["name"]: lambda raw=raw, width=width: (
            built("adaptors", raw, 12, width),
            torch.rand(2, 2, 4, 12),
        )
        for raw, width in [
            ({"name": "identity"}, 12),
            ({"name": "linear"}, 20),
            ({"name": "mlp"}, 20),
            ({"name": "hybrid"}, 20),
            ({"name": "pixel-unshuffle"}, 20),
            (PERCEIVER, 20),
            ({"name": "ldp"}, 20),
            ({"name": "lora", "rank": 2, "adaptor": {"name": "pixel-unshuffle"}}, 20),
        ]
    },
)
def test_adaptors(component: Make, check: Callable[[Make], None]) -> None:
    check(component)


class TestMlpHead(HeadContract):
    def make(self) -> tuple[MlpHead, Tensor]:
        return MlpHead(MlpHeadConfig(hidden=10), 8, (12,)), torch.rand(2, 3, 8)


class TestFactorizedHead(HeadContract):
    codebooks = (4, 6, 5)

    def make(self) -> tuple[FactorizedHead, Tensor]:
        torch.manual_seed(0)
        config = FactorizedHeadConfig(layers=2, heads=2, hidden=12)
        return FactorizedHead(config, 8, self.codebooks), torch.rand(2, 3, 8)


class TestFactorizedHeadOfOneCode(TestFactorizedHead):
    codebooks = (12,)


class TestLoraHead(HeadContract):
    codebooks = (4, 6, 5)

    def make(self) -> tuple[Any, Tensor]:
        inner = {"name": "factorized", "layers": 2, "heads": 2, "hidden": 12}
        head = built("heads", {"name": "lora", "rank": 2, "head": inner}, 8, self.codebooks)
        for name, weight in head.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(weight, std=0.3)  # as if something had been learned
        return head, torch.rand(2, 3, 8)


class TestHfBackbone(BackboneContract):
    def make(self) -> tuple[Any, Tensor]:
        llama = {
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 64,
        }  # fmt: skip
        tokens = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(1))
        return built("backbones", {"name": "hf", "config": llama}), tokens


class TestLoraBackbone(TestHfBackbone):
    def make(self) -> tuple[Any, Tensor]:
        torch.manual_seed(0)
        inner, tokens = super().make()
        raw = {"name": "lora", "rank": 3, "backbone": {"name": "hf", "config": inner.config.config}}
        backbone = built("backbones", raw)
        for name, weight in backbone.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(weight, std=0.3)  # as if something had been learned
        return backbone, tokens


class TestAutoregressiveGeneration(GenerationPathContract):
    def make(self) -> tuple[Any, Tensor]:
        raw = {
            "name": "autoregressive", "height": 32, "width": 16,
            "tokenizer": VQ, "adaptor": "mlp", "head": "mlp",
        }  # fmt: skip
        images = (pixels()[..., :16] * 127 + 128).to(torch.uint8)
        return built("generation", raw, 16), images


class TestAutoregressiveGenerationOfSeveralCodes(GenerationPathContract):
    def make(self) -> tuple[Any, Tensor]:
        raw = {
            "name": "autoregressive", "height": 32, "width": 16, "tokenizer": OPEN_MAGVIT2, "adaptor": "mlp",
            "head": {"name": "factorized", "layers": 1, "heads": 2, "hidden": 12},
        }  # fmt: skip
        images = (pixels()[..., :16] * 127 + 128).to(torch.uint8)
        return built("generation", raw, 16), images


class TestTextSampler(TextSamplerContract):
    settings = TextSettings(max_tokens=5)

    def make(self) -> tuple[Any, SamplingExample]:
        return sample_text, SamplingExample(self.settings, [prompt(1, 2, 3), prompt(4)], NumpySession)


class TestTextSamplerWithNoise(TestTextSampler):
    settings = TextSettings(max_tokens=5, temperature=1.0)


class TestPromptLookup(TextSamplerContract):
    def make(self) -> tuple[Any, SamplingExample]:
        settings = PromptLookupSettings(max_tokens=5, window=3, temperature=1.0)
        prompts = [prompt(1, 2, 1, 2), prompt(4)]
        return sample_text_by_lookup, SamplingExample(settings, prompts, NumpySession)


class TestImageSampler(ImageSamplerContract):
    def make(self) -> tuple[Any, SamplingExample]:
        return draw, SamplingExample(DrawSettings(), [prompt(1, 2, 3), prompt(4, 5)], NumpySession)


class TestParallelSampler(ImageSamplerContract):
    def make(self) -> tuple[Any, SamplingExample]:
        prompts = [prompt(1, 2, 3), prompt(4, 5)]
        return draw_in_parallel, SamplingExample(ParallelSettings(), prompts, NumpySession)


@pytest.mark.parametrize("kind", ["draw", "read", "text"])
class TestDigits(SourceContract):
    @pytest.fixture(autouse=True)
    def _of_kind(self, kind: str) -> None:
        self.kind = kind

    def make(self) -> tuple[Digits, list[int]]:
        return Digits(DigitsConfig(task=self.kind, split="test")), [0, 5, 17]


@parametrize_with_checks(
    "trackers",
    {
        "jsonl": lambda: (lambda folder: JsonlTracker(JsonlConfig(), folder), {"loss": 0.5}),
        "tensorboard": lambda: (
            lambda folder: TensorboardTracker(TensorboardConfig(), folder),
            {"loss": 0.5},
        ),
    },
)
def test_trackers(component: Make, check: Callable[[Make], None]) -> None:
    check(component)

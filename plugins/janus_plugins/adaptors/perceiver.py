"""The adaptor `perceiver`, a perceiver resampler: learned queries attend to any number of features.

From Flamingo (Alayrac et al. 2022, section 2.1 and figure 5). The layers are those of Idefics2 (Laurençon et
al. 2024, "What matters when building vision-language models?"), whose weights can be loaded: RMSNorm,
grouped-query attention, gated MLPs, and an MLP that first maps features to the backbone's hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import (
    Adaptor,
    CheckpointError,
    ComponentConfig,
    ConfigError,
    DescriptionError,
    Difference,
    Registry,
    belongs_to,
    hookimpl,
    read_json,
    resolve_pretrained,
)
from janus_plugins.hf_folders import describing_folder, read_config
from janus_plugins.sizes import check_sizes

DEFAULT_HEADS = 16


@dataclass
class PerceiverConfig(ComponentConfig):
    """Options of the adaptor; the defaults are Idefics2's, except for ``intermediate``.

    With ``pretrained``, they must be equal to those of the config.json. Without a config.json, ``heads`` is
    required: weights of more and narrower heads have the same shapes.
    """

    queries: int = 64  # tokens of an image
    layers: int = 3  # each with one cross-attention
    heads: int | None = None  # of attention; None: as the config.json of `pretrained` has it, else 16
    kv_heads: int = 4  # of keys and values
    head_dim: int = 96  # of each head
    intermediate: int | None = None  # inside the first MLP, C -> D; None: 4 D; Idefics2: 14336, D being 4096

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes(self, queries=1, layers=1, kv_heads=1, head_dim=1)
        if self.heads is not None:
            check_sizes(self, heads=1)
        if not self.pretrained or self.heads is not None:
            check_groups(self.heads or DEFAULT_HEADS, self.kv_heads)


def check_groups(heads: int, kv_heads: int) -> None:
    """Check that heads share those of keys and values evenly.

    Raises:
        ValueError: the numbers do not divide.
    """
    if heads % kv_heads:
        raise ValueError(f"heads: {heads} do not share {kv_heads} kv_heads evenly.")


class PerceiverAdaptor(nn.Module):
    """Maps features (N, P, C) of any grid to (N, queries, D), whatever their order.

    Features of vision transformers contain their positions.
    """

    def __init__(self, config: PerceiverConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        heads = config.heads or DEFAULT_HEADS
        if config.pretrained:
            heads = described_heads(config, resolve_pretrained(config.pretrained, config.revision))
        check_groups(heads, config.kv_heads)
        self.config = config = replace(config, heads=heads)
        intermediate = config.intermediate or 4 * output_dim
        self.modality_projection = GatedMlp(input_dim, intermediate, output_dim)
        self.perceiver_resampler = Resampler(config, output_dim)

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Return the number of queries, whatever the grid."""
        return self.config.queries

    def output_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return a single row: queries have no place in the image."""
        return 1, self.config.queries

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map features (N, P, C) to (N, queries, D)."""
        return self.perceiver_resampler(self.modality_projection(features))

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read the connector of an Idefics2 checkpoint, with published or transformers' names."""
        for name in weights:
            _, is_connector, own = f".{name}".rpartition(".connector.")
            own = own if is_connector else name
            if is_connector or belongs_to(own, self):
                yield own, weights[name]


DESCRIBED = {
    "queries": "resampler_n_latents",
    "layers": "resampler_depth",
    "heads": "resampler_n_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "resampler_head_dim",
}
"""The options, with their names in transformers' config of Idefics2."""

USUAL = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
"""Keys of Idefics2's perceiver_config, with the only values that this class supports."""


def described_heads(config: PerceiverConfig, path: Path) -> int:
    """Return the number of heads in the config.json of Idefics2 beside the weights; else the written one.

    Raises:
        DescriptionError: lists the options that differ, with both values.
        CheckpointError: the config.json has values that this class does not support.
        ConfigError: neither says how many heads there are.
    """
    file = describing_folder(path) / "config.json"
    if not file.is_file() or read_json(file, CheckpointError).get("model_type") != "idefics2":
        if config.heads is None:
            raise ConfigError(
                f"{path} has no config.json of Idefics2, and shapes of weights do not show heads: write"
                f" heads=... (Idefics2 has {DEFAULT_HEADS}), with the kv_heads and head_dim that go with it"
            )
        return config.heads
    whole = read_config(file.parent, "Idefics2")
    described = whole.perceiver_config
    values = {f"perceiver_config.{key}": (getattr(described, key), usual) for key, usual in USUAL.items()}
    values["text_config.hidden_act"] = (whole.text_config.hidden_act, USUAL["hidden_act"])  # of the first MLP
    unsupported = [
        f"{key} {value!r}; expected {usual!r}" for key, (value, usual) in values.items() if value != usual
    ]
    if unsupported:
        raise CheckpointError(f"perceiver: {file} describes {', '.join(unsupported)}, all that is supported")
    heads = described.resampler_n_heads if config.heads is None else config.heads
    written = {**vars(config), "heads": heads}
    differences = [
        Difference(key, written[key], getattr(described, described_key))
        for key, described_key in DESCRIBED.items()
        if written[key] != getattr(described, described_key)
    ]
    if differences:
        raise DescriptionError(str(path), differences)
    return heads


class Resampler(nn.Module):
    """Learned queries that attend to features layer by layer: (N, P, D) to (N, queries, D)."""

    def __init__(self, config: PerceiverConfig, dim: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.queries, dim))
        self.layers = nn.ModuleList(ResamplerLayer(config, dim) for _ in range(config.layers))
        self.norm = RmsNorm(dim)

    def forward(self, context: Tensor) -> Tensor:
        latents = self.latents.expand(context.shape[0], -1, -1)  # (N, queries, D)
        for layer in self.layers:
            latents = layer(latents, context)
        return self.norm(latents)


class ResamplerLayer(nn.Module):
    """Attention of the queries to features and queries, then an MLP, both with residual connections."""

    def __init__(self, config: PerceiverConfig, dim: int) -> None:
        super().__init__()
        self.input_latents_norm = RmsNorm(dim)
        self.input_context_norm = RmsNorm(dim)
        self.self_attn = ResamplerAttention(config, dim)
        self.post_attention_layernorm = RmsNorm(dim)
        self.mlp = GatedMlp(dim, 4 * dim, dim)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        context = self.input_context_norm(context)
        latents = latents + self.self_attn(self.input_latents_norm(latents), context)
        return latents + self.mlp(self.post_attention_layernorm(latents))


class ResamplerAttention(nn.Module):
    """Attention with queries of the latents, and keys and values of features and latents."""

    def __init__(self, config: PerceiverConfig, dim: int) -> None:
        super().__init__()
        heads = config.heads or DEFAULT_HEADS
        self.head_dim, self.groups = config.head_dim, heads // config.kv_heads
        q_dim, kv_dim = heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(dim, q_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, dim, bias=False)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        context = torch.cat([context, latents], dim=1)  # (N, P + queries, D)
        q, k, v = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (N, heads, positions, head_dim)
            for x in (self.q_proj(latents), self.k_proj(context), self.v_proj(context))
        )
        k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, dim: int, intermediate: int, output_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, intermediate, bias=False)
        self.up_proj = nn.Linear(dim, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, output_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RmsNorm(nn.Module):
    """RMSNorm in float32, written in basic operators, which every runtime has."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normal = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * normal.to(x.dtype)


@hookimpl
def register_adaptors(registry: Registry[Adaptor]) -> None:
    """Register this adaptor."""
    registry.add("perceiver", PerceiverAdaptor, PerceiverConfig)

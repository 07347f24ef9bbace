"""All built-in model components as overrides, rules of which fit together, and rows that cover all pairs.

A new part is one line in its table below; `test_table.py` fails until it is there.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from itertools import combinations, product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from allpairspy import AllPairs
from torch import nn

from janus_modular import Plugins
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.model import JanusModel
from janus_modular.processing.processor import Processor

EXAMPLE = Path(__file__).parents[2] / "plugins/examples/efficientnet_lite0.py"
SIDE = 32  # pixels of images that are read; the encoders below make 4 x 4 features of them
DRAWN = (32, 48)  # height and width of images that are drawn
WIDTH = 32  # D, of every backbone below


@dataclass(frozen=True)
class Option:
    """A part, as small as it takes. What `RULES` ask of it is tested against the part that is built."""

    words: str  # what is typed after ``slot=``
    width: int = WIDTH  # of an encoder: C; of a tokenizer: of the vectors that its codes are embedded by
    codes: int = 1  # of a tokenizer: S, codes of a position; of a head: how many it can predict
    keeps: bool = True  # of an adaptor: each feature its own position
    squares: bool = False  # of an encoder: images in native sizes, with a position for each patch
    beside: tuple[str, ...] = ()  # further overrides


def hf_vision(family: str, more: str, *, native: bool = False) -> Option:
    sizes = "hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48"
    config = f"config: {{model_type: {family}, {sizes}, patch_size: 8, {more}}}"
    pixels = f", pixels: {{height: {SIDE}, width: {SIDE}, resize: native, multiple: 8}}" if native else ""
    return Option(f"{{name: hf-vision, {config}{pixels}}}", squares=native)


def hf(family: str, more: str = "") -> Option:
    sizes = (
        f"hidden_size: {WIDTH}, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
        "num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 512, "
        "bos_token_id: null, eos_token_id: null, pad_token_id: null"
    )
    return Option(f"{{name: hf, config: {{model_type: {family}, {sizes}, {more}}}}}")


def llamagen(multipliers: str, name: str = "llamagen") -> Option:
    sizes = "channels: 8, residual_blocks: 1, latent_channels: 16, num_codes: 32, code_dim: 8"
    return Option(f"{{name: {name}, {sizes}, channel_multipliers: {multipliers}}}", width=8)


VQ = "{name: vq, channels: [8, 8, 16, 16], num_codes: 32, code_dim: %s}"
WINDOW = "sliding_window: 32"  # shorter than the sequences here, and two layers of it see the image
ENCODERS = {
    "siglip": Option(
        "{name: siglip, feature_dim: 32, layers: 1, heads: 2, intermediate: 48, patch_size: 8, "
        "image_size: 32, pixels: {height: 32, width: 32}}"
    ),
    "vit": Option("{name: vit, feature_dim: 32, layers: 1, heads: 2, stem: [8, 16, 32]}"),
    "siglip2": hf_vision("siglip2_vision_model", "num_patches: 16"),
    "siglip2-native": hf_vision("siglip2_vision_model", "num_patches: 16", native=True),
    "clip": hf_vision("clip_vision_model", f"image_size: {SIDE}"),
    "dinov2": hf_vision("dinov2", f"image_size: {SIDE}"),
    "dinov2-registers": hf_vision("dinov2_with_registers", f"image_size: {SIDE}"),
    "dinov3": hf_vision("dinov3_vit", f"image_size: {SIDE}"),
    "aimv2": hf_vision("aimv2_vision_model", f"image_size: {SIDE}"),
    "ijepa": hf_vision("ijepa", f"image_size: {SIDE}"),
    "hf-vit": hf_vision("vit", f"image_size: {SIDE}"),
    "hf-siglip": hf_vision("siglip_vision_model", f"image_size: {SIDE}"),
    "deit": hf_vision("deit", f"image_size: {SIDE}"),
    "beit": hf_vision("beit", f"image_size: {SIDE}"),
    "tokenizer-features": Option(
        f"{{name: tokenizer-features, height: 32, width: 32, tokenizer: {VQ % 5}}}", width=5
    ),
    "joined": Option(
        "{name: joined, encoders: [{name: vit, feature_dim: 16, layers: 1, heads: 2, stem: [8, 16, 32]}, "
        "{name: vit, feature_dim: 8, layers: 1, heads: 2, stem: [8, 8, 8]}]}",
        width=24,
    ),
    "lora": Option(
        "{name: lora, rank: 2, encoder: {name: vit, feature_dim: 32, layers: 1, heads: 2, stem: [8, 16, 32]}}"
    ),
    "efficientnet-lite0": Option("{name: efficientnet-lite0, height: 64, width: 128}", width=1280),
}
ADAPTORS = {
    "identity": Option("identity"),
    "linear": Option("linear"),
    "mlp": Option("mlp"),
    "hybrid": Option("hybrid"),
    "pixel-unshuffle": Option("pixel-unshuffle", keeps=False),
    "perceiver": Option(
        "{name: perceiver, queries: 3, layers: 1, heads: 4, kv_heads: 2, head_dim: 8}", keeps=False
    ),
    "ldp": Option("ldp", keeps=False),
    "lora": Option("{name: lora, rank: 2, adaptor: {name: mlp}}"),
}
PATHS = {"autoregressive": Option("autoregressive")}
PATHS_OF_OTHER_PARTS = {"rectified-flow"}
"""Generation paths without tokenizer and head; `test_rectified_flow.py` has rows of theirs."""

TOKENIZERS = {
    "vq": Option(VQ % 5, width=5),
    "vq-wide": Option(VQ % 4, beside=(f"generation.embedding_dim={WIDTH}",)),
    "vq16": llamagen("[1, 1, 2, 2, 4]"),
    "vq8": llamagen("[1, 2, 2, 4]"),
    "vqgan": llamagen("[1, 2, 2, 4]", name="vqgan"),
    "ibq": llamagen("[1, 2, 2, 4]", name="ibq"),
    "emu3": Option(
        "{name: hf-vq, config: {model_type: emu3_vqgan, base_channels: 32, channel_multiplier: [1, 1, 1, 1], "
        "hidden_size: 32, num_res_blocks: 1, attn_resolutions: [1], codebook_size: 16}}",
        width=4,
    ),
    "open-magvit2": Option(  # norms of 3 channels each: of one alone, they blow up what its gamma left near 0
        "{name: open-magvit2, channels: 12, channel_multipliers: [1, 1, 2], residual_blocks: 1, "
        "bits: [2, 3]}",
        width=5,
        codes=2,
    ),
    "fsq": Option(
        "{name: fsq, channels: 8, channel_multipliers: [1, 2], residual_blocks: 1, patch_size: 2, factor: 8, "
        "latent_channels: 8, levels: [4, 3]}",
        width=2,
    ),
}
HEADS = {
    "mlp": Option("mlp"),
    "factorized": Option("{name: factorized, layers: 1, heads: 2}", codes=9),  # as many as there are
    "lora": Option("{name: lora, rank: 2, head: {name: mlp}}"),
}
BACKBONES = {
    "llama": hf("llama"),
    "mistral": hf("mistral", f"head_dim: 8, {WINDOW}"),
    "qwen2": hf("qwen2", f"{WINDOW}, use_sliding_window: true, max_window_layers: 1"),
    "qwen3": hf("qwen3", "head_dim: 16"),  # not hidden_size / heads
    "phi3": hf("phi3"),
    "gemma2": hf("gemma2", f"head_dim: 8, query_pre_attn_scalar: 8, attn_logit_softcapping: 3.0, {WINDOW}"),
    "gemma3_text": hf(
        "gemma3_text", f"head_dim: 16, {WINDOW}, layer_types: [sliding_attention, full_attention]"
    ),
    "olmo2": hf("olmo2"),
    "smollm3": hf("smollm3", "no_rope_layers: [1, 0]"),
    "granite": hf("granite", "embedding_multiplier: 3.0, attention_multiplier: 0.3, logits_scaling: 8.0"),
    "stablelm": hf("stablelm"),
    "cohere": hf("cohere", "logit_scale: 0.125"),
    "lora": Option(f"{{name: lora, rank: 2, alpha: 2, backbone: {hf('llama').words}}}"),
}
TABLES = {  # by the dimension's name in a `Row`
    "encoder": ENCODERS,
    "adaptor": ADAPTORS,
    "path": PATHS,
    "tokenizer": TOKENIZERS,
    "drawing_adaptor": ADAPTORS,
    "head": HEADS,
    "backbone": BACKBONES,
}
PLACES = {  # of each dimension: where its words go, and the slot that its components are announced for
    "encoder": ("understanding.encoder", "understanding_encoders"),
    "adaptor": ("understanding.adaptor", "adaptors"),
    "path": ("generation", "generation"),
    "tokenizer": ("generation.tokenizer", "image_tokenizers"),
    "drawing_adaptor": ("generation.adaptor", "adaptors"),
    "head": ("generation.head", "heads"),
    "backbone": ("backbone", "backbones"),
}

MADE_OF = {  # by graph: the dimensions of a row that it holds
    "understand": ("encoder", "adaptor"),
    "embed": ("backbone",),
    "backbone": ("backbone",),
    "sample_text": ("backbone",),
    "sample_image": ("path", "tokenizer", "drawing_adaptor", "head"),
    "embed_codes": ("path", "tokenizer", "drawing_adaptor"),
    "decode_image": ("path", "tokenizer"),
    "tokenize_image": ("path", "tokenizer"),
}

Rule = Callable[..., bool]
"""Says whether neighbours fit; its arguments are dimensions by name."""


def nothing_to_do_needs_equal_widths(encoder: Option, adaptor: Option) -> bool:
    return adaptor is not ADAPTORS["identity"] or encoder.width == WIDTH


def two_halves_need_an_even_width(encoder: Option, adaptor: Option) -> bool:
    return adaptor is not ADAPTORS["hybrid"] or encoder.width % 2 == 0


def codes_need_the_backbones_width_where_nothing_is_done(tokenizer: Option, drawing_adaptor: Option) -> bool:
    return nothing_to_do_needs_equal_widths(tokenizer, drawing_adaptor)


def codes_need_an_even_width_for_two_halves(tokenizer: Option, drawing_adaptor: Option) -> bool:
    return two_halves_need_an_even_width(tokenizer, drawing_adaptor)


def a_code_that_is_drawn_keeps_its_position(drawing_adaptor: Option) -> bool:
    return drawing_adaptor.keeps


def several_codes_need_a_head_for_several(tokenizer: Option, head: Option) -> bool:
    return tokenizer.codes <= head.codes


def a_position_for_each_patch_needs_an_adaptor_that_keeps_them(encoder: Option, adaptor: Option) -> bool:
    return adaptor.keeps or not encoder.squares or "perceiver" in adaptor.words


RULES: tuple[Rule, ...] = (
    a_position_for_each_patch_needs_an_adaptor_that_keeps_them,
    nothing_to_do_needs_equal_widths,
    two_halves_need_an_even_width,
    codes_need_the_backbones_width_where_nothing_is_done,
    codes_need_an_even_width_for_two_halves,
    a_code_that_is_drawn_keeps_its_position,
    several_codes_need_a_head_for_several,
)


def dimensions_of(rule: Rule) -> list[str]:
    """Return the dimensions that a rule is about."""
    return list(inspect.signature(rule).parameters)


def broken(labels: dict[str, str]) -> list[Rule]:
    """Return the rules that labels of some dimensions break; one that asks for others too is left out."""
    options = {name: TABLES[name][label] for name, label in labels.items()}
    known = [rule for rule in RULES if options.keys() >= set(dimensions_of(rule))]
    return [rule for rule in known if not rule(**{name: options[name] for name in dimensions_of(rule)})]


@dataclass(frozen=True)
class Row:
    """A whole model: an option's label for each dimension."""

    encoder: str
    adaptor: str = "mlp"
    path: str = "autoregressive"
    tokenizer: str = "vq"
    drawing_adaptor: str = "mlp"
    head: str = "mlp"
    backbone: str = "llama"

    def __str__(self) -> str:
        return "+".join(astuple(self))

    @property
    def words(self) -> list[str]:
        """What one types after ``tiny``."""
        chosen = {name: table[getattr(self, name)] for name, table in TABLES.items()}
        height, width = DRAWN
        return [
            *(f"{PLACES[name][0]}={option.words}" for name, option in chosen.items()),
            *(word for option in chosen.values() for word in option.beside),
            f"generation.height={height}",
            f"generation.width={width}",
        ]

    def build(self, plugins: Plugins) -> tuple[JanusModel, Processor]:
        """Build it; weights are larger than at the start of a training, so that every part shows."""
        if "efficientnet-lite0" not in plugins.names("understanding_encoders"):
            plugins.add_file(EXAMPLE)
        torch.manual_seed(0)
        raw = load("tiny", self.words, plugins)
        assembly = ModelAssembly.from_config(resolve(raw, ModelConfig, plugins), plugins)
        model, processor = assembly.model, assembly.processor
        for weight in model.parameters():
            if weight.dim() > 1 and weight.numel():
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        return model, processor


def pairs() -> list[dict[str, str]]:
    """Every two options of different dimensions that fit together."""
    labels = [(name, label) for name, table in TABLES.items() for label in table]
    every = [dict((one, other)) for one, other in combinations(labels, 2) if one[0] != other[0]]
    return [pair for pair in every if not broken(pair)]


def pairwise() -> list[Row]:
    """Make rows in which every pair meets. Where rules stand in AllPairs' way, a row for what it left."""
    tables = OrderedDict(sorted(TABLES.items(), key=lambda one: -len(one[1])))  # largest first: fewest rows

    def fits(values: list[str]) -> bool:
        return not broken(dict(zip(tables, values, strict=False)))  # of a row in the making: its beginning

    rows = [dict(zip(tables, values, strict=True)) for values in AllPairs(tables, filter_func=fits)]
    for pair in pairs():
        if not any(pair.items() <= row.items() for row in rows):
            others = [[(name, label) for label in tables[name]] for name in tables if name not in pair]
            rows.append(next(row for rest in product(*others) if not broken(row := pair | dict(rest))))
    return [Row(**row) for row in rows]


def graphs_with_new_pairs(rows: list[Row], made_of: Mapping[str, tuple[str, ...]]) -> dict[Row, list[str]]:
    """Choose graphs of rows until every pair of parts that meets in a graph is in a chosen one."""

    def pairs_in(graph: str, row: Row) -> set[tuple[str, ...]]:
        names = [(name, getattr(row, name)) for name in made_of[graph]]
        return {
            (graph, *(part for pair in met for part in pair))
            for met in combinations(names, min(2, len(names)))
        }

    def pairs_of(row: Row) -> set[tuple[str, ...]]:
        return set().union(*(pairs_in(graph, row) for graph in made_of))

    missing = set().union(*map(pairs_of, rows))
    chosen = {}
    while missing:
        row = max(rows, key=lambda row: len(pairs_of(row) & missing))
        chosen[row] = [graph for graph in made_of if pairs_in(graph, row) & missing]
        missing -= pairs_of(row)
    return chosen


ROWS = pairwise()
NEW_PAIRS = graphs_with_new_pairs(ROWS, MADE_OF)
FEW = ROWS[:: -(-len(ROWS) // 3)]  # three that are far apart
THREE_PARTS = [
    Row(encoder=encoder, tokenizer=tokenizer, backbone=backbone)
    for encoder, tokenizer, backbone in product(
        ("siglip", "siglip2", "clip", "dinov2", "efficientnet-lite0"),
        ("vq", "vq16", "vq8"),
        ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3_text"),
    )
]
SIX = [  # parts that users are likely to put together, each a few times
    Row("siglip", "mlp", tokenizer="vq16", backbone="llama"),
    Row("siglip2", "pixel-unshuffle", tokenizer="vq8", backbone="qwen3"),
    Row("clip", "linear", tokenizer="vq16", drawing_adaptor="hybrid", backbone="mistral"),
    Row("dinov2", "perceiver", tokenizer="vq", backbone="gemma3_text"),
    Row("efficientnet-lite0", "ldp", tokenizer="vq", drawing_adaptor="linear", backbone="phi3"),
    Row("vit", "hybrid", tokenizer="vq8", backbone="qwen2"),
]


@pytest.fixture(scope="session")
def table() -> ModuleType:
    """This file, for tests of the table itself."""
    return sys.modules[__name__]


def sampled(rows: list[Row], step: int = 8) -> list[Any]:
    """Return the rows as parameters: `make test` takes each eighth, `make test-all` all."""
    return [pytest.param(row, marks=[pytest.mark.slow] if i % step else []) for i, row in enumerate(rows)]


@pytest.fixture(params=sampled(ROWS), ids=str)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture(params=sorted(ROWS, key=lambda row: (row.tokenizer, row.encoder)), ids=str)
def graph_row(request: pytest.FixtureRequest) -> Row:
    """Every row; neighbours share traces of graphs."""
    return request.param


@pytest.fixture(
    params=sorted(NEW_PAIRS.items(), key=lambda item: (item[0].tokenizer, item[0].encoder)),
    ids=lambda item: str(item[0]),
)
def new_pairs(request: pytest.FixtureRequest) -> tuple[Row, list[str]]:
    """A row, and its graphs in which parts meet that no graph of the other rows is made of."""
    return request.param


@pytest.fixture(params=FEW, ids=str)
def one_of_a_few(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture(params=sampled(THREE_PARTS), ids=lambda row: f"{row.encoder}+{row.tokenizer}+{row.backbone}")
def of_three_parts(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture(params=SIX, ids=str)
def one_of_six(request: pytest.FixtureRequest) -> Row:
    return request.param

"""The graphs that a model becomes, each declared once: what goes in, what comes out, how large it may be.

Shapes as in ``janus_modular.interfaces``; R rows, S positions that a row has room for, G = R / N rows a
image (two under guidance). Nothing here speaks of a file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from janus_export.bundle.axes import Axis, Ranges, codes_shape
from janus_export.bundle.contract import MAGNITUDE
from janus_export.errors import ExportError
from janus_export.onnx_export.diagnostics import explained
from janus_export.onnx_export.kv_cache import GraphCache, cache_shapes
from janus_modular import JanusModel


@dataclass(frozen=True)
class Slot:
    """One tensor that a graph takes or gives."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | Axis, ...]
    varies: bool = False  # its dtype is the model's, so another variant has another


@dataclass(frozen=True)
class Graph:
    """A part of the model, with what it takes and what it gives."""

    name: str
    module: nn.Module  # holds the model as ``model``, so that its tensors keep their native names
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    aliases: tuple[
        tuple[str, str], ...
    ] = ()  # (output, input) that share memory: the cache, written in place
    listed: int | None = None  # inputs from here on are one list for the module's forward
    measured: bool = False  # the last output is no module's: export adds it (`pixel_magnitude`)

    @property
    def computed(self) -> tuple[Slot, ...]:
        """The outputs of the module."""
        return self.outputs[: -1 if self.measured else None]


class GraphModule(nn.Module):
    """A view of the model whose forward is one graph."""

    def __init__(self, model: JanusModel) -> None:
        super().__init__()
        self.model = model


class Understand(GraphModule):
    """Pixels (N, 3, H, W) uint8 to embeddings (N, P, D)."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise, encode, adapt."""
        return self.model.understanding(pixels)


class Embed(GraphModule):
    """Token ids (R, T) to embeddings (R, T, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Look the tokens up."""
        return self.model.backbone.embed(tokens)


class Backbone(GraphModule):
    """Embeddings to hidden states, keys and values written into the cache that comes in."""

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, write_index: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run (R, T, D) at positions (R, T); row r writes from slot ``write_index[r]`` on."""
        cache = GraphCache(mask, write_index, past)
        return self.model.backbone(x, positions=positions, cache=cache), cache.present()


class TextNext(GraphModule):
    """Hidden states (R, D) to the next token ids (R,) and their embeddings (R, D)."""

    def __init__(self, model: JanusModel, suppressed_ids: Sequence[int]) -> None:
        super().__init__(model)
        with unset_fake_temporarily():  # a constant of the graph, unlike the model's weights
            ids = torch.tensor(list(suppressed_ids), dtype=torch.int64)
        self.register_buffer("suppressed_ids", ids, persistent=False)

    def forward(
        self, hidden: Tensor, noise: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose words."""
        return self.model.sample_text(
            hidden, noise, temperature, top_k, top_p, self.get_buffer("suppressed_ids")
        )


class GenerationPart(GraphModule):
    """One of the generation path's own parts, by name."""

    def __init__(self, model: JanusModel, part: str) -> None:
        super().__init__(model)
        self.part = part

    def forward(self, inputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Run the part."""
        return self.model.generation.parts()[self.part](*inputs)


DRAWING = ("sample_image", "decode_image", "tokenize_image")
"""The parts of a generation path that become graphs."""


def declare(model: JanusModel, ranges: Ranges, *, suppressed_ids: Sequence[int] = ()) -> list[Graph]:
    """Declare all graphs of a model. It may hold fake or meta parameters: only shapes are looked at.

    Raises:
        ExportError: the backbone keeps something else than keys and values; says which of its layers.
    """
    dtype = next(model.backbone.parameters()).dtype  # type: ignore[attr-defined]  # parts are modules
    backbone, spec = model.backbone, model.understanding.encoder.pixels
    width, vocab = backbone.hidden_size, backbone.vocab_size
    rows, tokens, capacity, images = ranges.rows, ranges.tokens, ranges.capacity, ranges.images
    scalar = ()
    with explained("backbone", model):
        pairs = cache_shapes(backbone)
    caches = [
        (layer, kind, heads, size)
        for layer, pair in enumerate(pairs)
        for kind, (heads, size) in zip(("key", "value"), pair, strict=True)
    ]

    def past(name: str) -> tuple[Slot, ...]:
        return tuple(
            Slot(f"{name}_{kind}_{layer}", dtype, (rows, heads, capacity, size), varies=True)
            for layer, kind, heads, size in caches
        )

    hidden = Slot("hidden", dtype, (rows, width), varies=True)
    x = Slot("x", dtype, (rows, tokens, width), varies=True)
    graphs = [
        Graph(
            "understand",
            Understand(model),
            (Slot("pixels", torch.uint8, (images, 3, spec.height, spec.width)),),
            (Slot("embeddings", dtype, (images, model.understanding.num_tokens, width), varies=True),),
        ),
        Graph("embed", Embed(model), (Slot("tokens", torch.int64, (rows, tokens)),), (x,)),
        Graph(
            "backbone",
            Backbone(model),
            (
                x,
                Slot("positions", torch.int64, (rows, tokens)),
                Slot("mask", torch.bool, (rows, 1, tokens, capacity)),
                Slot("write_index", torch.int64, (rows,)),
                *past("past"),
            ),
            (Slot("hidden", dtype, (rows, tokens, width), varies=True), *past("present")),
            tuple((new.name, old.name) for new, old in zip(past("present"), past("past"), strict=True)),
            listed=4,
        ),
        Graph(
            "sample_text",
            TextNext(model, suppressed_ids),
            (
                hidden,
                Slot("noise", torch.float32, (rows, vocab)),
                Slot("temperature", torch.float32, scalar),
                Slot("top_k", torch.int64, scalar),
                Slot("top_p", torch.float32, scalar),
            ),
            (Slot("ids", torch.int64, (rows,)), Slot("x", dtype, (rows, width), varies=True)),
        ),
    ]
    return graphs + drawing_graphs(model, ranges, dtype)


def drawing_graphs(model: JanusModel, ranges: Ranges, dtype: torch.dtype) -> list[Graph]:
    """Declare the parts of a generation path that draws codes; runtimes know no other kind.

    Raises:
        ExportError: the path draws without codes, or lacks one of the parts.
    """
    path, width = model.generation, model.backbone.hidden_size
    if lacks := [
        *(["sizes['codes']"] if "codes" not in path.sizes else []),
        *(f"the part '{name}'" for name in DRAWING if name not in path.parts()),
    ]:
        raise ExportError(
            f"the generation path {type(path).__name__} cannot be exported: it lacks {', '.join(lacks)}."
            f" Bundles hold paths that draw codes, with the parts {', '.join(DRAWING)}; this one offers"
            f" {', '.join(path.parts()) or 'none'}. In torch it draws: janus-modular draw CHECKPOINT"
        )
    rows, images = ranges.rows, ranges.images
    code = codes_shape(path.sizes)
    codes = Slot("codes", torch.int64, (images, path.num_tokens, *code))
    pixels = Slot("pixels", torch.uint8, (images, 3, path.height, path.width))
    return [
        Graph(
            "sample_image",
            GenerationPart(model, "sample_image"),
            (
                Slot("hidden", dtype, (rows, width), varies=True),
                Slot("noise", torch.float32, (images, path.sizes["codes"])),
                Slot("guidance", torch.float32, ()),
                Slot("temperature", torch.float32, ()),
            ),
            (Slot("codes", torch.int64, (images, *code)), Slot("x", dtype, (rows, width), varies=True)),
            listed=0,
        ),
        Graph(
            "decode_image",
            GenerationPart(model, "decode_image"),
            (codes,),
            (pixels, Slot(MAGNITUDE, torch.float32, (images,))),
            listed=0,
            measured=True,
        ),
        Graph("tokenize_image", GenerationPart(model, "tokenize_image"), (pixels,), (codes,), listed=0),
    ]

"""Declares the graphs of a model: their inputs, outputs, and ranges of axes, for any file format.

Shapes as in ``janus_modular.interfaces``; R rows, S positions (capacity of a row), G = R / N rows per image
(two with guidance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from janus_export.bundle.axes import Ranges
from janus_export.bundle.contract import MAGNITUDE
from janus_export.onnx_export.diagnostics import explained
from janus_export.onnx_export.kv_cache import GraphCache, cache_shapes
from janus_modular import GraphSpec, JanusModel, TensorSpec
from janus_modular.interfaces import GraphRole, sample_text_tensors


@dataclass(frozen=True)
class Graph:
    """A function of the model, with its inputs and outputs."""

    name: str
    module: nn.Module  # holds the model as ``model``, so that its tensors keep their native names
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dtype: torch.dtype  # of tensors whose dtype is "model"
    ranges: Ranges  # of the axes in the shapes
    aliases: tuple[tuple[str, str], ...] = ()  # (output, input) that share memory: the cache, in place
    listed: int | None = None  # from this input on, inputs are passed to forward as one list
    role: GraphRole | None = None  # of a graph of the generation path

    @property
    def is_measured(self) -> bool:
        """True if the last output is the magnitude of decoded pixels, which export adds."""
        return self.outputs[-1].name == MAGNITUDE

    @property
    def computed(self) -> tuple[TensorSpec, ...]:
        """The outputs of the module."""
        return self.outputs[: -1 if self.is_measured else None]

    def torch_dtype(self, spec: TensorSpec) -> torch.dtype:
        """Return the dtype of an input or output."""
        dtype: torch.dtype = self.dtype if spec.dtype == "model" else getattr(torch, spec.dtype)
        return dtype


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
        """Return the embeddings of tokens."""
        return self.model.backbone.embed(tokens)


class Backbone(GraphModule):
    """Embeddings to hidden states, keys and values written into the input cache."""

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, write_index: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run (R, T, D) at positions (R, T); row r writes from slot ``write_index[r]`` on."""
        cache = GraphCache(mask, write_index, past)
        return self.model.backbone(x, positions=positions, cache=cache), cache.present()


class SampleText(GraphModule):
    """Hidden states (R, D) to the next token ids (R,) and their embeddings (R, D)."""

    def __init__(self, model: JanusModel, suppressed_ids: Sequence[int]) -> None:
        super().__init__(model)
        with unset_fake_temporarily():  # a constant of the graph, unlike the model's weights
            ids = torch.tensor(list(suppressed_ids), dtype=torch.int64)
        self.register_buffer("suppressed_ids", ids, persistent=False)

    def forward(
        self, hidden: Tensor, noise: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sample the next tokens."""
        return self.model.sample_text(
            hidden, noise, temperature, top_k, top_p, self.get_buffer("suppressed_ids")
        )


class GenerationGraph(GraphModule):
    """A graph that the generation path declares, by name."""

    def __init__(self, model: JanusModel, name: str) -> None:
        super().__init__(model)
        self.name = name

    def forward(self, inputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Call the declared function."""
        graphs = self.model.generation.graphs()
        function = next(graph.function for graph in graphs if graph.name == self.name)
        result: Tensor | tuple[Tensor, ...] = function(*inputs)
        return result


def declare(model: JanusModel, ranges: Ranges, *, suppressed_ids: Sequence[int] = ()) -> list[Graph]:
    """Declare all graphs of a model. Its parameters may be fake or meta tensors: only shapes are used.

    Raises:
        ExportError: the backbone has a state other than keys and values; names the layer.
    """
    dtype = next(model.backbone.parameters()).dtype  # type: ignore[attr-defined]  # components are modules
    backbone, spec = model.backbone, model.understanding.encoder.pixels
    hidden_size, vocab = backbone.hidden_size, backbone.vocab_size
    with explained("backbone", model):
        pairs = cache_shapes(backbone)
    caches = [
        (layer, state, heads, size)
        for layer, pair in enumerate(pairs)
        for state, (heads, size) in zip(("key", "value"), pair, strict=True)
    ]

    def past(name: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(f"{name}_{state}_{layer}", "model", ("rows", heads, "capacity", size))
            for layer, state, heads, size in caches
        )

    graph = partial(Graph, dtype=dtype, ranges=ranges)
    x = TensorSpec("x", "model", ("rows", "tokens", hidden_size))
    graphs = [
        graph(
            "understand",
            Understand(model),
            (TensorSpec("pixels", "uint8", ("images", 3, spec.height, spec.width)),),
            (TensorSpec("embeddings", "model", ("images", model.understanding.num_tokens, hidden_size)),),
        ),
        graph("embed", Embed(model), (TensorSpec("tokens", "int64", ("rows", "tokens")),), (x,)),
        graph(
            "backbone",
            Backbone(model),
            (
                x,
                TensorSpec("positions", "int64", ("rows", "tokens")),
                TensorSpec("mask", "bool", ("rows", 1, "tokens", "capacity")),
                TensorSpec("write_index", "int64", ("rows",)),
                *past("past"),
            ),
            (TensorSpec("hidden", "model", ("rows", "tokens", hidden_size)), *past("present")),
            aliases=tuple(
                (new.name, old.name) for new, old in zip(past("present"), past("past"), strict=True)
            ),
            listed=4,
        ),
        graph("sample_text", SampleText(model, suppressed_ids), *sample_text_tensors(vocab, hidden_size)),
    ]
    return graphs + drawing_graphs(model, ranges, dtype)


def drawing_graphs(model: JanusModel, ranges: Ranges, dtype: torch.dtype) -> list[Graph]:
    """Return the graphs that the generation path declares."""
    return [
        Graph(
            spec.name,
            GenerationGraph(model, spec.name),
            tuple(spec.inputs),
            (*spec.outputs, *magnitude(spec)),
            dtype,
            ranges,
            listed=0,
            role=spec.role,
        )
        for spec in model.generation.graphs()
    ]


def magnitude(spec: GraphSpec) -> list[TensorSpec]:
    """Return the output that export adds to a graph that decodes pixels, to detect NaN and infinity."""
    if spec.role != "decode" or spec.outputs[0].dtype != "uint8":
        return []
    return [TensorSpec(MAGNITUDE, "float32", spec.outputs[0].shape[:1])]

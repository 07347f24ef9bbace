"""Declares the graphs of a model: their inputs, outputs, and ranges of axes, for any file format.

Shapes as in ``janus_modular.interfaces``; R rows, S positions (capacity of a row), G = R / N rows per image
(two with guidance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from janus_export.bundle.axes import Ranges
from janus_export.bundle.contract import MAGNITUDE
from janus_export.onnx_export.diagnostics import explained
from janus_export.onnx_export.kv_cache import GraphCache, cache_tensors
from janus_modular import GraphSpec, JanusModel, TensorSpec
from janus_modular.graph_specs import GraphRole, sample_text_tensors
from janus_modular.model.model import position_axes


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
    states: tuple[tuple[str, str], ...] = ()  # (output, input): the cache's states, in memory of their own
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
    """Embeddings to hidden states; the cache's tensors with new positions are outputs too."""

    def __init__(self, model: JanusModel, inputs: Sequence[TensorSpec], cache: Sequence[TensorSpec]) -> None:
        super().__init__(model)
        self.names, self.cache = [spec.name for spec in inputs], cache

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run x (R, T, D) at positions (R, T); row r writes from entry ``write_index[r]`` on."""
        first = len(self.names)
        tensors = dict(zip(self.names, inputs[:first], strict=True))
        cache = GraphCache(self.cache, inputs[first:], tensors)
        hidden = self.model.backbone(tensors["x"], positions=tensors["positions"], cache=cache)
        return hidden, cache.present()


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
        ExportError: the backbone has a state that it does not declare; names the layer.
    """
    dtype = next(model.backbone.parameters()).dtype  # type: ignore[attr-defined]  # components are modules
    backbone, hidden_size, vocab = model.backbone, model.backbone.hidden_size, model.backbone.vocab_size
    if model.understanding.encoder.pixels.multiple is not None:
        ranges = ranges.with_image_grids(most_squares(model))
    with explained("backbone", model):
        cache = cache_tensors(backbone)
    graph = partial(Graph, dtype=dtype, ranges=ranges)
    x = TensorSpec("x", "model", ("rows", "tokens", hidden_size))
    graphs = [
        graph("understand", Understand(model), *understand_tensors(model)),
        graph("embed", Embed(model), (TensorSpec("tokens", "int64", ("rows", "tokens")),), (x,)),
        graph("backbone", **backbone_graph(model, cache, x)),
        graph("sample_text", SampleText(model, suppressed_ids), *sample_text_tensors(vocab, hidden_size)),
    ]
    return graphs + drawing_graphs(model, ranges, dtype)


def most_squares(model: JanusModel) -> int:
    """Return how many squares of ``multiple`` pixels the largest image in native size has."""
    spec = model.understanding.encoder.pixels
    return (spec.height // (spec.multiple or 1)) * (spec.width // (spec.multiple or 1))


def understand_tensors(model: JanusModel) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of the graph ``understand``; in native sizes, its axes are dynamic."""
    path, spec = model.understanding, model.understanding.encoder.pixels
    size: tuple[int | str, ...] = (spec.height, spec.width)
    if spec.multiple is not None:
        size = (f"{spec.multiple}*image_rows", f"{spec.multiple}*image_columns")
    positions = "image_rows*image_columns" if path.tokens_follow_size else path.num_tokens
    return (
        (TensorSpec("pixels", "uint8", ("images", 3, *size)),),
        (TensorSpec("embeddings", "model", ("images", positions, model.backbone.hidden_size)),),
    )


def backbone_graph(model: JanusModel, cache: Sequence[TensorSpec], x: TensorSpec) -> dict[str, Any]:
    """Return the fields of the backbone's `Graph`, for the tensors of its cache."""
    has_entries = ["capacity" in spec.shape for spec in cache]
    ids = (1 + axes,) if (axes := position_axes(model.backbone)) else ()
    inputs = [x, TensorSpec("positions", "int64", (*ids, "rows", "tokens"))]
    if any(has_entries):
        inputs.append(TensorSpec("mask", "bool", ("rows", 1, "tokens", "capacity")))
        inputs.append(TensorSpec("write_index", "int64", ("rows",)))
    if not all(has_entries):
        inputs.append(TensorSpec("counts", "int64", ("rows",)))
    past, present = (
        [replace(spec, name=f"{prefix}_{spec.name}") for spec in cache] for prefix in ("past", "present")
    )
    pairs = [(new.name, old.name) for new, old in zip(present, past, strict=True)]
    return {
        "module": Backbone(model, inputs, cache),
        "inputs": (*inputs, *past),
        "outputs": (replace(x, name="hidden"), *present),
        "aliases": tuple(pair for pair, entries in zip(pairs, has_entries, strict=True) if entries),
        "states": tuple(pair for pair, entries in zip(pairs, has_entries, strict=True) if not entries),
        "listed": 0,
    }


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

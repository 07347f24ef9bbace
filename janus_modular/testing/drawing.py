"""Draws with a generation path alone: its image sampler runs on a stand-in for the backbone."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from janus_modular import samplers
from janus_modular.errors import JanusError
from janus_modular.graph_specs import GraphSpec
from janus_modular.plugins import default_plugins
from janus_modular.protocols import EncodedImages
from janus_modular.sequence import Sequence
from janus_modular.testing.check import ensure
from janus_modular.testing.examples import RecurrentSession, prompt

VOCAB_SIZE = 8


class Sizes(dict[str, Any]):
    """The sizes of a session; reading a size that is missing fails the check."""

    def __missing__(self, name: str) -> Any:
        ensure(False, f"its image sampler reads the size '{name}', which `sizes` lacks: {dict(self)}")
        raise AssertionError


class PathSession(RecurrentSession):
    """A `janus_modular.Session` of a path in torch; hidden states follow a recurrence of D numbers a row."""

    def __init__(self, path: Any, hidden_size: int) -> None:
        tokens, steps = np.arange(1, 65, dtype=np.float32), np.arange(1, hidden_size + 1, dtype=np.float32)
        super().__init__(np.sin(tokens[:, None] * steps))
        self.path = path
        self.vocab_size, self.pad_id, self.image_positions = VOCAB_SIZE, 0, path.num_tokens
        self.sizes = Sizes(path.sizes)
        self.images = 0  # drawn together
        self.graphs: dict[str, GraphSpec] = {graph.name: graph for graph in path.graphs()}
        self.inputs: dict[str, tuple[Any, ...]] = {}  # of the first call of each graph, by its name

    def read_prompts(self, prompts: Many[Sequence], first_row: int) -> Tensor:
        """Read prompts into the rows from ``first_row`` on; return the last hidden states (n, D)."""
        return torch.from_numpy(super().read_prompts(prompts, first_row))

    def feed(self, x: Any, counts: NDArray[np.int64]) -> Tensor:
        """Feed x (rows, W, D); return the hidden states (rows, W, D)."""
        return torch.from_numpy(super().feed(torch.as_tensor(x).float().numpy(), counts))

    def take(self, tensors: Any, indices: Any) -> Tensor:
        """Copy vectors of one or several tensors (..., D) into a new one (*indices.shape, D)."""
        return torch.from_numpy(super().take(tensors, indices))

    def run(self, name: str, *inputs: Any) -> Any:
        """Run one of the path's graphs, and compare what goes in and comes out with its declaration."""
        ensure(
            name in self.graphs,
            f"its image sampler runs the graph '{name}'; declared are {', '.join(self.graphs) or 'none'}",
        )
        spec = self.graphs[name]
        tensors = tuple(
            torch.as_tensor(x) if isinstance(x, np.ndarray | np.generic | int | float) else x for x in inputs
        )
        self.inputs.setdefault(name, tensors)
        result = spec.function(*tensors)
        outputs = result if isinstance(result, tuple) else (result,)
        ensure_declared(spec, tensors, outputs, self.images)
        return result

    def stack(self, columns: Many[Tensor]) -> Tensor:
        """Join tensors (rows, ...) of successive steps as (rows, steps, ...)."""
        return torch.stack(list(columns), dim=1)

    def to_host(self, x: Tensor) -> NDArray[Any]:
        """Convert a tensor to numpy."""
        return x.numpy()


@torch.no_grad()
def draw_with(path: Any, images: int, hidden_size: int) -> tuple[PathSession, EncodedImages]:
    """Draw images with a path's image sampler; return the session and the images.

    Raises:
        PluginError: no image sampler is registered under the name that the path gives.
        CheckError: the sampler breaks its protocol, uses a graph or a size that the path lacks, or a graph
            is not as it is declared.
    """
    entry = default_plugins().entry("image_samplers", path.image_sampler)
    session = PathSession(path, hidden_size)
    session.images = images
    steps = entry.factory(session, [prompt(1, 2, 3 + image) for image in range(images)], entry.config())
    return session, samplers.draw_images(path.image_sampler, steps, images, lambda done, total: None)


def targets_of(path: Any, pixels: Tensor, indices: Tensor | None = None) -> Any:
    """Return a generation path's targets of images; the randomness of each is seeded with its index."""
    seeds = range(len(pixels)) if indices is None or indices.is_meta else indices.tolist()
    return path.targets(pixels, [np.random.default_rng(seed) for seed in seeds])


def graph_inputs(path: Any, pixels: Tensor, hidden_size: int) -> dict[str, tuple[Any, ...]]:
    """Return inputs of a path's graphs for as many images as there are pixels; {} if drawing fails.

    A sampler's graphs get what the sampler gives them, and an encoder the pixels. Whether drawing works is a
    check of its own, so that the other checks still report what they find.
    """
    try:
        inputs = draw_with(path, len(pixels), hidden_size)[0].inputs
    except JanusError:
        return {}
    return inputs | derived_inputs(path, pixels)


def derived_inputs(path: Any, pixels: Tensor) -> dict[str, tuple[Tensor]]:
    """Return inputs of the graphs that a sampler need not run: pixels to encode, and what to embed."""
    encoders = [graph for graph in path.graphs() if graph.role == "encode"]
    embedded = {graph.name: (targets_of(path, pixels),) for graph in path.graphs() if graph.role == "embed"}
    return {graph.name: (pixels,) for graph in encoders} | embedded


def ensure_declared(graph: GraphSpec, inputs: Many[Any], outputs: Many[Any], images: int) -> None:
    """Compare a call of a graph with its declaration: how many tensors, their dtypes, shapes and axes."""
    axes = {"images": images}
    for side, specs, tensors in (("input", graph.inputs, inputs), ("output", graph.outputs, outputs)):
        ensure(
            len(specs) == len(tensors),
            f"the graph '{graph.name}' declares {len(specs)} {side}s, and has {len(tensors)}",
        )
        for spec, tensor in zip(specs, tensors, strict=True):
            label = f"the {side} '{spec.name}' of the graph '{graph.name}'"
            dtype = str(tensor.dtype).removeprefix("torch.")
            matches = tensor.is_floating_point() if spec.dtype == "model" else dtype == spec.dtype
            ensure(matches, f"{label} is declared as {spec.dtype}, and is {dtype}")
            try:
                measured = spec.measure(tensor.shape)
            except ValueError:
                declared, shape = list(spec.shape), list(tensor.shape)
                ensure(False, f"{label} is declared as {declared}, and is {shape} for {images} images")
            for axis, length in measured.items():
                known = axes.setdefault(axis, length)
                ensure(known == length, f"{label} has {length} {axis}, where {known} were expected")
    rows = axes.get("rows", 0)
    ensure(rows % images == 0, f"the graph '{graph.name}' has {rows} rows for {images} images: no multiple")

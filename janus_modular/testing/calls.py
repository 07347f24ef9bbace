"""The calls of a model component: its methods with inputs made from an example, which the checks run.

The slot determines the methods, by its protocol in ``janus_modular.interfaces``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as tracing
from torch.utils import _pytree as pytree

from janus_modular.capabilities import AlignsHiddenStates
from janus_modular.errors import CheckError
from janus_modular.model.model import stack_positions
from janus_modular.testing.drawing import graph_inputs, targets_of


@dataclass(frozen=True)
class Call:
    """A method of a component with its inputs: trees whose tensors have the batch as their first axis."""

    name: str
    inputs: tuple[Any, ...]
    run: Callable[..., Any]  # (component, *inputs)
    by_row: bool = True  # rows of the inputs are independent
    is_exported: bool = True  # False: used in training only
    input_dtypes: tuple[str, ...] = ()  # as a graph declares them; none: all follow the component's dtype
    output_dtypes: tuple[str, ...] = ()

    def __call__(self, component: Any) -> Any:
        """Run the method on a component."""
        return self.run(component, *self.inputs)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """Return the same call with ``change`` applied to every input tensor."""
        return replace(self, inputs=pytree.tree_map_only(Tensor, change, self.inputs))

    def in_dtype(self, dtype: torch.dtype) -> Call:
        """Return the same call with its floating-point inputs in ``dtype``, or in the declared dtype."""
        declared = self.input_dtypes or ("model",) * len(self.inputs)

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        return replace(
            self,
            inputs=tuple(
                pytree.tree_map_only(Tensor, cast, value) if name == "model" else value
                for value, name in zip(self.inputs, declared, strict=True)
            ),
        )

    def row(self, index: int) -> Call:
        """Return the same call with a single row of its inputs."""
        return self.mapped(lambda x: x[index : index + 1])

    @property
    def rows(self) -> int:
        """The number of rows of its inputs."""
        return len(tensors(self.inputs)[0])


class CallModule(nn.Module):
    """A module whose forward is a component's call, for exporters and FSDP2."""

    def __init__(self, component: nn.Module, call: Call) -> None:
        super().__init__()
        self.component = component
        self.run = call.run

    def forward(self, *inputs: Any) -> Any:
        """Run the call with these inputs."""
        return self.run(self.component, *inputs)


@torch.no_grad()
def calls_of(component: Any, example: Tensor, slot: str) -> list[Call]:
    """Return the calls of a component of ``slot``, with inputs made from the example."""
    return CALLS[slot](component, example)


def enlarged(example: Tensor, slot: str) -> Tensor:
    """Return an example with one more row; token ids also with one more position."""
    if slot == "backbones":
        example = torch.cat([example, example[:, :1]], dim=1)
    return torch.cat([example, example[:1]])


def _encoder(component: Any, pixels: Tensor) -> list[Call]:
    return [Call("forward", (pixels,), lambda c, x: c(x))]


def _tokenizer(component: Any, pixels: Tensor) -> list[Call]:
    height, width = pixels.shape[-2:]
    codes = component.encode(pixels)
    return [
        Call("encode", (pixels,), lambda c, pixels: c.encode(pixels)),
        Call("decode", (codes,), lambda c, codes: c.decode(codes, height=height, width=width)),
    ]


def _autoencoder(component: Any, pixels: Tensor) -> list[Call]:
    height, width = pixels.shape[-2:]
    encoded = component.encode(pixels)
    return [
        Call("encode", (pixels,), lambda c, pixels: c.encode(pixels)),
        Call("decode", (encoded,), lambda c, encoded: c.decode(encoded, height=height, width=width)),
    ]


def _adaptor(component: Any, features: Tensor) -> list[Call]:
    grid = (features.shape[1], features.shape[2])
    return [Call("forward", (features.flatten(1, 2),), lambda c, features: c(features, grid))]


def _head(component: Any, hidden: Tensor) -> list[Call]:
    nothing, *known = known_codes(component, hidden)
    first = Call("forward, code 1", (hidden,), lambda c, x: c(x, nothing.new_empty(*x.shape[:-1], 0)))
    return [first] + [
        Call(f"forward, code {s}", (hidden, before), lambda c, x, before: c(x, before))
        for s, before in enumerate(known, 2)
    ]


def _backbone(component: Any, tokens: Tensor) -> list[Call]:
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    x = component.embed(tokens)
    hidden = component(x, positions=stack_positions(component, positions))
    return [
        Call("embed", (tokens,), lambda c, tokens: c.embed(tokens)),
        Call(
            "forward",
            (x, positions),
            lambda c, x, positions: c(x, positions=stack_positions(c, positions)),
        ),
        Call("logits", (hidden,), lambda c, hidden: c.logits(hidden)),
    ]


def _generation(component: Any, pixels: Tensor) -> list[Call]:
    """What training calls, and the graphs of the path, on what its image sampler gives them."""
    targets = targets_of(component, pixels)
    hidden = component.embed(targets)
    graphs = {graph.name: graph for graph in component.graphs()}
    aligned = alignment_of(component, hidden)
    indices = torch.arange(len(pixels))  # so that a row alone has the randomness that it has in the batch
    return [
        Call("targets", (pixels, indices), targets_of, is_exported=False),
        Call("embed", (targets,), lambda c, targets: c.embed(targets)),
        Call("losses", (hidden, targets), lambda c, hidden, targets: dict(c.losses(hidden, targets))),
        *([Call("alignment", (hidden,), alignment_of, is_exported=False)] if aligned else []),
        *(
            Call(
                f"graph '{name}'",
                inputs,
                partial(_run_graph, name=name),
                _row_by_row(inputs),
                input_dtypes=tuple(spec.dtype for spec in graphs[name].inputs),
                output_dtypes=tuple(spec.dtype for spec in graphs[name].outputs),
            )
            for name, inputs in graph_inputs(component, pixels, hidden.shape[-1]).items()
        ),
    ]


def alignment_of(path: Any, hidden: Tensor) -> dict[str, Tensor]:
    """Return a path's losses between hidden states (N, P, D) and fixed features; {} if it has none."""
    if not isinstance(path, AlignsHiddenStates) or path.align_layer is None:
        return {}
    features = fixed_weights(hidden.new_empty(path.align_shape)).expand(len(hidden), *path.align_shape)
    return dict(path.alignment(hidden, features))


def _run_graph(path: Any, *inputs: Any, name: str) -> Any:
    return next(graph.function for graph in path.graphs() if graph.name == name)(*inputs)


def _row_by_row(inputs: tuple[Any, ...]) -> bool:
    """Return True if all tensors of a call have as many rows; under guidance an image has two rows."""
    return len({len(x) for x in tensors(inputs) if x.ndim}) == 1 and all(x.ndim for x in tensors(inputs))


CALLS: Mapping[str, Callable[[Any, Tensor], list[Call]]] = {
    "understanding_encoders": _encoder,
    "image_tokenizers": _tokenizer,
    "image_autoencoders": _autoencoder,
    "adaptors": _adaptor,
    "heads": _head,
    "backbones": _backbone,
    "generation": _generation,
}
"""By slot."""


def known_codes(head: Any, hidden: Tensor) -> Iterator[Tensor]:
    """Yield example codes (..., s) that precede code s of a position, for s = 0, 1, ..."""
    codes = [torch.arange(hidden[..., 0].numel()).view(hidden.shape[:-1]) % size for size in head.codebooks]
    for s in range(len(codes)):
        yield torch.stack(codes, dim=-1)[..., :s]


def training_loss(component: Any, example: Tensor, slot: str) -> Tensor:
    """Return a scalar loss that depends on every trainable parameter of a component."""
    if slot == "backbones":
        positions = torch.arange(example.shape[1]).expand(example.shape)
        hidden = component(component.embed(example), positions=stack_positions(component, positions))
        return component.logits(hidden).square().mean()
    if slot in ("image_tokenizers", "image_autoencoders"):
        return torch.stack(list(component.losses(example).values())).sum()
    if slot == "generation":
        targets = targets_of(component, example)
        hidden = component.embed(targets)
        losses = {**component.losses(hidden, targets), **alignment_of(component, hidden)}
        return torch.stack([loss.mean() for loss in losses.values()]).sum()
    # a weighted sum: the plain sum of a normalised feature is always zero
    outputs = [call(component) for call in calls_of(component, example, slot)]
    return torch.stack([(fixed_weights(output) * output).sum() for output in outputs]).sum()


def fixed_weights(x: Tensor) -> Tensor:
    """Return fixed weights of x's shape for a weighted sum; all differ, so that no outputs cancel."""
    return torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).sin().view_as(x)


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and mappings."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


MAX_LENGTH = 64
"""Upper bound of dynamic lengths; small, so that no position table is too short."""


def trace_call(component: Any, call: Call, larger: Call) -> ExportedProgram:
    """Trace a call with torch.export; axes whose lengths differ in ``larger`` are dynamic.

    Raises:
        CheckError: the component fixes a length, by ``len(x)`` or ``int(x.shape[0])`` say.
    """
    lengths: dict[tuple[int, int], Any] = {}

    def varying(x: Any, larger_x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        return {
            axis: lengths.setdefault(
                pair, Dim(f"length_{pair[0]}_{pair[1]}", min=1, max=MAX_LENGTH * max(pair))
            )
            for axis, pair in enumerate(zip(x.shape, larger_x.shape, strict=True))
            if pair[0] != pair[1]
        }

    shapes = pytree.tree_map(varying, call.inputs, larger.inputs)
    try:
        with tracing.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # lengths may be 1
            return torch.export.export(
                CallModule(component, call).eval(),
                call.inputs,
                dynamic_shapes=(shapes,),
                prefer_deferred_runtime_asserts_over_guards=True,  # rows may be a multiple of the images
            )
    except torch._dynamo.exc.UserError as error:
        raise CheckError(
            f"{call.name} fixes the number of rows: it uses a length as a Python number"
            f" (len(x), int(x.shape[0])). Use x.shape[0] itself. torch says: {str(error).splitlines()[0]}"
        ) from error

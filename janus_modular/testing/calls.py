"""What a part of a model does, as calls that every check can make: its methods, with inputs of the example.

The slot says which methods those are, as the protocols in ``janus_modular.interfaces`` have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from janus_modular.testing.drawing import parts_run


@dataclass(frozen=True)
class Call:
    """One method of a component with inputs; tensors of rows first, as any leaves of a tree."""

    name: str
    inputs: tuple[Any, ...]
    run: Callable[..., Any]  # (component, *inputs)
    by_row: bool = True  # each row of the inputs stands for itself
    is_exported: bool = True  # whether export compiles it; targets are made in training alone

    def __call__(self, component: Any) -> Any:
        """Make the call."""
        return self.run(component, *self.inputs)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """Return the same call with every input tensor changed."""
        return replace(self, inputs=pytree.tree_map_only(Tensor, change, self.inputs))

    def row(self, index: int) -> Call:
        """Return the same call with one row of its inputs alone."""
        return self.mapped(lambda x: x[index : index + 1])

    @property
    def rows(self) -> int:
        """How many rows its inputs have."""
        return len(tensors(self.inputs)[0])


class Calling(nn.Module):
    """A component's call as a module whose forward it is: what exporters and FSDP2 take."""

    def __init__(self, component: nn.Module, call: Call) -> None:
        super().__init__()
        self.component = component
        self.run = call.run

    def forward(self, *inputs: Any) -> Any:
        """Make the call with these inputs."""
        return self.run(self.component, *inputs)


@torch.no_grad()
def calls_of(component: Any, example: Tensor, slot: str) -> list[Call]:
    """Return what a component of ``slot`` offers to callers, each with inputs made from the example."""
    return CALLS[slot](component, example)


def grown(example: Tensor, slot: str) -> Tensor:
    """Return an example of one row more; of token ids also of one position more, since sequences vary too."""
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
    hidden = component(x, positions=positions)
    return [
        Call("embed", (tokens,), lambda c, tokens: c.embed(tokens)),
        Call("forward", (x, positions), lambda c, x, positions: c(x, positions=positions)),
        Call("logits", (hidden,), lambda c, hidden: c.logits(hidden)),
    ]


def _generation(component: Any, pixels: Tensor) -> list[Call]:
    """What training calls, and the parts that the path's image sampler runs, with what it passes them."""
    targets = targets_of(component, pixels)
    hidden = component.embed(targets)
    return [
        Call("targets", (pixels,), targets_of, is_exported=False),
        Call("embed", (targets,), lambda c, targets: c.embed(targets)),
        Call("losses", (hidden, targets), lambda c, hidden, targets: dict(c.losses(hidden, targets))),
        *(
            Call(f"part '{name}'", inputs, partial(_run_part, name=name), _row_by_row(inputs))
            for name, inputs in parts_run(component, len(pixels), hidden.shape[-1]).items()
        ),
    ]


def targets_of(path: Any, pixels: Tensor) -> Any:
    """Return a generation path's targets of images, the randomness of each from its index."""
    return path.targets(pixels, [np.random.default_rng(index) for index in range(len(pixels))])


def _run_part(path: Any, *inputs: Any, name: str) -> Any:
    return path.parts()[name](*inputs)


def _row_by_row(inputs: tuple[Any, ...]) -> bool:
    """Return True if all tensors of a call have one row for each row; under guidance an image has two."""
    return len({len(x) for x in tensors(inputs) if x.ndim}) == 1 and all(x.ndim for x in tensors(inputs))


CALLS: Mapping[str, Callable[[Any, Tensor], list[Call]]] = {
    "understanding_encoders": _encoder,
    "image_tokenizers": _tokenizer,
    "adaptors": _adaptor,
    "heads": _head,
    "backbones": _backbone,
    "generation": _generation,
}
"""By slot: what a component is decides its registration, not the names of its methods."""


def known_codes(head: Any, hidden: Tensor) -> Iterator[Tensor]:
    """Yield what is known before each code of a position: some codes (..., s), of s = 0 on."""
    codes = [torch.arange(hidden[..., 0].numel()).view(hidden.shape[:-1]) % size for size in head.codebooks]
    for s in range(len(codes)):
        yield torch.stack(codes, dim=-1)[..., :s]


def learning_from(component: Any, example: Tensor, slot: str) -> Tensor:
    """Return a scalar that training would follow: every part that learns has to be reached from it."""
    if slot == "backbones":
        positions = torch.arange(example.shape[1]).expand(example.shape)
        return component.logits(component(component.embed(example), positions=positions)).square().mean()
    if slot == "image_tokenizers":
        return torch.stack(list(component.losses(example).values())).sum()
    if slot == "generation":
        targets = targets_of(component, example)
        losses = component.losses(component.embed(targets), targets)
        return torch.stack([loss.mean() for loss in losses.values()]).sum()
    # a weighing of its own for each output: the sum of a normalised feature is always zero
    outputs = [call(component) for call in calls_of(component, example, slot)]
    return torch.stack([(weighing(output) * output).sum() for output in outputs]).sum()


def weighing(x: Tensor) -> Tensor:
    """Return fixed weights of x's shape that no symmetry of a layer undoes."""
    return torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).sin().view_as(x)


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and mappings."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]

"""What a part of a model does, as calls that every check can make: its methods, with inputs of the example.

Parts are told apart by what they offer, as their protocols in ``janus_modular.interfaces`` have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Call:
    """One method of a component with inputs; tensors of rows first, as any leaves of a tree."""

    name: str
    inputs: tuple[Any, ...]
    run: Callable[..., Any]  # (component, *inputs)

    def __call__(self, component: Any) -> Any:
        """Make the call."""
        return self.run(component, *self.inputs)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """Return the same call with every input tensor changed."""
        return Call(self.name, pytree.tree_map_only(Tensor, change, self.inputs), self.run)

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
def calls_of(component: Any, example: Tensor) -> list[Call]:
    """Return what a component offers to callers, each with inputs that the example gives rise to."""
    if hasattr(component, "logits"):  # a backbone; the example is token ids (B, T)
        positions = torch.arange(example.shape[1]).expand(example.shape)
        x = component.embed(example)
        hidden = component(x, positions=positions)
        return [
            Call("embed", (example,), lambda c, tokens: c.embed(tokens)),
            Call("forward", (x, positions), lambda c, x, positions: c(x, positions=positions)),
            Call("logits", (hidden,), lambda c, hidden: c.logits(hidden)),
        ]
    if hasattr(component, "encode"):  # an image tokenizer; the example is pixels
        height, width = example.shape[-2:]
        codes = component.encode(example)
        return [
            Call("encode", (example,), lambda c, pixels: c.encode(pixels)),
            Call("decode", (codes,), lambda c, codes: c.decode(codes, height=height, width=width)),
        ]
    if hasattr(component, "targets"):  # a generation path; the example is uint8 pictures
        targets = component.targets(example)
        hidden = component.embed(targets)
        return [
            Call("targets", (example,), lambda c, pixels: c.targets(pixels)),
            Call("embed", (targets,), lambda c, targets: c.embed(targets)),
            Call("losses", (hidden, targets), lambda c, hidden, targets: dict(c.losses(hidden, targets))),
        ]
    if hasattr(component, "codebooks"):  # a head; the example is hidden states
        nothing, *known = known_codes(component, example)
        first = Call("forward, code 1", (example,), lambda c, x: c(x, nothing.new_empty(*x.shape[:-1], 0)))
        return [first] + [
            Call(f"forward, code {s}", (example, before), lambda c, x, before: c(x, before))
            for s, before in enumerate(known, 2)
        ]
    if hasattr(component, "num_tokens"):  # an adaptor; the example is features in their grid
        grid = (example.shape[1], example.shape[2])
        return [Call("forward", (example.flatten(1, 2),), lambda c, features: c(features, grid))]
    return [Call("forward", (example,), lambda c, x: c(x))]


def known_codes(head: Any, hidden: Tensor) -> Iterator[Tensor]:
    """Yield what is known before each code of a position: some codes (..., s), of s = 0 on."""
    codes = [torch.arange(hidden[..., 0].numel()).view(hidden.shape[:-1]) % size for size in head.codebooks]
    for s in range(len(codes)):
        yield torch.stack(codes, dim=-1)[..., :s]


def learning_from(component: Any, example: Tensor) -> Tensor:
    """Return a scalar that training would follow: every part that learns has to be reached from it."""
    if hasattr(component, "logits"):
        positions = torch.arange(example.shape[1]).expand(example.shape)
        return component.logits(component(component.embed(example), positions=positions)).square().mean()
    if hasattr(component, "encode"):
        return torch.stack(list(component.losses(example).values())).sum()
    if hasattr(component, "targets"):
        targets = component.targets(example)
        losses = component.losses(component.embed(targets), targets)
        return torch.stack([loss.mean() for loss in losses.values()]).sum()
    # a weighing of its own for each output: the sum of a normalised feature is always zero
    outputs = [call(component) for call in calls_of(component, example)]
    return torch.stack([(weighing(output) * output).sum() for output in outputs]).sum()


def weighing(x: Tensor) -> Tensor:
    """Return fixed weights of x's shape that no symmetry of a layer undoes."""
    return torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).sin().view_as(x)


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and mappings."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]

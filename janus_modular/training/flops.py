"""Floating-point operations of a training step, by component, counted on the meta device.

A multiplication and an addition are two operations. Counted is what one forward and one backward pass need
with the modules that are trained: frozen modules have no gradients of weights, and modules below all trained
ones no backward pass. Padding, and activations that are computed again, are not counted. Attention is counted
over all pairs of positions of a sequence, as `torch.utils.flop_counter` and Chowdhery et al. 2022 (PaLM,
appendix B) do, though a causal layer needs half of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from janus_modular.capabilities import AlignsHiddenStates, DeclaresFlops
from janus_modular.model.batch import Batch
from janus_modular.model.model import JanusModel, stack_positions
from janus_modular.sequence import IGNORE_INDEX

COUNTED_LENGTH = 16
"""Positions of the shorter of the two sequences that a backbone's operations are counted for."""


@dataclass(frozen=True)
class SequenceFlops:
    """Operations of a backbone on one sequence of n positions: linear n + squared n**2."""

    linear: float
    squared: float

    def __call__(self, length: int) -> float:
        """Return the operations for a sequence of ``length`` positions."""
        return self.linear * length + self.squared * length**2


@dataclass(frozen=True)
class BackboneFlops:
    """Operations of the backbone."""

    sequence: Callable[[int], float] = SequenceFlops(0, 0)  # of so many positions
    label: float = 0.0  # the text logits of one position

    def __call__(self, lengths: Sequence[int], labels: int) -> float:
        """Return the operations for sequences of these lengths, with ``labels`` supervised positions."""
        return sum(map(self.sequence, lengths)) + self.label * labels


@dataclass
class FlopCounts:
    """Operations by component: of each image that is read, of each that is drawn, and of the backbone.

    An image that is smaller than the largest counts by its share of pixels, which is a little too much: its
    attention takes less.
    """

    read_image_pixels: int = 1  # of the largest image that is read
    read_image: dict[str, float] = field(default_factory=dict)
    drawn_image: dict[str, float] = field(default_factory=dict)
    target_image: dict[str, float] = field(default_factory=dict)  # of target images that are given as pixels
    backbone: BackboneFlops = BackboneFlops()
    without_gradient: BackboneFlops | None = None  # of batches whose gradients reach nothing that is trained
    trained_paths: frozenset[str] = frozenset()  # paths of images whose embeddings have gradients
    uncounted: dict[str, str] = field(
        default_factory=dict
    )  # components that are not counted, with the reason

    def of_batches(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Return the operations of a step's micro-batches by component."""
        total: dict[str, float] = {}
        for batch in batches:
            targets = batch.generation_pixels
            drawn = len(batch.image_seeds)
            for costs, count in (
                (self.read_image, self._images_read(batch)),
                (self.drawn_image, drawn),
                (self.target_image, 0 if targets is None else len(targets)),
            ):
                for name, cost in costs.items():
                    total[name] = total.get(name, 0.0) + cost * count
            labels = int((batch.labels != IGNORE_INDEX).sum())
            backbone = self.backbone
            if self.without_gradient and not batch.paths & self.trained_paths:
                backbone = self.without_gradient
            cost = backbone(sequence_lengths(batch), labels)
            total["backbone"] = total.get("backbone", 0.0) + cost
        return {name: count for name, count in total.items() if count}

    def _images_read(self, batch: Batch) -> float:
        """Return the number of images of the largest size that have as many pixels as a batch's images."""
        pixels = sum(len(group) * math.prod(group.shape[-2:]) for group in batch.input_groups)
        return pixels / self.read_image_pixels


def sequence_lengths(batch: Batch) -> list[int]:
    """Return the lengths of a batch's sequences, padding excluded."""
    steps = torch.arange(batch.tokens.shape[1])
    used = torch.ones_like(batch.tokens, dtype=torch.bool)
    if batch.lengths is not None:
        used = steps < batch.lengths[:, None]
    starts = (batch.positions == 0) & used
    numbers = starts.flatten().cumsum(0)[used.flatten()]
    return cast(list[int], torch.bincount(numbers)[1:].tolist())


def count_flops(model: JanusModel) -> FlopCounts:
    """Count the operations of training a model as it stands, trainable parameters and all.

    ``model`` may be on any device, and is not changed; a copy on the meta device is run. A component that
    `DeclaresFlops` is asked instead.
    """
    meta = copy.deepcopy(model).to("meta")
    counts = FlopCounts()
    _Counter(meta, counts).count()
    return counts


class _Counter:
    """Runs the components of a model on the meta device, in the order of a forward pass."""

    def __init__(self, model: JanusModel, counts: FlopCounts) -> None:
        self.model, self.counts = model, counts
        self.dtype = next(model.parameters()).dtype

    def count(self) -> None:
        model, counts = self.model, self.counts
        embedded = {"understanding": self._count_reading(), "generation": self._count_drawing()}
        counts.trained_paths = frozenset(path for path, has_gradient in embedded.items() if has_gradient)
        has_gradient, is_trained = bool(counts.trained_paths), _is_trained(model.backbone)

        def count_backbone() -> None:
            counts.backbone = self._backbone_flops(has_gradient)
            if has_gradient and not is_trained:
                counts.without_gradient = self._backbone_flops(False)

        self._count("backbone", count_backbone)
        self._count("generation", lambda: self._count_image_losses(has_gradient or is_trained))
        if isinstance(model.generation, AlignsHiddenStates) and model.align_layer is not None:
            pixels = self._pixels(model.understanding.encoder.pixels)
            self._count("understanding.encoder", lambda: self._count_alignment(pixels))

    def _count_reading(self) -> bool:
        """Count the understanding path; return True if its embeddings have a gradient."""
        encoder, adaptor = self.model.understanding.encoder, self.model.understanding.adaptor
        spec, costs = encoder.pixels, self.counts.read_image
        self.counts.read_image_pixels = spec.height * spec.width
        pixels, grid = self._pixels(spec), encoder.grid(spec.height, spec.width)
        has_gradient = _is_trained(encoder)

        def count_encoder() -> None:
            costs["understanding.encoder"] = _flops(
                encoder, grid[0] * grid[1], lambda: encoder(pixels), False
            )

        def count_adaptor() -> None:
            features = self._zeros(1, grid[0] * grid[1], encoder.feature_dim).requires_grad_(has_gradient)
            cost = _flops(adaptor, grid[0] * grid[1], lambda: adaptor(features, grid), has_gradient)
            costs["understanding.adaptor"] = cost

        self._count("understanding.encoder", count_encoder)
        self._count("understanding.adaptor", count_adaptor)
        return has_gradient or _is_trained(adaptor)

    def _count_drawing(self) -> bool:
        """Count the targets and the embeddings of an image; return True if the embeddings have a gradient."""
        path = self.model.generation
        frozen = path.frozen_submodules
        name = f"generation.{frozen[0] if len(frozen) == 1 else 'targets'}"
        self.targets: Any = None
        has_gradient = False

        def count_targets() -> None:
            pixels = self._zeros(1, 3, path.height, path.width).to(torch.uint8)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                self.targets = path.targets(pixels, [np.random.default_rng(0)])
            self.counts.target_image[name] = counter.get_total_flops()

        def count_embeddings() -> None:
            nonlocal has_gradient
            if self.targets is None:
                raise ValueError("its targets could not be made")
            if isinstance(path, DeclaresFlops):
                has_gradient = _is_trained(path)
                return
            with FlopCounterMode(display=False) as counter:
                embedded = path.embed(self.targets)
                has_gradient = embedded.requires_grad
                if has_gradient:
                    embedded.sum().backward()
            self.counts.drawn_image["generation"] = counter.get_total_flops()

        self._count(name, count_targets)
        self._count("generation", count_embeddings)
        return has_gradient

    def _backbone_flops(self, has_gradient: bool) -> BackboneFlops:
        backbone: Any = self.model.backbone
        dim = backbone.hidden_size

        def of_length(length: int) -> float:
            x = self._zeros(1, length, dim).requires_grad_(has_gradient)
            positions = torch.arange(length, device="meta")[None]
            return _run(lambda: backbone(x, positions=stack_positions(backbone, positions)))

        sequence: Callable[[int], float]
        if isinstance(backbone, DeclaresFlops):
            passes = _passes(backbone, has_gradient)

            def sequence(length: int) -> float:
                return passes * backbone.forward_flops(length)
        else:
            short, long = (of_length(n) for n in (COUNTED_LENGTH, 2 * COUNTED_LENGTH))
            squared = (long - 2 * short) / (2 * COUNTED_LENGTH**2)
            sequence = SequenceFlops(short / COUNTED_LENGTH - squared * COUNTED_LENGTH, squared)
        hidden = self._zeros(1, dim).requires_grad_(has_gradient or _is_trained(backbone))
        return BackboneFlops(sequence, _run(lambda: backbone.logits(hidden)))

    def _count_image_losses(self, has_gradient: bool) -> None:
        path, drawn = self.model.generation, self.counts.drawn_image
        if isinstance(path, DeclaresFlops):
            drawn["generation"] = _passes(path, has_gradient) * path.forward_flops(path.num_tokens)
            return
        if self.targets is None:
            raise ValueError("its targets could not be made")
        hidden = self._zeros(1, path.num_tokens, self.model.backbone.hidden_size)
        hidden.requires_grad_(has_gradient)
        cost = _run(lambda: torch.stack([x.sum() for x in path.losses(hidden, self.targets).values()]))
        drawn["generation"] = drawn.get("generation", 0.0) + cost

    def _count_alignment(self, pixels: Tensor) -> None:
        """Add what a loss between hidden states and features costs: the encoder's pass over target images."""
        encoder = self.model.understanding.encoder
        path = cast(AlignsHiddenStates, self.model.generation)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            features = encoder(pixels)
        self.counts.drawn_image["understanding.encoder"] = counter.get_total_flops()
        states = self._zeros(1, path.num_tokens, self.model.backbone.hidden_size).requires_grad_()
        drawn = self.counts.drawn_image
        cost = _run(lambda: torch.stack([x.sum() for x in path.alignment(states, features).values()]))
        drawn["generation"] = drawn.get("generation", 0.0) + cost

    def _count(self, name: str, action: Callable[[], None]) -> None:
        """Count a component; where it does not run on the meta device, note why."""
        try:
            action()
        except Exception as error:  # a third party's component may raise any
            problem = str(error).partition("\n")[0] or type(error).__name__
            self.counts.uncounted.setdefault(name, problem)

    def _pixels(self, spec: Any) -> Tensor:
        return self._zeros(1, 3, spec.height, spec.width)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device="meta", dtype=self.dtype)


def _run(call: Callable[[], Tensor]) -> float:
    """Return the operations of a function, and of the backward pass of its result."""
    with FlopCounterMode(display=False) as counter:
        output = call()
        if output.requires_grad:
            output.sum().backward()
    return float(counter.get_total_flops())


def _flops(component: Any, tokens: int, call: Callable[[], Tensor], has_gradient: bool) -> float:
    """Return the operations of a component on ``tokens`` tokens: declared, or those of ``call``."""
    if isinstance(component, DeclaresFlops):
        return _passes(component, has_gradient) * component.forward_flops(tokens)
    return _run(call)


def _passes(component: Any, has_gradient: bool) -> float:
    """Return the cost of training in forward passes: with gradients of the input 2, of all weights too 3."""
    parameters = list(component.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    share = trained / max(1, sum(p.numel() for p in parameters))
    return 1 + float(has_gradient or trained > 0) + share


def _is_trained(component: Any) -> bool:
    return any(p.requires_grad for p in component.parameters())


def describe_uncounted(uncounted: Mapping[str, str]) -> str:
    """Return the message about components whose operations are unknown; "" where there is none."""
    if not uncounted:
        return ""
    listed = "; ".join(f"{name} ({reason})" for name, reason in uncounted.items())
    return (
        f"FLOPs and MFU leave out components that cannot be counted on the meta device: {listed}. Expected"
        " forward_flops(tokens) of each (janus_modular.DeclaresFlops)."
    )

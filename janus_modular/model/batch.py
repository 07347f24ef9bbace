"""Batches: sequences as tensors, padded or packed several to a row."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from janus_modular.errors import PromptError
from janus_modular.positions import check_position_ids
from janus_modular.sequence import IGNORE_INDEX, Sequence


@dataclass
class MixedImages:
    """Images of several sizes, in groups of one size each."""

    groups: list[Tensor]  # each (n, 3, H, W) uint8
    group_index: list[tuple[int, int]]  # of each image, in order: its group, and its number there

    def __len__(self) -> int:
        return len(self.group_index)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MixedImages:
        """Return the images on another device."""
        return replace(self, groups=[group.to(device, non_blocking=non_blocking) for group in self.groups])

    def joined(self, features: Many[Tensor]) -> Tensor:
        """Return the features (M, D) of all images in their order, for those (n, P, D) of each group."""
        return torch.cat([features[group][index] for group, index in self.group_index])


@dataclass
class Batch:
    """The model's input (B rows, T positions). Rows are padded on the right.

    A row holds one or several sequences; each counts its positions from 0, so that attention keeps them
    apart. Padding counts from 0 too: it is a sequence of its own.
    """

    tokens: Tensor  # (B, T) token ids; the placeholder's at positions of images
    positions: Tensor  # (B, T) from 0 in each sequence
    labels: Tensor  # (B, T) the next text token where it is supervised, else IGNORE_INDEX
    understanding_mask: Tensor  # (B, T) bool: positions of input images
    generation_mask: Tensor  # (B, T) bool: positions of target images
    understanding_pixels: Tensor | MixedImages | None = None  # (N, 3, H, W) uint8, in order of position
    generation_pixels: Tensor | None = None  # (M', 3, h, w) uint8, in order of position
    generation_encoded: Tensor | None = None  # (M - M', ...) of images that are given encoded
    is_encoded: Tensor | None = None  # (M,) bool
    generation_supervised: Tensor | None = None  # (M,) bool
    lengths: Tensor | None = None  # (B,) positions in use, for rows of one sequence
    sources: list[str] = field(default_factory=list)  # names, indexed by the two below
    label_source: Tensor | None = None  # (B, T) index into sources
    image_source: Tensor | None = None  # (M,) index into sources
    image_seeds: list[tuple[int, int]] = field(default_factory=list)  # (M,) (seed, image number)
    position_ids: Tensor | None = None  # (P, B, T) on P axes, where the backbone declares them
    hidden: Tensor | None = None  # (B, T) bool: positions that no other attends to
    together: Tensor | None = None  # (B, T) positions of a sequence that attend to each other have one number
    idle: dict[str, int] = field(default_factory=dict)  # further runs of paths, as other processes have them

    @property
    def paths(self) -> frozenset[str]:
        """The paths that its images run through: understanding, generation."""
        return frozenset(self.runs)

    @property
    def input_groups(self) -> list[Tensor]:
        """The input images, in groups (n, 3, H, W) of one size each."""
        pixels = self.understanding_pixels
        if isinstance(pixels, MixedImages):
            return pixels.groups
        return [] if pixels is None else [pixels]

    @property
    def runs(self) -> dict[str, int]:
        """How often each path with images runs: the understanding path once for each size of images."""
        read = len(self.input_groups)
        drawn = int(self.generation_pixels is not None or self.generation_encoded is not None)
        return {path: runs for path, runs in {"understanding": read, "generation": drawn}.items() if runs}

    def unsupervised_row(self) -> Batch:
        """Return a batch of one text position, the first, in which nothing is supervised."""
        return Batch(
            tokens=self.tokens[:1, :1],
            positions=self.positions[:1, :1],
            labels=torch.full_like(self.labels[:1, :1], IGNORE_INDEX),
            understanding_mask=torch.zeros_like(self.understanding_mask[:1, :1]),
            generation_mask=torch.zeros_like(self.generation_mask[:1, :1]),
        )

    def image_rngs(self) -> list[np.random.Generator]:
        """Return a new generator for each image in ``generation_pixels``."""
        encoded = [] if self.is_encoded is None else self.is_encoded.tolist()
        return [
            np.random.default_rng(s) for s, skip in zip(self.image_seeds, encoded, strict=True) if not skip
        ]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor | MixedImages)}
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()
        }
        return replace(self, **moved)


def pack(sequences: Many[Sequence], length: int) -> list[list[Sequence]]:
    """Fill rows of ``length`` positions with whole sequences, first fit, longest first.

    Raises:
        PromptError: a sequence is longer than a row.
    """
    rows: list[list[Sequence]] = []
    free: list[int] = []  # positions of each row
    for sequence in sorted(sequences, key=len, reverse=True):
        if len(sequence) > length:
            raise PromptError(
                f"a sequence of {len(sequence)} positions does not fit into rows of {length}"
                f" (source '{sequence.source}'): raise the packing length or shorten the sample"
            )
        row = next((i for i, positions in enumerate(free) if positions >= len(sequence)), None)
        if row is None:
            rows.append([])
            free.append(length)
            row = len(rows) - 1
        rows[row].append(sequence)
        free[row] -= len(sequence)
    return rows


def collate(rows: Many[Many[Sequence]] | Many[Sequence], *, pad: int = 0) -> Batch:
    """Return rows of sequences (or of a single sequence each) as a `Batch`, padded to the longest row."""
    packed: list[list[Sequence]] = [[row] if isinstance(row, Sequence) else list(row) for row in rows]
    sequences = [sequence for row in packed for sequence in row]
    images = [image for sequence in sequences for image in sequence.generation_images]
    is_encoded = [image.dtype != np.uint8 for image in images]
    sources = sorted({sequence.source for sequence in sequences})
    shape = (len(packed), max(sum(map(len, row)) for row in packed))
    tokens = np.full(shape, pad, np.int64)
    positions = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    label_source = np.zeros(shape, np.int64)
    understanding_mask = np.zeros(shape, np.bool_)
    generation_mask = np.zeros(shape, np.bool_)
    together = np.zeros(shape, np.int64)
    hidden = np.zeros(shape, np.bool_)
    for i, row in enumerate(packed):
        start = 0
        for sequence in row:
            span = np.s_[i, start : start + len(sequence)]
            tokens[span] = sequence.tokens
            positions[span] = np.arange(len(sequence))
            labels[span] = sequence.labels
            label_source[span] = sources.index(sequence.source)
            understanding_mask[span] = sequence.understanding_mask
            generation_mask[span] = sequence.generation_mask
            if sequence.hidden is not None:
                hidden[span] = sequence.hidden
            if sequence.together is not None:
                together[span] = sequence.together
            start += len(sequence)
        positions[i, start:] = np.arange(shape[1] - start)
    position_ids = _position_ids(packed, positions)
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        understanding_mask=torch.from_numpy(understanding_mask),
        generation_mask=torch.from_numpy(generation_mask),
        understanding_pixels=_stack_mixed([p for s in sequences for p in s.understanding_pixels]),
        generation_pixels=_stack([x for x, skip in zip(images, is_encoded, strict=True) if not skip]),
        generation_encoded=_stack([x for x, take in zip(images, is_encoded, strict=True) if take]),
        is_encoded=torch.tensor(is_encoded, dtype=torch.bool) if images else None,
        generation_supervised=torch.tensor([x for s in sequences for x in s.generation_supervised]),
        lengths=torch.tensor([sum(map(len, row)) for row in packed]),
        sources=sources,
        label_source=torch.from_numpy(label_source),
        hidden=torch.from_numpy(hidden) if hidden.any() else None,
        together=torch.from_numpy(together) if any(s.together is not None for s in sequences) else None,
        position_ids=None if position_ids is None else torch.from_numpy(position_ids),
        image_seeds=[(s.seed, i) for s in sequences for i in range(len(s.generation_images))],
        image_source=torch.tensor([sources.index(s.source) for s in sequences for _ in s.generation_images]),
    )


def _position_ids(packed: Many[Many[Sequence]], positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return the ids (P, B, T) of rows of sequences, None if no sequence has any.

    Padding, and sequences without ids (plain text), have equal ids on all axes.

    Raises:
        PromptError: a sequence has ids on another number of axes, or images and no ids.
    """
    axes = max((len(s.position_ids) for row in packed for s in row if s.position_ids is not None), default=0)
    if not axes:
        return None
    ids = np.tile(positions, (axes, 1, 1))
    for i, row in enumerate(packed):
        check_position_ids(row, axes)
        start = 0
        for sequence in row:
            if sequence.position_ids is not None:
                ids[:, i, start : start + len(sequence)] = sequence.position_ids
            start += len(sequence)
    return ids


def _stack(images: list[np.ndarray]) -> Tensor | None:
    return torch.from_numpy(np.stack(images)) if images else None


def _stack_mixed(images: list[NDArray[np.uint8]]) -> Tensor | MixedImages | None:
    sizes = sorted({image.shape for image in images})
    if len(sizes) < 2:
        return _stack(images)
    groups: list[list[NDArray[np.uint8]]] = [[] for _ in sizes]
    group_index = []
    for image in images:
        number = sizes.index(image.shape)
        group_index.append((number, len(groups[number])))
        groups[number].append(image)
    return MixedImages([torch.from_numpy(np.stack(group)) for group in groups], group_index)

"""The weights of graphs: their tensors in the checkpoint, and their locations in the bundle.

A lowered graph contains no weights: its initialisers refer to a placeholder, ``weights/WEIGHT_SET``. Once the
weights are written, binding replaces the placeholder by a file and a byte range.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from janus_export.bundle.files import Stored, chunks
from janus_export.errors import ExportError
from janus_modular import list_briefly
from janus_modular.safetensors_headers import byte_ranges
from janus_modular.weights.writing import DTYPES

FOLDER = "weights"
PREFIX = "model."  # graphs hold the model under this name


def native_names(model: nn.Module) -> dict[str, str]:
    """Map every native name of a weight to the one under which it is stored: tied weights share one."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()
    }


def detach(graph: ir.Model, names: Mapping[str, str], weight_set: str) -> None:
    """Point the weights of a fresh graph to their stored names in ``weights/WEIGHT_SET``.

    Raises:
        ExportError: the graph holds a weight that the model's state dict does not name.
    """
    for name, value in graph.graph.initializers.items():
        native = names.get(name.removeprefix(PREFIX))
        if native is None:
            if isinstance(getattr(value.const_value, "raw", None), torch._subclasses.FakeTensor):
                raise ExportError(
                    f"a graph uses the tensor '{name}', which is no weight of the model's state dict"
                )
            continue
        if value.shape is not None and value.dtype is not None and 0 in value.shape.numpy():
            empty = np.zeros(value.shape.numpy(), value.dtype.numpy())
            value.const_value = ir.Tensor(empty, name=value.name)  # ONNX Runtime cannot read 0 bytes
            continue
        value.const_value = unbound(weight_set, native, value.dtype, value.shape, value.name)


def unbound(weight_set: str, stored: str, dtype: Any, shape: Any, name: str | None) -> ir.ExternalTensor:
    """Return a placeholder tensor that refers to ``stored`` in ``weights/WEIGHT_SET``."""
    return ir.ExternalTensor(
        f"{FOLDER}/{weight_set}/{stored}", None, None, dtype, shape=shape, name=name or stored
    )


Pointer = tuple[str, str]
"""A set of weights (fp32, cpu-int4, ...), and the name that a weight is stored by."""


def pointers(graph: ir.Model) -> list[tuple[ir.Value, Pointer]]:
    """Return the initialisers of a graph that are unbound, and what they point to."""
    return [(value, _pointer(tensor)) for value, tensor in _pointing(graph)]


def group_by_users(graphs: Mapping[str, ir.Model]) -> dict[tuple[str, frozenset[str]], set[str]]:
    """Group stored names by their set of weights and the graphs that point to them.

    Each group is a file, so that no graph, variant or mode needs bytes that only others use.
    """
    users: dict[Pointer, set[str]] = {}
    for name, graph in graphs.items():
        for _, pointer in pointers(graph):
            users.setdefault(pointer, set()).add(name)
    groups: dict[tuple[str, frozenset[str]], set[str]] = {}
    for (weight_set, stored), names in users.items():
        groups.setdefault((weight_set, frozenset(names)), set()).add(stored)
    return groups


def stored_name(value: ir.Value) -> str | None:
    """Return the stored name of the weight that a value stands for; None where it is no weight."""
    if not isinstance(value.const_value, ir.ExternalTensor):
        return None
    return str(value.const_value.location).split("/", 2)[2]


def bind(graph: ir.Model, files: Mapping[Pointer, Path]) -> ir.Model:
    """Point a graph's weights at byte ranges of the files that hold them; return it."""
    ranges: dict[Path, dict[str, tuple[int, int]]] = {}
    for value, old in _pointing(graph):
        path = files[pointer := _pointer(old)]
        if path not in ranges:
            ranges[path] = byte_ranges(path)
        offset, length = ranges[path][pointer[1]]
        value.const_value = ir.ExternalTensor(
            f"{FOLDER}/{path.name}", offset, length, old.dtype, shape=old.shape, name=old.name
        )
    return graph


def _pointer(tensor: ir.ExternalTensor) -> Pointer:
    _, weight_set, stored = str(tensor.location).split("/", 2)
    return weight_set, stored


def _pointing(graph: ir.Model) -> Iterator[tuple[ir.Value, ir.ExternalTensor]]:
    for value in graph.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value, value.const_value


class Source:
    """The tensors of a checkpoint, read one at a time under the names that graphs store them by."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Take the model on the meta device, which declares the weights, and the checkpoint's tensors.

        Raises:
            ExportError: a weight is missing, or of another shape.
        """
        names = native_names(model)
        self.tensors = tensors
        self.under: dict[str, str] = {}  # stored name -> the name that the checkpoint has it by
        for name, stored in names.items():
            if name in tensors:
                self.under.setdefault(stored, name)
        state = model.state_dict(keep_vars=True)
        self.shapes = {stored: tuple(state[stored].shape) for stored in names.values()}
        self.dtypes = {stored: state[stored].dtype for stored in names.values()}
        if missing := sorted(set(self.shapes) - set(self.under)):
            raise ExportError(
                f"{origin} lacks {len(missing)} weights of its own config: {', '.join(missing[:5])}"
            )
        for stored, name in self.under.items():
            shape = tuple(tensors[name].shape)
            if shape != self.shapes[stored]:
                raise ExportError(f"{origin}: {name} is {shape}, its config says {self.shapes[stored]}")

    def stored(self, names: Iterable[str], dtype: torch.dtype) -> list[Stored]:
        """Return functions that write these weights in ``dtype``; integers keep their own."""
        return [
            Stored(
                name,
                DTYPES[self._stored_dtype(name, dtype)],
                self.shapes[name],
                partial(self._chunks, name, dtype),
            )
            for name in sorted(names)
        ]

    def rows(self, name: str) -> Iterator[Any]:
        """Yield a weight's rows in small chunks, as float32 arrays."""
        yield from self._chunks(name, torch.float32, most=1 << 24)

    def overflow(self, dtype: torch.dtype) -> ExportError:
        """Return the error that names every weight which is not finite in ``dtype``; it reads all of them."""
        problems = []
        for stored, name in sorted(self.under.items()):
            if self.dtypes[stored].is_floating_point and (problem := _overflow(self.tensors[name], dtype)):
                problems.append(f"{name} ({problem})")
        name = str(dtype).removeprefix("torch.")
        hint = "" if dtype == torch.float32 else f"; for numbers beyond {name}, use the variant fp32"
        return ExportError(
            f"weights that are not finite in {name}, whose largest number is {torch.finfo(dtype).max:g}:"
            f" {list_briefly(problems)}. Such a bundle would generate noise. NaN and"
            f" infinities are in the checkpoint itself: use an earlier checkpoint{hint}."
        )

    def _stored_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        own = self.dtypes[name]
        return dtype if own.is_floating_point else own

    def _chunks(self, name: str, dtype: torch.dtype, most: int = 1 << 26) -> Iterator[Any]:
        tensor = self.tensors[self.under[name]].detach()
        stored_dtype = self._stored_dtype(name, dtype)
        if not tensor.shape:
            tensor = tensor.reshape(1)
        for part in chunks(len(tensor), stored_dtype.itemsize * tensor[0].numel(), most):
            chunk = tensor[part].to(stored_dtype).contiguous()
            if not is_finite(chunk):
                raise self.overflow(stored_dtype)
            yield chunk.numpy() if stored_dtype != torch.bfloat16 else chunk.view(torch.int16).numpy()


def is_finite(x: Tensor) -> bool:
    """Return True if no number of ``x`` is NaN or infinite; one pass, since the extremes propagate NaN."""
    return not x.is_floating_point() or not x.numel() or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def _overflow(tensor: Tensor, dtype: torch.dtype) -> str:
    """Describe the values of a weight that are not finite in ``dtype``; empty if all are finite."""
    x = tensor.detach().float()
    if is_finite(x.to(dtype)):
        return ""
    if is_finite(x):
        return f"up to {x.abs().max():g}"
    return f"{int(x.isnan().sum())} NaN, {int(x.isinf().sum())} infinite, of {x.numel()}"

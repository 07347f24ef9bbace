"""From a declared graph to standard ONNX, without its weights in memory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, product
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental import _config as tracing

from janus_export.errors import ExportError
from janus_export.onnx_export.diagnostics import explained
from janus_export.onnx_export.graphs import Graph
from janus_export.onnx_export.pixel_magnitude import add_magnitude
from janus_export.onnx_export.translations import (
    all_translations,
    cast_explicitly,
    divide_by_roots,
    share_shapes,
)
from janus_modular.graph_specs import factor_and_axis

OPSET = 24
"""The first opset with TensorScatter."""

UNBACKED = re.compile(r"\bu\d+\b")
"""Matches torch's name for a length that depends on values."""


def faked(module: nn.Module, dtype: torch.dtype | None = None) -> FakeTensorMode:
    """Replace a module's parameters and persistent buffers by fake tensors without memory.

    Floating-point ones get the dtype ``dtype``. Other buffers (rotary tables, for example) are computed and
    small, and stay real. Tied weights stay tied.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, torch.Tensor] = {}

    def fake(old: torch.Tensor) -> torch.Tensor:
        if id(old) not in fakes:
            fake_dtype = dtype if dtype is not None and old.is_floating_point() else old.dtype
            with mode:
                empty = torch.empty(old.shape, dtype=fake_dtype)
            is_parameter = isinstance(old, nn.Parameter)
            fakes[id(old)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        return fakes[id(old)]

    kept: list[torch.Tensor] = []  # an id is unique only while its tensor exists
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                kept.append(parameter)
                owner._parameters[name] = fake(parameter)  # type: ignore[assignment]  # a parameter again
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                kept.append(buffer)
                owner._buffers[name] = fake(buffer)
    return mode


def to_onnx(graph: Graph, mode: FakeTensorMode) -> ir.Model:
    """Export one graph whose module was `faked`; initialisers of weights have names and shapes, but no data.

    Raises:
        ExportError: the module cannot be exported; names the submodule.
    """
    specs, axes = graph.inputs, graph.ranges.axis
    translations = all_translations(graph.module)
    with mode, torch.no_grad(), without_warnings(), explained(graph.name, graph.module):
        # Axes are traced with a length of at least 2, because torch specialises 1.
        lengths = {name: max(2, axes(name).typical) for spec in specs for name in spec.axes}
        example = [torch.zeros(spec.sized(lengths), dtype=graph.torch_dtype(spec)) for spec in specs]
        dims = {name: Dim(name, min=axes(name).min, max=axes(name).max) for name in lengths}
        shapes = [
            {axis: _dim(size, dims) for axis, size in enumerate(spec.shape) if isinstance(size, str)}
            for spec in specs
        ]
        single = slice(None) if graph.listed is None else slice(graph.listed)
        rest = [] if graph.listed is None else [slice(graph.listed, None)]
        arguments = (*example[single], *(example[listed] for listed in rest))
        dynamic = (*shapes[single], *(shapes[listed] for listed in rest))
        # By default, torch.onnx.export fixes an axis if the module assumes the example's length.
        with tracing.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # lengths may be 1
            traced = torch.export.export(
                graph.module.eval(),
                arguments,
                dynamic_shapes=dynamic,
                prefer_deferred_runtime_asserts_over_guards=True,  # rows are images * G, for a G seen later
            )
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            input_names=[spec.name for spec in graph.inputs],
            output_names=[spec.name for spec in graph.computed],
            custom_translation_table=translations,
            optimize=False,  # the optimiser needs the values of weights
            verbose=False,
        )
    assert program is not None
    model = program.model
    _name_axes(model, graph)
    share_shapes(model)
    divide_by_roots(model)
    cast_explicitly(model)
    if graph.is_measured:
        add_magnitude(model, graph.outputs[-1].name)
    for each in (
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),  # stack traces: nine tenths of the file, local paths
    ):
        each(model)
    return model


def _name_axes(model: ir.Model, graph: Graph) -> None:
    """Name the axes of outputs as declared, not by the expressions that the tracer found."""
    inputs = zip(model.graph.inputs, graph.inputs, strict=True)
    outputs = zip(model.graph.outputs, graph.computed, strict=True)
    for (value, spec), is_output in chain(product(inputs, [False]), product(outputs, [True])):
        declared = list(spec.shape)
        traced = [size if isinstance(size, int) else str(size.value) for size in value.shape or ()]
        if traced != declared and not (is_output and _may_equal(traced, declared)):
            raise ExportError(
                f"the graph '{graph.name}' cannot be exported: its '{spec.name}' is traced as"
                f" ({', '.join(map(str, traced))}), where ({', '.join(map(str, declared))}) was declared."
                " Lengths may depend on those of inputs, neither on values (u0, ...) nor on the example's."
            )
        value.shape = ir.Shape(declared)


def _may_equal(traced: Sequence[int | str], declared: Sequence[int | str]) -> bool:
    """Return True if traced lengths may equal the declared ones (images * (rows // images))."""
    return len(traced) == len(declared) and all(
        length == name if isinstance(length, int) or isinstance(name, int) else not UNBACKED.search(length)
        for length, name in zip(traced, declared, strict=True)
    )


def _dim(size: str, dims: Mapping[str, Any]) -> Any:
    """Return torch's dimension for an axis, or for a multiple of an axis."""
    factor, name = factor_and_axis(size)
    return dims[name] if factor == 1 else factor * dims[name]


@contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress harmless warnings of the exporter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name")  # two axes of one size: intended
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # torch's own
        yield

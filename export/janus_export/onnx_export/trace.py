"""From a declared graph to standard ONNX, without its weights in memory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, product

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental import _config as tracing

from janus_export.bundle.axes import Axis
from janus_export.errors import ExportError
from janus_export.onnx_export.diagnostics import explained
from janus_export.onnx_export.graphs import Graph, Slot
from janus_export.onnx_export.pixel_magnitude import add_magnitude
from janus_export.onnx_export.translations import (
    all_translations,
    cast_explicitly,
    divide_by_roots,
    share_shapes,
)

OPSET = 24
"""The first with TensorScatter."""


def faked(module: nn.Module, dtype: torch.dtype | None = None) -> FakeTensorMode:
    """Replace what a checkpoint holds of a module by fakes that have a shape and no memory.

    Those are parameters and persistent buffers, in ``dtype`` where they are floating-point; other buffers
    (rotary tables, say) are computed, small, and stay real. Tied weights stay tied.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, torch.Tensor] = {}

    def fake(old: torch.Tensor) -> torch.Tensor:
        if id(old) not in made:
            kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
            with mode:
                empty = torch.empty(old.shape, dtype=kind)
            is_parameter = isinstance(old, nn.Parameter)
            made[id(old)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        return made[id(old)]

    kept: list[torch.Tensor] = []  # ids are those of living tensors only
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
    """Export one graph whose module was `faked`; initialisers of weights are named and shaped, and empty.

    Raises:
        ExportError: the module does something that no graph can hold; says in which of its modules.
    """
    slots = graph.inputs
    translations = all_translations(graph.module)
    with mode, torch.no_grad(), without_warnings(), explained(graph.name, graph.module):
        example = [_example(slot) for slot in slots]
        dims = {
            axis.name: Dim(axis.name, min=axis.min, max=axis.max) for slot in slots for axis in _axes(slot)
        }
        shapes = [
            {i: dims[axis.name] for i, axis in enumerate(slot.shape) if isinstance(axis, Axis)}
            for slot in slots
        ]
        single = slice(None) if graph.listed is None else slice(graph.listed)
        rest = [] if graph.listed is None else [slice(graph.listed, None)]
        arguments = (*example[single], *(example[listed] for listed in rest))
        dynamic = (*shapes[single], *(shapes[listed] for listed in rest))
        # Left to itself, torch.onnx.export fixes an axis that the module takes to be of the example's length.
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
            input_names=[slot.name for slot in graph.inputs],
            output_names=[slot.name for slot in graph.computed],
            custom_translation_table=translations,
            optimize=False,  # the optimiser wants the weights' values
            verbose=False,
        )
    assert program is not None
    model = program.model
    _name_axes(model, graph)
    share_shapes(model)
    divide_by_roots(model)
    cast_explicitly(model)
    if graph.measured:
        add_magnitude(model, graph.outputs[-1].name)
    for each in (
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),  # stack traces: nine tenths of the file, and paths of ours
    ):
        each(model)
    return model


def _name_axes(model: ir.Model, graph: Graph) -> None:
    """Call the axes of outputs what they were declared as, not what the tracer found them to equal."""
    inputs = zip(model.graph.inputs, graph.inputs, strict=True)
    outputs = zip(model.graph.outputs, graph.computed, strict=True)
    for (value, slot), is_output in chain(product(inputs, [False]), product(outputs, [True])):
        declared = [axis.name if isinstance(axis, Axis) else axis for axis in slot.shape]
        found = [size if isinstance(size, int) else str(size.value) for size in value.shape or ()]
        if found != declared and not (is_output and _may_equal(found, declared)):
            raise ExportError(
                f"the graph '{graph.name}' cannot be exported: its '{slot.name}' is traced as"
                f" ({', '.join(map(str, found))}), where ({', '.join(map(str, declared))}) was declared."
                " Lengths may depend on those of inputs, neither on values (u0, ...) nor on the example's."
            )
        value.shape = ir.Shape(declared)


def _may_equal(found: Sequence[int | str], declared: Sequence[int | str]) -> bool:
    """Say whether traced lengths may be the declared ones under other names (images * (rows // images))."""
    return len(found) == len(declared) and all(
        one == other if isinstance(one, int) or isinstance(other, int) else not re.search(r"\bu\d+\b", one)
        for one, other in zip(found, declared, strict=True)
    )


def _example(slot: Slot) -> torch.Tensor:
    """Make an input of typical size; of axes that may be 1, at least 2, since 1 would be taken as fixed."""
    size = [max(2, axis.typical) if isinstance(axis, Axis) else axis for axis in slot.shape]
    return torch.zeros(size, dtype=slot.dtype)


def _axes(slot: Slot) -> list[Axis]:
    return [axis for axis in slot.shape if isinstance(axis, Axis)]


@contextmanager
def without_warnings() -> Iterator[None]:
    """Leave out what the exporter warns of where nothing is wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name")  # two axes of one size: intended
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # torch's own
        yield

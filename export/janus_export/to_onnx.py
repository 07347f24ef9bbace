"""From a declared graph to standard ONNX, without its weights in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from janus_export.axes import Axis
from janus_export.graphs import Graph, Slot

OPSET = 24
"""The first with TensorScatter."""


def faked(module: nn.Module) -> FakeTensorMode:
    """Replace a module's parameters by fakes that have a shape and no memory; buffers stay real."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shared: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in shared:
                with mode:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                shared[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            owner._parameters[name] = shared[id(parameter)]
    return mode


def to_onnx(graph: Graph, mode: FakeTensorMode) -> ir.Model:
    """Export one graph whose module was `faked`; initialisers of weights are named and shaped, and empty.

    Raises:
        ExportError: the module does something that no graph can hold; says in which of its modules.
    """
    slots = graph.inputs
    with mode, torch.no_grad(), _quiet():
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
        program = torch.onnx.export(
            graph.module,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            input_names=[slot.name for slot in graph.inputs],
            output_names=[slot.name for slot in graph.outputs],
            optimize=False,  # the optimiser wants the weights' values
            verbose=False,
        )
    model = program.model
    for each in (passes.CommonSubexpressionEliminationPass(), passes.RemoveUnusedNodesPass()):
        each(model)
    return model


def _example(slot: Slot) -> torch.Tensor:
    """Make an input of typical size; of axes that may be 1, at least 2, since 1 would be taken as fixed."""
    size = [max(2, axis.typical) if isinstance(axis, Axis) else axis for axis in slot.shape]
    return torch.zeros(size, dtype=slot.dtype)


def _axes(slot: Slot) -> list[Axis]:
    return [axis for axis in slot.shape if isinstance(axis, Axis)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about packages it does not find off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

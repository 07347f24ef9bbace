"""Writes graphs in a form that other ONNX tools can read.

ONNX allows more than those tools expect: a Constant may hold a bare number or list (``value_ints``), and an
initialiser may be described once more in ``value_info``. Polygraphy's constant folding, ONNX Runtime's
quantiser and its symbolic shape inference fail on one or the other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

BARE = {
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_float": np.float32,
    "value_floats": np.float32,
}
"""Attributes of a Constant that hold numbers outside of a tensor, and the dtype that ONNX gives them."""


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph whose weights lie in other files; constants are tensors, tensors are described once.

    Raises:
        onnx.checker.ValidationError: the graph is invalid.
    """
    constants_as_tensors(model)
    proto = ir.to_proto(model)
    names = {tensor.name for tensor in proto.graph.initializer}
    described = [value for value in proto.graph.value_info if value.name not in names]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(described)
    onnx.save(proto, path)
    onnx.checker.check_model(path)  # by path, so that the weight files are checked too


def constants_as_tensors(model: ir.Model) -> None:
    """Make every Constant hold a tensor (``value``) instead of bare numbers."""
    for node in model.graph.all_nodes():
        if node.op_type != "Constant" or node.domain:
            continue
        for name, dtype in BARE.items():
            if name in node.attributes:
                numbers = np.array(node.attributes.pop(name).value, dtype)
                node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(numbers))

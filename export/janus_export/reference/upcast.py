"""Half-precision graphs in float32, so that a CPU can run them: the weights keep their rounding."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import onnx_ir as ir

from janus_export.bundle.bundle import Bundle

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def upcast_bundle(bundle: Bundle, variant: str, folder: Path) -> Bundle:
    """Write a variant's graphs into ``folder`` with every half-precision tensor as float32."""
    manifest = deepcopy(bundle.manifest)
    files = manifest["variants"][variant]["files"]
    for graph, file in files.items():
        model = upcast(ir.load(bundle.folder / file))
        files[graph] = f"{graph}.onnx"
        ir.save(model, folder / files[graph], external_data=f"{graph}.data")
    return Bundle(folder, manifest)


def upcast(model: ir.Model) -> ir.Model:
    """Convert a graph's half-precision tensors to float32, in place; return the graph."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype in HALVES:
                value.const_value = _wide(value.const_value)
        for value in (*graph.inputs, *graph.initializers.values()):
            _retype(value)
        for node in graph:
            for value in node.outputs:
                _retype(value)
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in HALVES:
                    node.attributes[name] = ir.AttrTensor(name, _wide(attribute.value))
                elif (
                    name in ("to", "dtype", "output_dtype", "softmax_precision") and attribute.value in HALVES
                ):
                    node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    return model


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return a lazy float32 copy of a tensor, converted when written: only one at a time is in memory."""

    def convert() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().astype("float32"), name=tensor.name)

    return ir.LazyTensor(
        convert, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name
    )


def _retype(value: ir.Value) -> None:
    if value.dtype in HALVES:
        value.dtype = ir.DataType.FLOAT

"""Model configurations of Triton (``config.pbtxt``), as text of a protocol buffer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from janus_export.errors import BundleError

DTYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
"""Triton's names of dtypes."""

QUEUE_DELAY = 2_000
"""Microseconds that a batch waits for more requests."""


def graph_config(name: str, contract: Mapping[str, Any], max_batch: int) -> str:
    """Return the configuration of a graph whose tensors all begin with one axis, which Triton batches.

    Raises:
        BundleError: its tensors begin with different axes.
    """
    tensors = [*contract["inputs"], *contract["outputs"]]
    if len({str(tensor["shape"][:1]) for tensor in tensors}) != 1:
        raise BundleError(
            f"the graph '{name}' has tensors that begin with different axes: Triton cannot batch it"
        )
    sides = {
        "input": [
            _tensor(tensor["name"], tensor["dtype"], tensor["shape"][1:]) for tensor in contract["inputs"]
        ],
        "output": [
            _tensor(tensor["name"], tensor["dtype"], tensor["shape"][1:]) for tensor in contract["outputs"]
        ],
    }
    return (
        f'name: "{name}"\nbackend: "onnxruntime"\ndefault_model_filename: "{graph_file(name)}"\n'
        f"max_batch_size: {max_batch}\n"
        f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_DELAY} }}\n{_sides(sides)}"
    )


def graph_file(name: str) -> str:
    """Return the name of a graph's file in the folder of its version."""
    return f"{name}.onnx"


def loop_config(name: str, parameters: Mapping[str, str]) -> str:
    """Return the configuration of the model that answers and draws: several responses for a request."""
    inputs = [
        _text("mode", [1], optional=True),
        _text("prompt", [1]),
        _text("images", [-1], optional=True),
        _text("settings", [1], optional=True),
    ]
    outputs = [_text("event", [1]), _text("text", [1]), _text("images", [-1])]
    listed = "".join(
        f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}\n"
        for key, value in parameters.items()
    )
    return (
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: 0\n'
        "model_transaction_policy { decoupled: true }\n"
        "instance_group [ { count: 1 kind: KIND_CPU } ]\n"  # one engine, which runs all requests in one batch
        f"{listed}{_sides({'input': inputs, 'output': outputs})}"
    )


def _sides(sides: Mapping[str, Iterable[str]]) -> str:
    return "".join(f"{side} {{ {tensor} }}\n" for side, tensors in sides.items() for tensor in tensors)


def _tensor(name: str, dtype: str, shape: Sequence[Any]) -> str:
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if not sizes:  # one number a row: Triton has no tensor without axes, and gives it back by this
        return f'name: "{name}" data_type: {DTYPES[dtype]} dims: [ 1 ] reshape {{ shape: [ ] }}'
    return f'name: "{name}" data_type: {DTYPES[dtype]} dims: {sizes}'


def _text(name: str, dims: Sequence[int], *, optional: bool = False) -> str:
    return f'name: "{name}" data_type: TYPE_STRING dims: {list(dims)}' + " optional: true" * optional

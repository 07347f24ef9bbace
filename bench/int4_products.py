"""What bounds a step in int4: MatMulNBits alone, from memory and from the processor's caches.

    python bench/int4_products.py [--rows 2] [--threads 2]

Nearly all of a step are such products. From memory: one after the other over 400 MB of different weights
(2048 x 5632 each). From caches: one small matrix (2048 x 2048) again and again, which shows the kernel's own
speed. If reading and computing overlapped, the slower of them would be the speed; if they take turns, times
add up. Fused: the two products that share an input (gate and up, 2048 x 11264) as one.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from importlib import metadata
from statistics import median
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from janus_export.bench.bytes_read import read_bandwidth
from janus_export.bench.run import processor_name
from janus_export.runtimes.ort.library import onnxruntime

LARGE, SMALL, FUSED = (2048, 5632), (2048, 2048), (2048, 11264)  # inputs, outputs
TOTAL = 400_000_000  # bytes of weights: more than caches hold
NOISE = np.random.default_rng(0).integers(0, 256, 1 << 22, np.uint8)


@dataclass(frozen=True)
class Form:
    """How weights are packed, and what they are multiplied in."""

    bits: int
    block: int
    level: int  # 1: float32, 4: int8
    shape: tuple[int, int] = LARGE

    @property
    def size(self) -> int:
        """Bytes of one matrix."""
        inputs, outputs = self.shape
        return inputs * outputs * self.bits // 8 + inputs // self.block * outputs * 4

    def __str__(self) -> str:
        level = {1: "float32", 4: "int8"}[self.level]
        fused = ", fused" if self.shape == FUSED else ""
        return f"{self.bits} bits, blocks of {self.block}, {level}{fused}"


FORMS = (
    *(Form(4, block, 4) for block in (32, 64, 128, 256)),
    Form(4, 32, 4, FUSED),
    Form(4, 32, 1),
    Form(8, 32, 4),
    Form(8, 128, 4),
)


def seconds(form: Form, shape: tuple[int, int], count: int, rows: int, threads: int) -> float:
    """Time a product: the median of many runs through ``count`` different matrices."""
    inputs, outputs = shape
    blocks = inputs // form.block
    nodes, weights = [], []
    for i in range(count):
        packed = np.resize(np.roll(NOISE, 977 * i), (outputs, blocks, form.block * form.bits // 8))
        scales = np.full((outputs, blocks), 1e-3, np.float32)
        weights += [numpy_helper.from_array(packed, f"w{i}"), numpy_helper.from_array(scales, f"s{i}")]
        attributes = {"K": inputs, "N": outputs, "bits": form.bits, "block_size": form.block}
        attributes["accuracy_level"] = form.level
        given = ["x", f"w{i}", f"s{i}"]
        nodes.append(helper.make_node("MatMulNBits", given, [f"y{i}"], domain="com.microsoft", **attributes))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inputs])
    y = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [rows, outputs]) for i in range(count)]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "products", [x], y, weights)
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    given = {"x": np.random.default_rng(0).standard_normal((rows, inputs), np.float32)}
    times: list[Any] = []
    for _ in range(9 if count > 1 else 500):
        start = time.perf_counter()
        session.run(None, given)
        times.append((time.perf_counter() - start) / count)
    return median(times[1:])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rows, threads = arguments.rows, arguments.threads
    print(f"{processor_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {threads} threads")
    print(f"onnxruntime {metadata.version('onnxruntime')}, {rows} rows; billions of weights a second\n")
    print("| form | bytes a weight | from memory | of bandwidth | from caches | if they take turns |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for form in FORMS:
        bandwidth = read_bandwidth(threads)
        weights = form.shape[0] * form.shape[1]
        slow = weights / seconds(form, form.shape, TOTAL // form.size, rows, threads)
        fast = SMALL[0] * SMALL[1] / seconds(form, SMALL, 1, rows, threads)
        each = form.size / weights
        turns = 1 / (1 / fast + each / bandwidth)
        print(
            f"| {form} | {each:.3f} | {slow / 1e9:.1f} | {slow * each / bandwidth:.2f} | {fast / 1e9:.1f}"
            f" | {turns / 1e9:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

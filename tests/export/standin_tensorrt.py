"""A stand-in for TensorRT: its engines name ONNX graphs, which ONNX Runtime runs on the addresses bound.

It refuses what TensorRT refuses (shapes outside of the profile, a profile that another context has, a
capture before the first run of a shape) and fails where TensorRT would silently do something else: a cache
that is not written in place, a write past its end, a graph launched after its context saw other shapes.
"""

from __future__ import annotations

import ctypes
import json
from enum import Enum, IntEnum
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime

VERSION = "10.15.1.29"
SCRATCH = 4096  # bytes that a context works in
TYPES = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(bool)": ("BOOL", np.bool_),
    "tensor(uint8)": ("UINT8", np.uint8),
}


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2


class ILogger:
    Severity = Severity

    def __init__(self):
        pass


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = 0, 1, 2


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = 0, 1, 2


class TensorLocation(Enum):
    DEVICE, HOST = 0, 1


DataType = Enum("DataType", "FLOAT HALF BF16 INT64 INT32 BOOL UINT8")


class IRuntimeConfig:
    def __init__(self):
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class Runtime:
    machine: Any  # set by `library`
    is_rtx: bool

    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            self.logger.log(Severity.ERROR, "the magic number is wrong")
            return None
        self.machine.note("load", plan["graph"])
        return ICudaEngine(self, plan)


class ICudaEngine:
    def __init__(self, runtime, plan):
        self.runtime, self.plan = runtime, plan
        self.machine, self.logger = runtime.machine, runtime.logger
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(plan["onnx"], options)
        self.inputs = {one.name: one for one in self.session.get_inputs()}
        self.outputs = {one.name: one for one in self.session.get_outputs()}
        self.io = self.inputs | self.outputs
        self.num_io_tensors = len(self.io)
        self.num_optimization_profiles = len(plan["profiles"])
        self.device_memory_size_v2 = SCRATCH
        self.contexts = []

    def get_tensor_name(self, index):
        return list(self.io)[index]

    def get_tensor_dtype(self, name):
        return DataType[self.plan.get("dtypes", {}).get(name, TYPES[self.io[name].type][0])]

    def get_tensor_location(self, name):
        return TensorLocation.HOST if name in self.plan.get("host", ()) else TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name):
        return dict(self.plan["aliases"]).get(name)

    def create_runtime_config(self):
        assert self.runtime.is_rtx
        return IRuntimeConfig()

    def create_execution_context(self, how):
        assert isinstance(how, IRuntimeConfig) == self.runtime.is_rtx
        self.contexts.append(IExecutionContext(self, how))
        return self.contexts[-1]


class IExecutionContext:
    def __init__(self, engine, how):
        self.engine, self.machine = engine, engine.machine
        self.active_optimization_profile = 0
        self.strategy = how.strategy if isinstance(how, IRuntimeConfig) else how
        eager = DynamicShapesKernelSpecializationStrategy.EAGER
        self.is_settled = (
            not isinstance(how, IRuntimeConfig) or how.dynamic_shapes_kernel_specialization_strategy == eager
        )
        if engine.runtime.is_rtx:
            self.is_stream_capturable = lambda stream: self.is_settled and engine.plan.get("capturable", True)
        self.shapes, self.addresses = {}, {}
        self.generation = 0  # counts changes of shapes
        self.up_to_date = -1  # the generation of the last run outside of a capture
        self.scratch = None

    def set_device_memory(self, memory, size):
        assert self.strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        assert memory % 256 == 0
        self.scratch = memory, size

    def set_optimization_profile_async(self, profile_index, stream_handle):
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self._refuse(f"there is no profile {profile_index}")
        self.active_optimization_profile = profile_index
        self.shapes.clear()
        self.generation += 1
        return True

    def set_input_shape(self, name, shape):
        axes = self.engine.plan["profiles"][self.active_optimization_profile]["axes"]
        declared = self.engine.inputs[name].shape
        if len(declared) != len(shape):
            return self._refuse(f"{name} has {len(declared)} dimensions")
        for want, got in zip(declared, shape, strict=True):
            low, _, high = axes[want] if isinstance(want, str) else (want, want, want)
            if not low <= got <= high:
                return self._refuse(f"{name}: {got} is outside of {low} to {high}")
        if self.shapes.get(name) != tuple(shape):
            self.shapes[name] = tuple(shape)
            self.generation += 1
        return True

    def set_tensor_address(self, name, memory):
        assert isinstance(memory, int)
        assert memory % 256 == 0, f"{name} at an address that is not aligned"
        self.addresses[name] = memory
        return True

    def infer_shapes(self):
        return [name for name in self.engine.inputs if self._shape(name) is None]

    def get_tensor_shape(self, name):
        return self._shape(name)

    def execute_async_v3(self, stream_handle):
        assert stream_handle != 0, "the default stream makes TensorRT wait"
        engine, machine = self.engine, self.machine
        if self.infer_shapes() or set(engine.io) - set(self.addresses):
            return self._refuse("shapes or addresses are missing")
        others = [one for one in engine.contexts if one is not self and one.scratch]
        if any(one.active_optimization_profile == self.active_optimization_profile for one in others):
            return self._refuse("another context has this profile")
        if machine.recording is not None:
            if not (self.is_settled and engine.plan.get("capturable", True)):
                machine.spoilt = True
                return self._refuse("operation not permitted when stream is capturing")
            assert self.up_to_date == self.generation, "captured before a first run with these shapes"
        self.up_to_date = self.generation
        self._demand_in_place()
        machine.note("enqueue", engine.plan["graph"], self.active_optimization_profile)
        places = {name: (self.addresses[name], self._shape(name)) for name in engine.io}
        scratch, captured_at = self.scratch, None if machine.recording is None else self.generation
        machine.put(lambda: self._run(places, scratch, captured_at))
        return True

    def _run(self, places, scratch, captured_at):
        engine, machine = self.engine, self.machine
        left = captured_at not in (None, self.generation)
        assert not left, f"a graph runs {engine.plan['graph']} with shapes that its context has left"
        machine.demand(*scratch)
        assert scratch[1] >= SCRATCH
        io = engine.session.io_binding()
        for name, (address, shape) in places.items():
            dtype = TYPES[engine.io[name].type][1]
            machine.demand(address, prod(shape) * np.dtype(dtype).itemsize)
            bind = io.bind_input if name in engine.inputs else io.bind_output
            bind(name, "cpu", 0, dtype, shape, address)
        if "write_index" in places:
            self._demand_room(places)
        engine.session.run_with_iobinding(io)
        block = machine.owner(*scratch)
        at = scratch[0] - block.keep.ctypes.data
        block.keep[at : at + scratch[1]] = 0xAB  # nobody's data survives there
        machine.note("run", engine.plan["graph"], tuple(sorted((n, a) for n, (a, _) in places.items())))

    def _demand_room(self, places):
        """TensorRT drops writes past the end without a word."""
        address, (rows,) = places["write_index"]
        written = np.ctypeslib.as_array((ctypes.c_int64 * rows).from_address(address))
        _, (_, _, tokens, capacity) = places["mask"]
        assert (written >= 0).all()
        assert (written + tokens <= capacity).all(), f"rows at {written} write {tokens} of {capacity}"

    def _demand_in_place(self):
        """No output may lie over an input, but for caches, which must."""
        aliases = dict(self.engine.plan["aliases"])
        spans = {
            name: (self.addresses[name], self.addresses[name] + self._bytes(name)) for name in self.engine.io
        }
        for out in self.engine.outputs:
            for name, (start, end) in spans.items():
                overlap = name != out and spans[out][0] < end and start < spans[out][1]
                assert overlap == (aliases.get(out) == name), f"{out} and {name}"
                if overlap:
                    assert spans[out][0] == start

    def _bytes(self, name):
        return prod(self._shape(name)) * np.dtype(TYPES[self.engine.io[name].type][1]).itemsize

    def _shape(self, name):
        """A tensor's shape, worked out from those of the inputs; None where they do not say."""
        axes = {}
        for known, shape in self.shapes.items():
            for axis, size in zip(self.engine.inputs[known].shape, shape, strict=True):
                if isinstance(axis, str):
                    assert axes.setdefault(axis, size) == size, f"{axis} is {axes[axis]} and {size}"
        declared = self.engine.io[name].shape
        if (
            name in self.engine.inputs
            and any(isinstance(a, str) for a in declared)
            and name not in self.shapes
        ):
            return None
        if any(isinstance(axis, str) and axis not in axes for axis in declared):
            return None
        return tuple(axes[axis] if isinstance(axis, str) else axis for axis in declared)

    def _refuse(self, why):
        self.engine.logger.log(Severity.ERROR, why)
        return False


def library(machine: Any, target: str, version: str = VERSION) -> ModuleType:
    """Return what stands in for ``tensorrt`` or ``tensorrt_rtx``."""
    module = ModuleType(target.replace("-", "_"))
    module.__spec__ = ModuleSpec(module.__name__, None)  # transformers looks for it
    kinds = {"machine": machine, "is_rtx": target == "tensorrt-rtx"}
    module.Runtime = type("Runtime", (Runtime,), kinds)
    for kind in (ILogger, ExecutionContextAllocationStrategy, TensorLocation, DataType):
        setattr(module, kind.__name__, kind)
    module.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
    module.__version__ = version
    return module

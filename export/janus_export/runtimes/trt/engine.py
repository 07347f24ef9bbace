"""An engine on a GPU: loaded, checked, bound to addresses, enqueued."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from janus_export.bundle.contract import GraphContract
from janus_export.bundle.engines import BUILD, EngineSet, Profile
from janus_export.errors import BundleError
from janus_export.runtimes.trt.cuda import Gpu
from janus_export.runtimes.trt.library import Library
from janus_export.runtimes.trt.memory import DeviceTensor
from janus_modular import PromptError

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}
"""The manifest's name of each of TensorRT's dtypes."""


class Engine:
    """One graph's engine on a GPU. Its contexts, one per profile, share weights and scratch memory."""

    def __init__(self, library: Library, gpu: Gpu, engines: EngineSet, contract: GraphContract) -> None:
        """Load the engine.

        Raises:
            BundleError: the engine is missing or damaged, or its inputs or outputs differ from its graph's.
            DeviceError: TensorRT cannot load it.
        """
        self.library, self.gpu, self.engines, self.contract = library, gpu, engines, contract
        self.name = contract.name
        path = engines.path(self.name)
        self.profiles = {profile.name: profile for profile in engines.engines[self.name].profiles}
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
        ):
            self.handle = library.runtime.deserialize_cuda_engine(plan)
        library.check(self.handle is not None, f"loading the engine of '{self.name}'")
        self._compare()
        # Contexts run one after another on one stream, so they can share scratch memory.
        self.scratch = gpu.allocate(self.handle.device_memory_size_v2)
        self._contexts: dict[str, Context] = {}

    def bind(self, profile: str, axes: Mapping[str, int], tensors: Mapping[str, DeviceTensor]) -> Binding:
        """Bind inputs and outputs to addresses for axes of these lengths; nothing is enqueued.

        Raises:
            PromptError: the engine was not built for such lengths.
            ValueError: a tensor is too small or of another dtype, or a cache would not be written in place.
        """
        self.require(profile, axes)
        for tensor_spec in (*self.contract.inputs, *self.contract.outputs):
            tensor, shape = tensors[tensor_spec.name], tensor_spec.sized(axes)
            if tensor.dtype != tensor_spec.dtype or tensor.nbytes < prod(shape) * tensor.itemsize:
                raise ValueError(
                    f"'{tensor_spec.name}' of '{self.name}': expected {tensor_spec.dtype} {shape},"
                    f" got {tensor.dtype} {tensor.shape}"
                )
        for new, old in self.contract.aliases.items():
            if tensors[new].address != tensors[old].address:
                raise ValueError(f"'{new}' of '{self.name}' must be '{old}', written in place")
        return Binding(
            self._context(profile),
            {spec.name: spec.sized(axes) for spec in self.contract.inputs if _varies(spec.shape)},
            {spec.name: spec.sized(axes) for spec in self.contract.outputs},
            dict(tensors),
        )

    def require(self, profile: str, axes: Mapping[str, int]) -> None:
        """Raise an error for lengths that an engine was not built for.

        Raises:
            PromptError: the lengths are outside of the profile's ranges.
        """
        for axis, (low, _, high) in self.profiles[profile].axes.items():
            if axis in axes and not low <= axes[axis] <= high:
                raise PromptError(
                    f"{axis}: {axes[axis]} at once, but the engine of '{self.name}' was built for"
                    f" {low} to {high}. Ask for fewer at once (batch_size for images, a smaller window; with"
                    f" guidance, an image takes two rows), or export and build for more."
                    f"\n{_build_hint(self.engines)}"
                )

    def _context(self, profile: str) -> Context:
        if profile not in self._contexts:
            index = list(self.profiles).index(profile)
            self._contexts[profile] = Context(self, self.profiles[profile], index)
        return self._contexts[profile]

    def _compare(self) -> None:
        """Compare the engine with the contract of its graph."""
        engine, contract = self.handle, self.contract
        problems = []
        if engine.num_optimization_profiles != len(self.profiles):
            problems.append(f"{engine.num_optimization_profiles} profiles, not {len(self.profiles)}")
        engine_names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        declared = {spec.name: spec for spec in (*contract.inputs, *contract.outputs)}
        if engine_names != set(declared):
            problems.append(f"other inputs or outputs: {', '.join(sorted(engine_names ^ set(declared)))}")
        for name in sorted(engine_names & set(declared)):
            dtype = DTYPES.get(engine.get_tensor_dtype(name).name)
            if dtype != declared[name].dtype:
                problems.append(f"'{name}' in {dtype}, not {declared[name].dtype}")
            if engine.get_tensor_location(name) != self.library.trt.TensorLocation.DEVICE:
                problems.append(f"'{name}' on the host")
        alias = getattr(
            engine, "get_aliased_input_tensor", None
        )  # early releases with in-place writes may not report it
        for new, old in contract.aliases.items():
            if alias and new in engine_names and alias(new) != old:
                problems.append(f"'{new}' is not '{old}' in place")
        if problems:
            raise BundleError(
                f"the engine of '{self.name}' in {self.engines.key} does not match its graph: it has"
                f" {'; '.join(problems[:5])}.\n{_build_hint(self.engines)}"
            )


class Context:
    """An engine's context for one profile. TensorRT keeps shapes and addresses: only changes are set."""

    def __init__(self, engine: Engine, profile: Profile, index: int) -> None:
        self.engine, self.profile, self.gpu = engine, profile, engine.gpu
        self.label = f"'{engine.name}' ({profile.name})"
        self.changes = 0  # number of shape changes: each invalidates captured graphs
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._bound: weakref.ref[Binding] | None = None  # weak: a session's memory is freed with the session
        self.handle = self._create()
        self._check(self.handle is not None, "a context")
        self.handle.set_device_memory(engine.scratch.address, engine.handle.device_memory_size_v2)
        if self.handle.active_optimization_profile != index:
            stream = self.gpu.stream
            self._check(self.handle.set_optimization_profile_async(index, stream), f"profile {index}")

    @property
    def is_capturable(self) -> bool:
        """True if TensorRT-RTX can capture the engine in a CUDA graph; only a capture shows."""
        ask = getattr(self.handle, "is_stream_capturable", None)
        return ask is None or bool(ask(self.gpu.stream))

    def bind(self, binding: Binding) -> None:
        """Set the shapes and addresses that have changed."""
        if self._bound is not None and self._bound() is binding:
            return
        self._bound = None
        shapes = {k: shape for k, shape in binding.shapes.items() if self._shapes.get(k) != shape}
        for name, shape in shapes.items():
            self._shapes.pop(name, None)
            self._check(self.handle.set_input_shape(name, shape), f"'{name}' of shape {shape}")
            self._shapes[name] = shape
        for name, tensor in binding.tensors.items():
            if self._addresses.get(name) != tensor.address:
                self._check(self.handle.set_tensor_address(name, tensor.address), f"the address of '{name}'")
                self._addresses[name] = tensor.address
        if shapes:
            self.changes += 1
            self._check(not self.handle.infer_shapes(), "shapes that were left open")
            for name, shape in binding.results.items():
                actual = tuple(self.handle.get_tensor_shape(name))
                self._check(actual == shape, f"'{name}' comes out as {actual}, not as {shape}")
        self._bound = weakref.ref(binding)

    def enqueue(self, binding: Binding) -> None:
        """Enqueue the engine's work on the stream."""
        self.bind(binding)
        self._check(self.handle.execute_async_v3(self.gpu.stream), "enqueuing it")

    def _create(self) -> Any:
        trt, engine = self.engine.library.trt, self.engine.handle
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.engine.library.target == "tensorrt":
            return engine.create_execution_context(managed)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        # If TensorRT-RTX replaced kernels later, a captured graph would keep the old ones.
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        return engine.create_execution_context(config)

    def _check(self, succeeded: object, action: str) -> None:
        self.engine.library.check(succeeded, f"{self.label}, {action}")


@dataclass(frozen=True, eq=False)
class Binding:
    """The addresses and shapes of a context's inputs and outputs. A binding never changes."""

    context: Context
    shapes: Mapping[str, tuple[int, ...]]  # of inputs, those that vary
    results: Mapping[str, tuple[int, ...]]  # shapes of outputs
    tensors: Mapping[str, DeviceTensor]

    def bind(self) -> None:
        """Set the shapes and addresses of the context to those of this binding."""
        self.context.bind(self)

    def enqueue(self) -> None:
        """Enqueue the work on the stream."""
        self.context.enqueue(self)


def _varies(shape: tuple[int | str, ...]) -> bool:
    return any(isinstance(size, str) for size in shape)


def _build_hint(engines: EngineSet) -> str:
    return BUILD.format(folder=engines.folder, target=engines.target, variant=engines.variant)

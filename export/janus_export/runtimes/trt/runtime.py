"""A bundle's engines in TensorRT or TensorRT-RTX, on an NVIDIA GPU. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_export.bundle.bundle import Bundle, load_bundle
from janus_export.bundle.contract import MAGNITUDE, GraphContract, check_magnitude
from janus_export.bundle.engines import BUILD, find_engines, read_engines
from janus_export.errors import BundleError
from janus_export.runtimes.trt.cuda import Gpu
from janus_export.runtimes.trt.engine import Binding, Engine
from janus_export.runtimes.trt.library import Library
from janus_export.runtimes.trt.memory import ALIGNMENT, DeviceTensor
from janus_export.runtimes.trt.session import TensorRTSession
from janus_modular import ConfigError, PromptError, Registry, Runtime, hookimpl
from janus_modular.graph_specs import TensorSpec
from janus_modular.session_errors import check_max_seq_len


@dataclass
class TensorRTConfig:
    """Options of the runtime."""

    variant: str | None = None  # a variant of the bundle; None: the first that has engines
    device: str = "auto"  # auto, cuda; cuda:1 for the second of several GPUs
    chunk: int = 256  # prompt positions per forward pass; the engine may allow fewer
    images: int = 4  # input images encoded at once; the engine may allow fewer
    sync_every: int = 16  # steps that the host may run ahead of the GPU; more: rarer progress reports
    cuda_graph: bool = True  # capture steps as CUDA graphs; false: enqueue kernels one by one

    def __post_init__(self) -> None:
        """Raise ConfigError for counts below 1."""
        for name in ("chunk", "images", "sync_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more")


class TensorRTRuntime:
    """Opens sessions of a bundle in TensorRT; loads each engine at its first use.

    All sessions share the engines, their execution contexts and one CUDA stream: use one thread at a time.
    """

    target = "tensorrt"

    def __init__(self, config: TensorRTConfig, folder: str | Path | Bundle) -> None:
        """Find the GPU and the engines that were built for it, without loading them.

        Raises:
            MissingExtraError: TensorRT, or NVIDIA's binding of CUDA, is not installed.
            ConfigError: there is no such GPU.
            BundleError: the bundle is damaged, or has no engines for this GPU and this TensorRT.
        """
        self.config = config
        self.bundle = folder if isinstance(folder, Bundle) else load_bundle(folder)
        self.library = Library(self.target)
        self.gpu = Gpu(_index(config.device), extra=self.library.extra)
        self.variant = config.variant or self._first_built()
        self.engines = find_engines(self.bundle, self.variant, self.target, self.gpu.arch)
        if self.engines.builder != self.library.version:
            raise BundleError(
                f"the engines {self.engines.key} were built by {self.target} {self.engines.builder}, and run"
                f" on no other; installed is {self.library.version}. Install that version (pip install"
                f" {self.target}=={self.engines.builder}), or build again.\n" + self._build()
            )
        model = self.bundle.manifest["model"]
        self.context: int = min(model["context"], self.engines.capacity - 1)  # the last one is for padding
        self.text_sampler: str = model["text_sampler"]
        self.image_sampler: str = model["image_sampler"]
        self.hidden_size: int = model["hidden_size"]
        self.dtype: str = self.bundle.manifest["variants"][self.variant]["dtype"]
        self._opened: dict[str, Engine] = {}

    def open(self, max_seq_len: int, rows: int | None = None) -> TensorRTSession:
        """Open a session whose rows hold up to ``max_seq_len`` positions.

        Raises:
            PromptError: the engines were built for fewer.
        """
        limit = self.engines.capacity - 1
        if max_seq_len > limit:
            raise PromptError(
                f"max_seq_len: found {max_seq_len}; expected {limit} at most: the engines {self.engines.key}"
                f" have {self.engines.capacity} positions a row, the last of which is for padding."
                " Shorten the prompt, or build them with more capacity.\n" + self._build()
            )
        self.gpu.use()
        return TensorRTSession(self, check_max_seq_len(max_seq_len, self.context), rows)

    def engine(self, name: str) -> Engine:
        """Return a graph's engine, loaded at its first use.

        Raises:
            BundleError: there is none, or it is not what the manifest says.
            DeviceError: TensorRT cannot load it.
        """
        if name not in self._opened:
            record = self.bundle.contract(name, self.variant)
            dtypes = {spec["name"]: spec["dtype"] for spec in (*record["inputs"], *record["outputs"])}
            contract = GraphContract.read(name, record, dtypes)
            self._opened[name] = Engine(self.library, self.gpu, self.engines, contract)
        return self._opened[name]

    def enqueue(self, name: str, inputs: Sequence[Any]) -> tuple[DeviceTensor, ...]:
        """Enqueue a graph, with inputs in numpy or on the GPU; return its outputs, written later.

        If the outputs include a `MAGNITUDE`, the caller checks it (`check_magnitude`) once it is written.
        More images than the engine takes at once are processed in several runs.

        Raises:
            PromptError: the engine was not built for inputs of these lengths.
        """
        engine = self.engine(name)
        contract, [profile] = engine.contract, engine.profiles
        axes = contract.measure([np.shape(value) for value in inputs])
        images = axes["images"] if set(axes) == {"images"} else None
        engine.require(profile, {} if images else axes)
        tensors = {
            spec.name: DeviceTensor.zeros(self.gpu, spec.sized(axes), spec.dtype) for spec in contract.outputs
        }
        outputs = tuple(tensors.values())
        for spec, value in contract.paired(inputs):
            tensors[spec.name] = self._on_gpu(value, spec, axes)
        most = engine.profiles[profile].axes["images"][2] if images else 0
        if images is None or images <= most:
            self._enqueue(engine.bind(profile, axes, tensors))
            return outputs
        for start in range(0, images, most):
            count = min(most, images - start)
            part = {name: tensor.rows(start, count) for name, tensor in tensors.items()}
            aligned = {  # engines write only to aligned addresses
                spec.name: DeviceTensor.zeros(self.gpu, part[spec.name].shape, spec.dtype)
                for spec in contract.outputs
                if part[spec.name].address % ALIGNMENT
            }
            self._enqueue(engine.bind(profile, {"images": count}, part | aligned))
            for output, tensor in aligned.items():
                self.gpu.copy_across(part[output].address, tensor.address, width=tensor.nbytes)
        return outputs

    def run(self, name: str, *inputs: NDArray[Any]) -> Any:
        """Run a graph on numpy arrays; return an array, or a tuple of them.

        Raises:
            NotFiniteError: images were decoded from values that are NaN or infinite.
        """
        outputs = [output.read() for output in self.enqueue(name, inputs)]
        if self.measures(name):
            check_magnitude(name, outputs.pop())
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def measures(self, name: str) -> bool:
        """Return True if the last output of a graph is its `MAGNITUDE`."""
        return self.engine(name).contract.outputs[-1].name == MAGNITUDE

    def fingerprint(self) -> str:
        """Return a digest of the variant's graphs and weights."""
        return self.bundle.fingerprint(self.variant)

    def in_chunks(self, positions: int) -> TensorRTRuntime:
        """Return the runtime with prompts read in chunks of so many positions, or as few as engines take."""
        chunked = copy(self)  # which shares the opened engines
        chunked.config = replace(self.config, chunk=positions)
        return chunked

    @property
    def evidence(self) -> dict[str, str]:
        """What ran, and on which GPU, as a manifest records it."""
        return {"engines": self.engines.key, self.target: self.library.version, "gpu": self.gpu.name}

    def _enqueue(self, binding: Binding) -> None:
        binding.enqueue()
        self.gpu.hold(binding)

    def _on_gpu(self, value: Any, spec: TensorSpec, axes: Mapping[str, int]) -> DeviceTensor:
        if isinstance(value, DeviceTensor):
            return value
        copied = DeviceTensor.zeros(self.gpu, spec.sized(axes), spec.dtype)
        copied.write(value)
        return copied

    def _first_built(self) -> str:
        variants = [
            engines.variant for engines in read_engines(self.bundle).values() if engines.target == self.target
        ]
        return next((name for name in self.bundle.variants if name in variants), self.bundle.variants[0])

    def _build(self) -> str:
        return BUILD.format(folder=self.bundle.folder, target=self.target, variant=self.variant)


class TensorRTRTXRuntime(TensorRTRuntime):
    """`TensorRTRuntime` with TensorRT-RTX instead of TensorRT."""

    target = "tensorrt-rtx"


def _index(device: str) -> int:
    """Return the number of the GPU that a word like ``auto``, ``cuda`` or ``cuda:1`` means.

    Raises:
        ConfigError: it names no GPU.
    """
    name, _, index = device.partition(":")
    if name not in ("auto", "cuda") or (name == "auto" and index) or not (index or "0").isdigit():
        raise ConfigError(
            f"unknown device '{device}' for engines. Expected auto, cuda, or cuda:1 for the second"
        )
    return int(index or 0)


@hookimpl
def register_runtimes(registry: Registry[Runtime]) -> None:
    """Register the runtimes ``tensorrt`` and ``tensorrt-rtx``."""
    registry.add("tensorrt", TensorRTRuntime, TensorRTConfig)
    registry.add("tensorrt-rtx", TensorRTRTXRuntime, TensorRTConfig)

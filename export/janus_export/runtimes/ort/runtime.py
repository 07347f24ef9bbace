"""A bundle in ONNX Runtime, on a CPU or a GPU. numpy and onnxruntime only, never torch."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_export.bundle.bundle import ONNX_RUNTIME, Bundle, load_bundle
from janus_export.bundle.contract import MAGNITUDE, GraphContract, check_magnitude
from janus_export.errors import BundleError
from janus_export.runtimes.memory import STORED, HostBuffer
from janus_export.runtimes.ort.binding import Binding
from janus_export.runtimes.ort.library import check_installation, onnxruntime
from janus_export.runtimes.ort.providers import check_dtype, check_provider, choose_device
from janus_export.runtimes.ort.session import OnnxSession
from janus_modular import ConfigError, Registry, Runtime, hookimpl
from janus_modular.session_errors import check_max_seq_len

ERRORS = 3
"""A level of ONNX Runtime's log."""

MOST_THREADS = 1024
"""Most threads: more would take minutes to start, and memory for each."""

TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
    "tensor(uint8)": "uint8",
}
"""ONNX Runtime's names of dtypes, and those of the manifest."""


def quiet_options() -> onnxruntime.SessionOptions:
    """Return session options that suppress ONNX Runtime's warnings about a graph while it is loaded."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS
    return options


@dataclass
class OnnxConfig:
    """Options of the runtime."""

    variant: str | None = None  # a variant of the bundle; None: its first
    device: str = "auto"  # auto, cpu, cuda, tensorrt, nv-tensorrt-rtx; cuda:1 for the second of several
    threads: int = 0  # threads per graph; 0: one per core
    bucket: int = 64  # positions by which a KV cache grows on a CPU
    chunk: int = 256  # prompt positions per forward pass
    images: int = 4  # input images encoded at once
    provider_options: dict[str, str] = field(
        default_factory=dict  # options of the GPU's execution provider: {gpu_mem_limit: "8000000000"}
    )

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that are out of range."""
        for name, least, most in (
            ("threads", 0, MOST_THREADS),
            ("bucket", 1, None),
            ("chunk", 1, None),
            ("images", 1, None),
        ):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                expected = f"{least} or more" if most is None else f"{least} to {most}"
                raise ConfigError(f"{name}: found {value}; expected {expected}.")


@dataclass(frozen=True)
class OnnxGraph:
    """A loaded graph."""

    contract: GraphContract
    session: onnxruntime.InferenceSession


class OnnxRuntime:
    """Opens sessions of a bundle in ONNX Runtime; loads each graph at its first use."""

    def __init__(self, config: OnnxConfig, folder: str | Path | Bundle) -> None:
        """Check the bundle and choose a device; no weights are read yet.

        Raises:
            ConfigError: the device is not available or cannot run the variant, or ONNX Runtime is too old.
            BundleError: the bundle is damaged, or has no such variant.
        """
        self.config = config
        self.device = choose_device(config.device, config.provider_options)
        self.bundle = folder if isinstance(folder, Bundle) else load_bundle(folder)
        check_installation(self.bundle.manifest.get("requires", {}).get("onnxruntime", ONNX_RUNTIME))
        self.variant = config.variant or self.bundle.variants[0]
        self.bundle.path("backbone", self.variant)
        dtype = self.bundle.manifest["variants"][self.variant]["dtype"]
        check_dtype(self.device, self.variant, dtype)
        model = self.bundle.manifest["model"]
        self.context: int = model["context"]
        self.text_sampler: str = model["text_sampler"]
        self.image_sampler: str = model["image_sampler"]
        self.hidden_size: int = model["hidden_size"]
        self._opened: dict[str, OnnxGraph] = {}

    def open(self, max_seq_len: int, rows: int | None = None) -> OnnxSession:
        """Open a session whose rows hold up to ``max_seq_len`` positions.

        Raises:
            PromptError: the context has fewer.
        """
        return OnnxSession(self, check_max_seq_len(max_seq_len, self.context), rows)

    def fingerprint(self) -> str:
        """Return a digest of the variant's graphs and weights."""
        return self.bundle.fingerprint(self.variant)

    def in_chunks(self, positions: int) -> OnnxRuntime:
        """Return the runtime with prompts read in chunks of so many positions; its cache grows as often."""
        chunked = copy(self)  # which shares the opened graphs
        chunked.config = replace(self.config, chunk=positions, bucket=positions)
        return chunked

    def graph(self, name: str) -> OnnxGraph:
        """Return a graph of the variant, opened at its first use.

        Raises:
            BundleError: the bundle has no graph of this name, or ONNX Runtime does not load it.
            ConfigError: the device did not start.
        """
        if name not in self._opened:
            file = self.bundle.path(name, self.variant)
            options = quiet_options()
            options.intra_op_num_threads = self.config.threads
            # Graphs take turns: the threads of one must not spin while another runs.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            try:
                session = onnxruntime.InferenceSession(str(file), options, providers=self.device.providers)
            except Exception as error:  # ONNX Runtime's errors have no common base class
                reason = " ".join(str(error).rpartition("failed:")[2].split())
                raise BundleError(
                    f"ONNX Runtime does not load {file.name}: {reason} Whether the bundle is as it was:"
                    f" janus-modular inspect {self.bundle.folder} --hashes"
                ) from error
            check_provider(self.device, session)
            dtypes = {
                tensor.name: TYPES[tensor.type] for tensor in (*session.get_inputs(), *session.get_outputs())
            }
            contract = GraphContract.read(name, self.bundle.graphs[name], dtypes)
            self._opened[name] = OnnxGraph(contract, session)
        return self._opened[name]

    @cached_property
    def dtype(self) -> str:
        """The dtype of the variant's embeddings and caches."""
        return self.graph("backbone").contract.inputs[0].dtype

    def run(self, name: str, *inputs: NDArray[Any]) -> Any:
        """Run a graph on numpy arrays; return an array, or a tuple of them.

        Raises:
            NotFiniteError: images were decoded from values that are NaN or infinite.
        """
        graph = self.graph(name)
        binding, axes = Binding(graph.session, self.device), dict[str, int]()
        for tensor, value in graph.contract.paired(inputs):
            axes |= tensor.measure(binding.take(tensor, value).shape)
        arrays = dict[str, NDArray[Any]]()
        for tensor in graph.contract.outputs:
            buffer = HostBuffer(np.empty(tensor.sized(axes), STORED[tensor.dtype]), tensor.dtype)
            binding.output(tensor.name, buffer)
            arrays[tensor.name] = buffer.array
        binding.run()
        if MAGNITUDE in arrays:
            check_magnitude(name, arrays.pop(MAGNITUDE))
        outputs = list(arrays.values())
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


@hookimpl
def register_runtimes(registry: Registry[Runtime]) -> None:
    """Register the runtime ``onnx``."""
    registry.add("onnx", OnnxRuntime, OnnxConfig)

"""Builds an engine from a lowered graph. `tensorrt` and `tensorrt_rtx` have one API, passed as ``trt``."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from janus_export.bundle.engines import Profile
from janus_export.errors import ExportError
from janus_export.process_memory import AnonymousPeak
from janus_modular.atomic_writes import atomic_replace
from janus_modular.graph_specs import TensorSpec

UNUSED = "Unused Input"
"""The start of a TensorRT warning that is an error here: an engine must take what its graph takes."""


@dataclass(frozen=True)
class EngineOptions:
    """Options that an engine is built with."""

    arch: Sequence[str] = ()  # compute capabilities; empty: the local GPU's
    profiles: Sequence[Profile] = ()
    weight_streaming: bool = False  # a runtime may leave part of the weights in the host's memory
    timing_cache: Path | None = None  # read, and updated


@dataclass(frozen=True)
class BuiltEngine:
    """The result of a build."""

    sha256: str
    bytes: int
    seconds: float
    peak_bytes: int | None  # anonymous memory of the process; None if unknown


def build_engine(trt: Any, model: ir.Model, source: Path, file: Path, order: EngineOptions) -> BuiltEngine:
    """Build a lowered graph, whose weights lie beside ``source``, and write the engine into ``file``.

    It is written while it is serialised, so that memory holds the weights once.

    Raises:
        ExportError: the parser or the builder rejects it; names the node or input, with TensorRT's message.
        OSError: the engine cannot be written.
    """
    started = time.perf_counter()
    messages: list[tuple[int, str]] = []
    with AnonymousPeak() as peak, _no_output(), file.open("wb") as out:
        logger, writer = _error_log(trt, messages), _writer(trt, out)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        _parse(parser, model, source)
        _check(network, model, source)
        config = builder.create_builder_config()
        _configure(trt, builder, config, model, order)
        _let_attention_decompose(trt, network)
        done = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error is not None:
            raise writer.error
        unused = [words for _, words in messages if words.startswith(UNUSED)]
        if problems := unused or ([] if done else _errors(trt, messages) or ["TensorRT said nothing."]):
            raise ExportError(f"{source.name} cannot be built as an engine.\n{_last(problems)}")
        if order.timing_cache is not None:
            _keep(config.get_timing_cache().serialize(), order.timing_cache)
    seconds = time.perf_counter() - started
    return BuiltEngine(writer.digest.hexdigest(), writer.written, round(seconds, 2), peak.bytes)


def inspect_engine(trt: Any, file: Path) -> str:
    """Return TensorRT's inspection of an engine, as JSON; needs the GPU that the engine is for.

    Raises:
        ExportError: the engine cannot be loaded on the local GPU.
    """
    messages: list[tuple[int, str]] = []
    engine = trt.Runtime(_error_log(trt, messages)).deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise ExportError(f"{file} cannot be loaded on the local GPU.\n{_last(_errors(trt, messages))}")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _parse(parser: Any, model: ir.Model, source: Path) -> None:
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    if parser.parse(proto.SerializeToString(), str(source)):
        return
    nodes = {node.name: node for node in model.graph}
    problems = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        node = nodes.get(error.node_name())
        where = f"node {error.node_name()}"
        if node is not None:
            inputs = ", ".join(str(value.name) for value in node.inputs if value is not None)
            where += f" ({node.op_type} of {inputs})"
        problems.append(f"{where}: {error.desc()}")
    raise ExportError(f"TensorRT's parser rejects {source.name}.\n{_last(problems)}")


def _check(network: Any, model: ir.Model, source: Path) -> None:
    """Check that the parsed inputs and outputs are those of the graph."""
    parsed = [network.get_input(i) for i in range(network.num_inputs)]
    parsed += [network.get_output(i) for i in range(network.num_outputs)]
    declared = [*model.graph.inputs, *model.graph.outputs]
    parsed_names = [
        f"{tensor.name} {[size if size >= 0 else '?' for size in tensor.shape]}" for tensor in parsed
    ]
    declared_names = [
        f"{tensor.name} {[size if isinstance(size, int) else '?' for size in tensor.shape or ()]}"
        for tensor in declared
    ]
    if parsed_names != declared_names:
        differ = sorted(set(parsed_names) ^ set(declared_names))
        raise ExportError(
            f"TensorRT's parser takes {source.name} to be another graph: {'; '.join(differ[:4])}."
            " This is a bug in its lowering (janus_export/tensorrt_build/lowering.py)."
        )


def _configure(trt: Any, builder: Any, config: Any, model: ir.Model, order: EngineOptions) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the engine inspector
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 must give the model's tokens
    if order.weight_streaming:  # streaming allocates memory, so CUDA graphs cannot capture it
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    elif hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX: so that steps can be captured
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if order.arch:
        config.num_compute_capabilities = len(order.arch)
        for index, capability in enumerate(order.arch):
            config.set_compute_capability(
                getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), index
            )
    if order.timing_cache is not None:
        known = order.timing_cache.read_bytes() if order.timing_cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    for lengths in order.profiles:
        profile = builder.create_optimization_profile()
        for value in model.graph.inputs:
            shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
            spec = TensorSpec(str(value.name), "", shape)
            axes = ({name: sizes[index] for name, sizes in lengths.axes.items()} for index in range(3))
            profile.set_shape(value.name, *map(spec.sized, axes))
        config.add_optimization_profile(profile)


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Allow attention to be decomposed where no fused kernel exists: there is none for float32."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # its real class; Python gets a plain layer
            layer.attention.decomposable = True


def _error_log(trt: Any, messages: list[tuple[int, str]]) -> Any:
    """Return a logger that keeps warnings and errors, and prints nothing."""
    worth_keeping = int(trt.ILogger.Severity.WARNING)

    class ErrorLog(trt.ILogger):  # type: ignore[misc]  # known when it runs
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, words: str) -> None:
            if int(severity) <= worth_keeping:
                messages.append((int(severity), words))

    return ErrorLog()


def _writer(trt: Any, out: BinaryIO) -> Any:
    """Return a stream that writes and hashes, and keeps the error of a failed write."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]  # known when it runs
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.digest, self.written = hashlib.sha256(), 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                out.write(data)
            except OSError as error:
                self.error = error
                return 0
            self.digest.update(data)
            self.written += len(data)
            return len(data)

    return Writer()


@contextmanager
def _no_output() -> Iterator[None]:
    """Suppress what TensorRT's compiler prints without using the logger."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _errors(trt: Any, messages: Sequence[tuple[int, str]]) -> list[str]:
    return [words for severity, words in messages if severity <= int(trt.ILogger.Severity.ERROR)]


def _last(words: Sequence[str]) -> str:
    """Return the last few messages, each on a readable line."""
    return "\n".join(message.strip().replace("\n", " ")[:500] for message in words[-3:])


def _keep(cache: Any, path: Path) -> None:
    with atomic_replace(path) as temporary:
        temporary.write_bytes(bytes(cache))

"""The stand-ins for CUDA and TensorRT have the interfaces of the real libraries."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
import torch
from cuda.bindings import runtime

from janus_export.runtimes.memory import HostBuffer, to_numbers, to_stored
from janus_export.runtimes.trt.cuda import Gpu
from janus_export.runtimes.trt.library import Library
from janus_modular import ConfigError, JanusError, MissingExtraError

TAKEN = {  # arguments of the real ones, which fail without a GPU and say so
    "cudaGetErrorString": (runtime.cudaError_t.cudaErrorNoDevice,),
    "cudaMemcpyAsync": (0, 0, 8, runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice, 0),
    "cudaMemcpy2DAsync": (0, 8, 0, 8, 8, 1, runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice, 0),
    "cudaStreamBeginCapture": (0, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal),
}


def functions(machine: Any) -> dict[str, Any]:
    module = sys.modules["cuda.bindings.runtime"]
    return {name: one for name, one in vars(module).items() if inspect.ismethod(one)}


def test_functions_of_cuda_take_what_the_real_ones_take(machine: Any):
    found = functions(machine)
    assert len(found) == 19
    for name, ours in found.items():
        said = getattr(runtime, name).__doc__.partition("\n")[0]  # "cudaMalloc(size_t size)"
        theirs = [one for one in said.partition("(")[2].rstrip(")").split(",") if one.strip()]
        assert len(inspect.signature(ours).parameters) == len(theirs), said


def test_names_of_cuda_are_the_real_ones(machine: Any):
    module = sys.modules["cuda.bindings.runtime"]
    assert module.cudaStreamNonBlocking == runtime.cudaStreamNonBlocking
    for kind in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        for name, value in getattr(module, kind).__members__.items():
            assert getattr(getattr(runtime, kind), name) == value


@pytest.mark.skipif(runtime.cudaGetDeviceCount()[0] == 0, reason="there is a GPU: it would do what is asked")
def test_without_a_gpu_cuda_answers_in_the_form_that_is_expected(machine: Any):
    """A code first, and then what was asked for: as many values as the stand-in returns."""
    count = len(runtime.cudaGetDeviceCount())
    assert count == len(machine.cudaGetDeviceCount())
    for name, given in TAKEN.items():
        real = getattr(runtime, name)(*given)
        assert isinstance(real[0], runtime.cudaError_t)
    assert runtime.cudaGetErrorString(runtime.cudaError_t.cudaErrorNoDevice)[1].startswith(b"no CUDA")
    assert len(runtime.cudaMalloc(8)) == len(machine.cudaMalloc(8)) == 2
    assert len(runtime.cudaMallocHost(8)) == 2
    assert len(runtime.cudaStreamCreateWithFlags(1)) == 2
    assert len(runtime.cudaStreamSynchronize(0)) == 1
    assert len(runtime.cudaMemsetAsync(0, 0, 8, 0)) == 1


@pytest.mark.skipif(runtime.cudaGetDeviceCount()[0] == 0, reason="there is a GPU")
def test_without_a_gpu_the_real_binding_says_what_to_do():
    with pytest.raises(ConfigError, match=r"no CUDA GPU 0 here .*--runtime onnx"):
        Gpu(0, extra="rtx")


def test_without_the_binding_the_pip_line_is_printed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingExtraError, match=r"janus-modular\[gpu\]"):
        Gpu(0, extra="gpu")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"janus-modular\[gpu\]"):
        Library("tensorrt")


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("Runtime", {"machine", "is_rtx"}),
        ("ICudaEngine", set()),
        ("IExecutionContext", set()),
        ("IRuntimeConfig", set()),
        ("TensorLocation", set()),
        ("ExecutionContextAllocationStrategy", set()),
        ("DynamicShapesKernelSpecializationStrategy", set()),
    ],
)
def test_tensorrts_classes_have_the_members_that_the_runtime_uses(machine: Any, kind: str, others: set[str]):
    standin = sys.modules["standin_tensorrt"]
    ours = getattr(standin, kind)
    names = {name for name in vars(ours) if not name.startswith("_")} - others
    assert names <= set(dir(getattr(tensorrt_rtx, kind)))
    for name in ("num_io_tensors", "num_optimization_profiles", "device_memory_size_v2"):
        assert hasattr(tensorrt_rtx.ICudaEngine, name)
    for name in ("active_optimization_profile", "is_stream_capturable", "set_device_memory"):
        assert hasattr(tensorrt_rtx.IExecutionContext, name)
    assert hasattr(tensorrt_rtx.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
    assert hasattr(tensorrt_rtx.ILogger.Severity, "INTERNAL_ERROR")


def test_engines_are_run_without_torch_onnx_and_onnx_runtime():
    above = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt_rtx", "cuda")
    program = (
        f"import janus_export.runtimes.trt.runtime, sys; print([m for m in {above} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_messages_of_the_real_library_are_reported():
    """TensorRT-RTX itself, which refuses a file that is no engine without needing a GPU for it."""
    library = Library("tensorrt-rtx")
    assert library.version == tensorrt_rtx.__version__
    with pytest.raises(JanusError, match="Serialization"):
        library.check(library.runtime.deserialize_cuda_engine(b"no engine" * 100), "loading it")


def test_bfloat16_is_rounded_as_torch_rounds_it():
    numbers = np.concatenate(
        [np.random.default_rng(0).standard_normal(1000), [0, -0.0, 1, np.inf, -np.inf, 3.4e38]]
    ).astype(np.float32)
    stored = to_stored(numbers, "bfloat16")
    want = torch.from_numpy(numbers).to(torch.bfloat16)
    np.testing.assert_array_equal(to_numbers(stored, "bfloat16"), want.float().numpy())
    np.testing.assert_array_equal(to_stored(stored, "bfloat16"), stored)  # bits stay bits
    assert np.isnan(to_numbers(to_stored(np.float32([np.nan]), "bfloat16"), "bfloat16")).all()
    buffer = HostBuffer.of(numbers, "bfloat16")
    buffer.write(numbers[::-1])
    np.testing.assert_array_equal(buffer.read(), stored[::-1])

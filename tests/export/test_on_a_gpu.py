"""On a real GPU, where there is one: memory and graphs of CUDA, and bundles in ONNX Runtime built for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.runtimes.trt.cuda import Gpu
from janus_export.runtimes.trt.device import compute_capability
from janus_export.runtimes.trt.memory import DeviceTensor, HostInputs, TokenLog, join
from janus_export.verify import verify
from janus_modular import TensorSpec
from janus_modular.errors import JanusError
from janus_modular.janus import Janus
from janus_modular.sequence import Sequence
from janus_modular.testing import RuntimeContract
from janus_modular.testing.examples import prompt

pytestmark = pytest.mark.skipif(compute_capability() is None, reason="there is no GPU")
IN_ONNX_RUNTIME = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="ONNX Runtime is the build for CPUs",
)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
QUESTIONS = [("what?", [IMAGE]), ("a longer question, no image", []), ("which?", [IMAGE, IMAGE])]


@pytest.fixture
def gpu() -> Gpu:
    return Gpu(0, extra="rtx")


def test_what_is_written_is_read(gpu: Gpu):
    for dtype, value in (("float32", 0.5), ("float16", -2.0), ("bfloat16", 1.5), ("int64", 2**40)):
        tensor = DeviceTensor.zeros(gpu, (3, 5), dtype)
        assert (tensor.read() == 0).all()
        tensor.part(1, 1).write(value)
        assert (tensor.read() == [[0] * 5, [value] * 5, [0] * 5]).all()


def test_a_graph_does_what_was_put_on_the_stream_again(gpu: Gpu):
    """The choices of steps are copied by a graph out of one place, into a log's columns, which are joined."""
    chosen = DeviceTensor.zeros(gpu, (2,), "int64")
    copy = DeviceTensor.zeros(gpu, (2,), "int64")
    gpu.synchronize()
    size = chosen.nbytes
    graph = gpu.capture(lambda: gpu.copy_across(copy.address, chosen.address, width=size))
    token_log, columns = TokenLog(gpu, (2,), 4), []
    for step in range(3):
        chosen.write([step, 10 + step])
        assert (copy.read() != chosen.read()).any()  # captured, and not done
        gpu.launch(graph)
        columns.append(token_log.next())
        columns[-1].copy_from(copy)
    np.testing.assert_array_equal(join(columns).read(), [[0, 1, 2], [10, 11, 12]])
    np.testing.assert_array_equal(columns[1].read(), [1, 11])


def test_a_host_that_runs_ahead_overtakes_nothing(gpu: Gpu):
    """More steps than there are lanes of pinned memory, and each is read after all of them were sent."""
    feed = HostInputs(gpu, [TensorSpec("at", "int64", (4096,)), TensorSpec("by", "float32", ())], {}, ahead=3)
    seen = [DeviceTensor.zeros(gpu, (4096,), "int64") for _ in range(10)]
    for step, one in enumerate(seen):
        feed.send({"at": np.arange(4096) * step, "by": 0.5})
        gpu.copy_across(one.address, feed.tensors["at"].address, width=one.nbytes)
    for step, one in enumerate(seen):
        np.testing.assert_array_equal(one.read(), np.arange(4096) * step)


def test_what_cuda_refuses_is_an_error_with_its_words(gpu: Gpu):
    with pytest.raises(JanusError, match=r"cudaMalloc on GPU 0: out of memory\. Ask for fewer rows"):
        gpu.allocate(1 << 50)
    with pytest.raises(JanusError, match="cudaStreamSynchronize"):
        gpu.capture(gpu.synchronize)
    tensor = DeviceTensor.zeros(gpu, (2,), "int64")  # the stream can be used as before
    assert (tensor.read() == 0).all()


@pytest.fixture(scope="module")
def on_gpu(tiny_bundle: Path) -> Janus:
    return Janus.from_pretrained(tiny_bundle, device="cuda")


@pytest.fixture(scope="module")
def on_cpu(tiny_checkpoint: Path) -> Janus:
    return Janus.from_pretrained(tiny_checkpoint, device="cpu")


@IN_ONNX_RUNTIME
def test_onnx_runtime_draws_the_codes_of_torch(on_gpu: Janus, on_cpu: Janus, codes_of: Callable[..., Any]):
    expected, images = codes_of(on_cpu, seed=7)
    codes, ours = codes_of(on_gpu, seed=7)
    np.testing.assert_array_equal(codes, expected)
    for one, other in zip(ours, images, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@IN_ONNX_RUNTIME
def test_onnx_runtime_answers_as_torch_does(on_gpu: Janus, on_cpu: Janus):
    settings = {"max_tokens": 20, "seed": 5}
    assert on_gpu.chat_batch(QUESTIONS, **settings) == on_cpu.chat_batch(QUESTIONS, **settings)


@IN_ONNX_RUNTIME
def test_a_cache_stays_where_it_is(on_gpu: Janus):
    session = on_gpu.runtime.open(512)
    session.step(session.prefill([on_gpu.processor.draw_prompt("a")] * 2))
    for present, past in session.runtime.graph("backbone").contract.aliases.items():
        assert session.bound_steps[1].binding.bound[present] == session.bound_steps[1].binding.bound[past]
        assert session.kv_cache.buffers[past].memory == "cuda"


@IN_ONNX_RUNTIME
@pytest.mark.parametrize("variant", ["fp32", "fp16"])
def test_a_bundle_is_proven_on_a_gpu(tiny_checkpoint: Path, tmp_path: Path, variant: str):
    export(tiny_checkpoint, tmp_path / "bundle", ExportConfig(variants=[variant]))
    [report] = verify(tmp_path / "bundle", tiny_checkpoint, device="cuda")
    assert report.failures == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_draws_and_answers_on_a_gpu(on_cpu: Janus, tiny_checkpoint: Path, dtype: str):
    """The noise is numpy's: in float32, the images are those of a CPU."""
    janus = Janus.from_pretrained(tiny_checkpoint, device="cuda", dtype=dtype)
    images, answers = janus.draw(["a", "b"], 2, seed=3), janus.chat_batch(QUESTIONS, max_tokens=8)
    assert next(janus.model.parameters()).dtype == getattr(torch, dtype)
    if dtype == "float32":
        assert answers == on_cpu.chat_batch(QUESTIONS, max_tokens=8)
        for one, other in zip(images, on_cpu.draw(["a", "b"], 2, seed=3), strict=True):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


class TestTorchKeepsTheContractOfSessionsOnAGpu(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _of_a_model(self, tiny_checkpoint: Path) -> None:
        self.runtime = Janus.from_pretrained(tiny_checkpoint, device="cuda").runtime

    def make(self) -> tuple[Any, list[Sequence]]:
        return self.runtime, [prompt(1, 2, 3), prompt(4)]


@IN_ONNX_RUNTIME
class TestOnnxRuntimeKeepsTheContractOfSessionsOnAGpu(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _of_a_bundle(self, on_gpu: Janus) -> None:
        self.runtime = on_gpu.runtime

    def make(self) -> tuple[Any, list[Sequence]]:
        return self.runtime, [prompt(1, 2, 3), prompt(4)]

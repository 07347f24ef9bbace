"""Prompts with bidirectional blocks, in ONNX Runtime and on engines: equal to torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from janus_export.bundle.bundle import load_bundle
from janus_export.bundle.contract import GraphContract
from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.runtimes.kv_cache import host_inputs
from janus_export.runtimes.prompts import block_spans
from janus_export.verify import verify
from janus_modular import ImageInput, Message, PromptError, TensorSpec, Text
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.sequence import Sequence
from janus_modular.testing import RuntimeContract
from janus_modular.testing.examples import prompt

CLOSE = {"rtol": 0, "atol": 1e-4}  # float32 sums in another order; states are of size 1
IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30, 3), dtype=np.uint8)) for i in range(2)
]
needs_bundle = pytest.mark.slow  # its export takes as long as that of a whole model


@pytest.fixture
def checkpoint(shared: Path, filled_once: Any) -> Path:
    def write(folder: Path) -> None:
        torch.manual_seed(0)
        config = resolve(load("model/tiny", ["together=[understanding]"]), ModelConfig)
        assembly = ModelAssembly.from_config(config)
        for weight in assembly.model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.3)
        save(assembly, folder)

    return filled_once(shared / "together_checkpoint", write)


@pytest.fixture
def bundle(shared: Path, checkpoint: Path, filled_once: Any) -> Path:
    config = ExportConfig(variants=["fp32"])
    return filled_once(shared / "together_bundle", lambda folder: export(checkpoint, folder, config))


@pytest.fixture
def opened_on(bundle: Path, tmp_path: Path, machine: Any, build_engines: Any) -> Any:
    def opened(runtime: str, chunk: int = 5, **changes: Any) -> Janus:
        folder = shutil.copytree(bundle, tmp_path / "bundle")
        if runtime == "tensorrt":
            build_engines(folder, "fp32", "tensorrt", changes=changes)
        return Janus.from_pretrained(folder, runtime={"name": runtime, "chunk": chunk})

    return opened


def with_blocks(*numbers: int) -> Sequence:
    sequence = prompt(*range(3, 3 + len(numbers)))
    sequence.together = np.array(numbers)
    return sequence


def question_of(janus: Janus, images: int) -> Sequence:
    texts_and_images = [part for image in IMAGES[:images] for part in (Text("see"), ImageInput(image))]
    return janus.processor.chat_prompt([Message("user", [*texts_and_images, Text("what?")])])


def test_spans_divide_no_block():
    blocks = np.array([[0, 1, 1, 1, 0, 2, 2, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]])
    assert block_spans(blocks, 3) == [(0, 1), (1, 6), (7, 3)]
    assert block_spans(blocks, 8) == [(0, 8), (8, 2)]
    assert block_spans(np.zeros((2, 7), np.int64), 3) == [(0, 3), (3, 3), (6, 1)]


def test_the_mask_of_a_run_has_the_past_and_the_own_block():
    names = ("positions", "mask", "write_index")
    contract = GraphContract("backbone", tuple(TensorSpec(name, "int64", ()) for name in names), (), {})
    blocks = np.array([[0, 1, 1, 0, 2, 2], [0, 0, 3, 3, 0, 0]])
    dense = np.tril(np.ones((6, 6), np.bool_))[None] | (
        (blocks[:, :, None] == blocks[:, None]) & (blocks[:, :, None] > 0)
    )
    for start, count in ((0, 6), (0, 4), (4, 2)):
        index = np.tile(np.arange(start, start + count), (2, 1))
        inputs = host_inputs(contract, index, index, np.full(2, count), capacity=8, together=blocks)
        assert np.array_equal(inputs["mask"][:, 0, :, :6], dense[:, start : start + count])
        assert not inputs["mask"][..., 6:].any()
        assert inputs["write_index"].tolist() == [start, start]


@needs_bundle
@pytest.mark.parametrize("runtime", ["onnx", "tensorrt"])
def test_prompts_are_read_as_in_torch_whatever_the_chunks(checkpoint: Path, opened_on: Any, runtime: str):
    torch_janus, exported = Janus.from_pretrained(checkpoint), opened_on(runtime)
    prompts = [question_of(torch_janus, images) for images in (2, 0, 1)]
    for sequence, images in zip(prompts, (2, 0, 1), strict=True):
        assert np.array_equal(question_of(exported, images).together, sequence.together)
    states = [
        session.to_host(session.prefill(prompts))
        for session in (janus.runtime.open(max(map(len, prompts))) for janus in (torch_janus, exported))
    ]
    np.testing.assert_allclose(states[1], states[0], **CLOSE)
    assert exported.chat("what?", IMAGES, max_tokens=6) == torch_janus.chat("what?", IMAGES, max_tokens=6)


@needs_bundle
@pytest.mark.parametrize("runtime", ["onnx", "tensorrt"])
class TestSessionsKeepTheContract(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _of_a_bundle(self, opened_on: Any, runtime: str) -> None:
        self.runtime = opened_on(runtime, chunk=2).runtime

    def make(self) -> tuple[Any, list[Sequence]]:
        return self.runtime, [with_blocks(0, 1, 1, 1, 0, 2, 2), with_blocks(1, 1)]


@needs_bundle
def test_an_engine_for_fewer_positions_than_a_block_says_so(opened_on: Any):
    exported = opened_on("tensorrt", prefill={"tokens": [1, 4, 12]})
    session = exported.runtime.open(300)
    with pytest.raises(PromptError, match="tokens: 16 at once, but the engine of 'backbone' was built for 1"):
        session.prefill([question_of(exported, 1)])
    session.prefill([question_of(exported, 0)])


@needs_bundle
@pytest.mark.parametrize("layers", [False, True])
def test_its_bundle_is_verified(checkpoint: Path, bundle: Path, tmp_path: Path, layers: bool):
    folder = shutil.copytree(bundle, tmp_path / "copy")
    assert load_bundle(folder).manifest["model"]["together"] == ["understanding"]
    [report] = verify(folder, checkpoint, variants=["fp32"], layers=layers)
    assert report.failures == ""

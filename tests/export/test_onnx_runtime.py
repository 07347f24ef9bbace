"""A bundle in ONNX Runtime against the checkpoint in torch: rows, words, codes; its cache in place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from janus_export.bundle.bundle import load_bundle
from janus_export.bundle.external_data import references
from janus_export.runtimes.memory import DeviceBuffer, HostBuffer, view
from janus_export.runtimes.ort import providers
from janus_export.runtimes.ort import session as session_module
from janus_export.runtimes.ort.runtime import OnnxConfig, OnnxRuntime
from janus_modular import (
    BundleError,
    ConfigError,
    ImageInput,
    JanusError,
    Message,
    PromptError,
    Text,
)
from janus_modular.janus import Janus
from janus_modular.sequence import Sequence
from janus_modular.testing import RuntimeContract
from janus_modular.testing.examples import prompt

IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30 + i, 3), dtype=np.uint8))
    for i in range(2)
]
QUESTIONS = [("what?", [IMAGES[0]]), ("a longer question, no image", []), ("which?", IMAGES)]
CLOSE = {"rtol": 0, "atol": 1e-4}  # float32 sums in another order; states are of size 1


@pytest.fixture(scope="module")
def torches(tiny_checkpoint: Path) -> Janus:
    return Janus.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def bundled(tiny_bundle: Path) -> Janus:
    return Janus.from_pretrained(tiny_bundle, runtime={"name": "onnx", "threads": 1})


def prompts_of(janus: Janus, questions=QUESTIONS):
    return [
        janus.processor.chat_prompt([Message("user", [*map(ImageInput, images), Text(text)])])
        for text, images in questions
    ]


def open_runtime(folder: Path, **options) -> OnnxRuntime:
    return OnnxRuntime(OnnxConfig(threads=1, **options), folder)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_variable_length_batch_answers_as_torch_does(torches: Janus, bundled: Janus, temperature: float):
    settings = {"max_tokens": 20, "temperature": temperature, "seed": 5}
    expected = torches.chat_batch(QUESTIONS, **settings)
    assert bundled.chat_batch(QUESTIONS, **settings) == expected
    assert len(set(expected)) == 3


def test_truncated_sampling_is_torchs(torches: Janus, bundled: Janus):
    settings = {"max_tokens": 20, "temperature": 1.5, "top_k": 30, "top_p": 0.8, "seed": 1}
    assert bundled.chat_batch(QUESTIONS, **settings) == torches.chat_batch(QUESTIONS, **settings)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_whole_drawing_has_torchs_codes(
    torches: Janus,
    bundled: Janus,
    codes_of: Callable[..., Any],
    guidance: float,
    temperature: float,
):
    settings = {"guidance": guidance, "temperature": temperature, "seed": 7}
    expected, images = codes_of(torches, **settings)
    codes, ours = codes_of(bundled, **settings)
    np.testing.assert_array_equal(codes, expected)
    for one, other in zip(ours, images, strict=True):  # truncated to 8 bits: a last digit may fall
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_a_drawing_continues_from_a_prefix(torches: Janus, bundled: Janus, codes_of: Callable[..., Any]):
    prefix = [3, 60, 0, 7, 12]
    codes, _ = codes_of(bundled, seed=7, prefix=prefix)
    np.testing.assert_array_equal(codes, codes_of(torches, seed=7, prefix=prefix)[0])
    assert (codes[:, :5] == prefix).all()


def test_a_bundle_that_cannot_embed_codes_draws_all_but_a_prefix(
    tiny_bundle: Path, codes_of: Callable[..., Any]
):
    """Of a version before the graph `embed_codes`."""
    janus = Janus.from_pretrained(tiny_bundle, variant="fp32")
    del janus.runtime.bundle.manifest["variants"]["fp32"]["files"]["embed_codes"]
    assert len(codes_of(janus, seed=7)[0])
    with pytest.raises(BundleError, match=r"no graph 'embed_codes' .* Export it again with: janus-modular"):
        codes_of(janus, seed=7, prefix=[3, 60])


def test_codes_and_their_embeddings_in_a_bundle_share_weights(tiny_bundle: Path):
    bundle = load_bundle(tiny_bundle)
    sample, embed = (
        {reference.location for reference in references(bundle.path(name, "fp32"))}
        for name in ("sample_image", "embed_codes")
    )
    assert embed < sample


@pytest.mark.parametrize(("rows", "positions"), [(1, 1), (3, 7), (4, 16)])
def test_codes_are_embedded_as_sampling_does(bundled: Janus, torches: Janus, rows: int, positions: int):
    codes = np.random.default_rng(0).integers(0, 64, (rows, positions))
    embedded = bundled.runtime.open(8).run("embed_codes", codes)
    expected = torches.model.generation.embed_codes(torch.from_numpy(codes)).detach().numpy()
    np.testing.assert_allclose(embedded, expected, atol=1e-5)  # float32: sums in another order


def test_a_drawing_depends_on_its_seed_and_not_on_its_batch(bundled: Janus, codes_of: Callable[..., Any]):
    first, _ = codes_of(bundled, seed=1)
    np.testing.assert_array_equal(first, codes_of(bundled, seed=1, batch_size=1)[0])
    assert (first != codes_of(bundled, seed=2)[0]).any()


@torch.no_grad()
@pytest.mark.parametrize(("bucket", "chunk"), [(64, 256), (3, 256), (16, 7), (1000, 1)])
def test_rows_go_on_as_in_torch_whatever_the_buckets_and_chunks(
    torches: Janus, tiny_bundle: Path, bucket: int, chunk: int
):
    """Prompts of various lengths with images, then steps in which rows pause; and a cache that grows."""
    prompts = prompts_of(torches)
    room = max(map(len, prompts)) + 12
    theirs = torches.runtime.open(room)
    ours = open_runtime(tiny_bundle, bucket=bucket, chunk=chunk).open(room)
    np.testing.assert_allclose(ours.to_host(ours.prefill(prompts)), theirs.prefill(prompts), **CLOSE)
    rng = np.random.default_rng(0)
    for step in range(12):
        x = rng.standard_normal((3, 64), np.float32)
        active = rng.random(3) < 0.7 if step else np.ones(3, np.bool_)
        expected = theirs.step(torch.from_numpy(x), active)
        np.testing.assert_allclose(ours.to_host(ours.step(x, active))[active], expected[active], **CLOSE)
    np.testing.assert_array_equal(ours.lengths, theirs.cache.lengths)


def logged(run: Callable[[], None]) -> str:
    """Return what is written to the standard error of this process, by C++ code too."""
    keep = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            run()
        finally:
            os.dup2(keep, 2)
            os.close(keep)
        file.seek(0)
        return file.read().decode()


def test_the_cache_is_written_in_place(bundled: Janus):
    session = bundled.runtime.open(512)
    prompts = prompts_of(bundled)

    def run() -> None:
        session.prefill(prompts)
        for _ in range(3):
            session.step(np.ones((3, 64), np.float32))

    assert "copying past_cache" not in logged(run)
    aliases = session.runtime.graph("backbone").contract.aliases
    assert len(aliases) == 4  # keys and values of two layers
    for present, past in aliases.items():
        assert (
            session.bound_steps[0, 3, 1].binding.bound[present]
            == session.bound_steps[0, 3, 1].binding.bound[past]
        )
        assert session.bound_steps[0, 3, 1].binding.bound[past][0] == session.kv_cache.buffers[past].address

    def elsewhere() -> None:  # the log does say it where a cache is copied
        present, past = next(iter(aliases.items()))
        session.bound_steps[0, 3, 1].binding.output(
            present, HostBuffer(session.kv_cache.buffers[past].read().copy(), "float32")
        )
        session.step(np.ones((3, 64), np.float32))

    assert "copying past_cache" in logged(elsewhere)


def test_steps_bind_nothing_but_where_choices_go(bundled: Janus, monkeypatch: pytest.MonkeyPatch):
    """Noise that is drawn anew is bound where numpy made it."""
    session = bundled.runtime.open(512)
    noise = np.ones((1, session.sizes["codes"]), np.float32)
    settings = np.float32(5), np.float32(1)
    hidden = session.prefill(prompts_of(bundled, QUESTIONS[1:2]) * 2)
    names: list[str] = []
    for way in ("bind_input", "bind_output"):
        bind = getattr(onnxruntime.IOBinding, way)
        monkeypatch.setattr(
            onnxruntime.IOBinding,
            way,
            lambda io, name, *at, bind=bind: names.append(name) or bind(io, name, *at),
        )
    bound = []
    for _ in range(6):
        names.clear()
        _, x = session.run("sample_image", hidden, noise, *settings)
        hidden = session.step(x)
        bound.append(sorted(names))
    assert bound[2:] == [["codes"]] * 4
    session.run("sample_image", hidden, noise + 1, *settings)
    assert sorted(names) == ["codes", "codes", "noise"]


def test_steps_of_several_positions_bind_and_allocate_nothing(
    bundled: Janus, monkeypatch: pytest.MonkeyPatch
):
    session = bundled.runtime.open(512)
    session.prefill(prompts_of(bundled, QUESTIONS[1:2]) * 2)
    x = np.ones((2, 5, 64), np.float32)
    hidden = session.extend(x)
    calls: list[str] = []
    for name in ("bind_input", "bind_output"):
        monkeypatch.setattr(onnxruntime.IOBinding, name, lambda *_, name=name: calls.append(name))
    monkeypatch.setattr(session_module, "allocate", lambda *_: calls.append("allocate"))
    assert session.extend(x).address == hidden.address
    assert not calls


def test_a_prompt_is_admitted_into_the_memory_of_its_rows(bundled: Janus):
    [first] = prompts_of(bundled, QUESTIONS[1:2])
    session = bundled.runtime.open(512, rows=3)
    session.admit([first], [1])
    before = {name: buffer.read().copy() for name, buffer in session.kv_cache.buffers.items()}
    addresses = {name: buffer.address for name, buffer in session.kv_cache.buffers.items()}
    session.admit([prompt(1, 2, 3)], [2])
    for name, buffer in session.kv_cache.buffers.items():
        assert buffer.address == addresses[name]
        changed = (buffer.read() != before[name]).any(axis=(1, 3))  # (rows, capacity)
        assert np.argwhere(changed).tolist() == [[2, 0], [2, 1], [2, 2]]


def test_a_cache_grows_with_its_context_and_not_with_what_it_could_hold(tiny_bundle: Path):
    runtime = open_runtime(tiny_bundle, bucket=16)
    session = runtime.open(512)
    session.prefill(prompts_of(Janus.from_pretrained(tiny_bundle), [("a", [])]))
    length = int(session.lengths[0])
    capacities = [session.kv_cache.capacity]
    for _ in range(40):
        session.step(np.ones((1, 64), np.float32))
        capacities.append(session.kv_cache.capacity)
    assert all(capacity - (length + step) <= 16 for step, capacity in enumerate(capacities))
    assert len(set(capacities)) <= 4  # one copy in 16 steps


def test_a_session_that_is_full_says_so_before_it_writes(bundled: Janus):
    prompts = prompts_of(bundled, QUESTIONS[1:2])
    session = bundled.runtime.open(len(prompts[0]) + 1)
    session.prefill(prompts)
    session.step(np.ones((1, 64), np.float32))
    with pytest.raises(PromptError, match="larger max_seq_len"):
        session.step(np.ones((1, 64), np.float32))
    with pytest.raises(PromptError, match="do not fit"):
        bundled.runtime.open(4).prefill(prompts)


def test_words_alone_load_no_visual_graph(tiny_bundle: Path):
    janus = Janus.from_pretrained(tiny_bundle)
    janus.chat("no images here", max_tokens=2)
    assert set(janus.runtime._opened) == {"backbone", "embed", "sample_text"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "int3"}, "int3"),
        ({"device": "cuda"}, "CUDAExecutionProvider"),
        ({"device": "tensorrt"}, "TensorrtExecutionProvider"),
        ({"device": "nv-tensorrt-rtx"}, "NvTensorRTRTXExecutionProvider"),
        ({"device": "tpu"}, "Expected auto, cpu, cuda"),
        ({"dtype": "float16"}, "variant"),
        ({"runtime": "onx"}, "Did you mean 'onnx'?"),
        ({"runtime": {"name": "onnx", "thread": 2}}, "threads"),
        ({"runtime": {"name": "onnx", "provider_options": {"a": "1"}}}, "expected none on a CPU"),
        ({"runtime": {"name": "onnx", "chunk": -1}}, "chunk: found -1; expected 1 or more"),
        ({"runtime": {"name": "onnx", "chunk": 0}}, "chunk: found 0; expected 1 or more"),
        ({"runtime": {"name": "onnx", "bucket": 0}}, "bucket: found 0; expected 1 or more"),
        ({"runtime": {"name": "onnx", "images": -2}}, "images: found -2; expected 1 or more"),
        ({"runtime": {"name": "onnx", "threads": -1}}, "threads: found -1; expected 0 to 1024"),
        ({"runtime": {"name": "onnx", "threads": 10**6}}, "threads: found 1000000; expected 0 to 1024"),
    ],
)
def test_a_missing_variant_or_device_is_an_error_that_lists_the_available(
    tiny_bundle: Path, options: dict, said: str
):
    with pytest.raises(JanusError) as caught:
        Janus.from_pretrained(tiny_bundle, **options)
    assert said in str(caught.value)


def test_options_of_bundles_are_refused_where_a_checkpoint_is(tiny_checkpoint: Path):
    with pytest.raises(ConfigError, match="janus-modular export"):
        Janus.from_pretrained(tiny_checkpoint, variant="fp32")


def test_a_bundle_has_no_model_in_torch(bundled: Janus):
    with pytest.raises(ConfigError, match="Load the checkpoint"):
        _ = bundled.model


def test_a_gpu_is_chosen_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(providers, "starts", lambda name: True)
    chosen = providers.choose_device("auto")
    assert (chosen.name, chosen.memory, chosen.index) == ("cuda", "cuda", 0)
    second = providers.choose_device("cuda:1")
    assert second.providers[0] == ("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"})
    limited = providers.choose_device("cuda", {"gpu_mem_limit": "1000000"})
    assert limited.providers == [
        ("CUDAExecutionProvider", {"device_id": "0", "use_tf32": "0", "gpu_mem_limit": "1000000"}),
        "CPUExecutionProvider",
    ]
    with pytest.raises(ConfigError, match=r"a GPU's number in device: cuda:1"):
        providers.choose_device("cuda", {"device_id": "1"})
    with pytest.raises(ConfigError, match=r"'bf16' is bfloat16.*export fp16"):
        providers.check_dtype(limited, "bf16", "bfloat16")
    with pytest.raises(ConfigError, match="fell back to CPUExecutionProvider"):
        providers.check_provider(second, SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"]))


def test_memory_of_a_device_is_written_and_read_through_onnx_runtime():
    """On a CPU: the calls are a GPU's, where columns of a log are addresses into it too."""
    buffer = DeviceBuffer((4, 2), "int64", "cpu", 0)
    buffer.write(np.arange(8).reshape(4, 2))
    column = view(buffer, (2,), 6)
    assert column.address == buffer.address + 3 * 2 * 8
    np.testing.assert_array_equal(column.read(), [6, 7])
    buffer.write(1)
    np.testing.assert_array_equal(buffer.read(), np.ones((4, 2)))


class TestOnnxRuntimeKeepsTheContract(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _of_a_bundle(self, tiny_bundle: Path) -> None:
        self.bundle = tiny_bundle

    def make(self) -> tuple[OnnxRuntime, list[Sequence]]:
        return OnnxRuntime(OnnxConfig(), self.bundle), [prompt(1, 2, 3), prompt(4)]


def test_a_graph_or_an_input_that_there_is_not_is_an_error_that_says_so(bundled: Janus):
    session = bundled.runtime.open(8)
    for name, words in (("image_next", "It is called 'sample_image' now"), ("nope", "it has .*backbone")):
        with pytest.raises(BundleError, match=rf"has no graph '{name}' in fp32; (.*{words}|{words})"):
            session.run(name)
    with pytest.raises(PromptError, match=r"the graph 'sample_text': found 1 inputs; expected 5: hidden"):
        session.run("sample_text", np.zeros((1, 64), np.float32))

"""A bundle's engines on a stand-in for a GPU: the right numbers, at the right addresses, in order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from janus_export.runtimes.trt.memory import HostInputs
from janus_export.runtimes.trt.session import TensorRTSession, chunks
from janus_modular import ImageInput, Message, PromptError, Text
from janus_modular.cli.app import app
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
DRAWN = 16  # codes of an image of configs/model/tiny


@pytest.fixture(scope="module")
def torches(tiny_checkpoint: Path) -> Janus:
    return Janus.from_pretrained(tiny_checkpoint)


@pytest.fixture
def opened(machine: Any, built_bundle: Path) -> Janus:
    return Janus.from_pretrained(built_bundle, runtime="tensorrt")


def options(**chosen: Any) -> dict[str, Any]:
    return {"name": "tensorrt", **chosen}


def prompts_of(janus: Janus, questions=QUESTIONS):
    return [
        janus.processor.chat_prompt([Message("user", [*map(ImageInput, images), Text(text)])])
        for text, images in questions
    ]


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_variable_length_batch_answers_as_torch_does(
    torches: Janus, machine: Any, built_bundle: Path, target: str, temperature: float
):
    settings = {"max_tokens": 12, "temperature": temperature, "top_k": 30, "top_p": 0.9, "seed": 5}
    janus = Janus.from_pretrained(built_bundle, runtime=target)
    assert janus.chat_batch(QUESTIONS, **settings) == torches.chat_batch(QUESTIONS, **settings)
    # One graph for the choice alone, which is waited for, and one for the step.
    assert machine.counted("capture") == 2


def test_words_and_images_go_through_in_as_many_as_the_engines_take(
    torches: Janus, machine: Any, tiny_bundle: Path, tmp_path: Path, build_engines: Any
):
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    changes = {"embed": {"tokens": [1, 1, 100]}, "understand": {"images": [1, 1, 2]}}
    build_engines(folder, "fp32", "tensorrt", changes={**changes, "prefill": {"tokens": [24, 24, 24]}})
    janus = Janus.from_pretrained(folder, runtime="tensorrt")
    assert janus.chat_batch(QUESTIONS, max_tokens=4) == torches.chat_batch(QUESTIONS, max_tokens=4)
    asked = [entry[1] for entry in machine.log if entry[0] == "enqueue"]
    assert (asked.count("embed"), asked.count("understand")) == (3, 2)
    lengths = [len(prompt) for prompt in prompts_of(janus)]
    assert asked.count("backbone") == -(-max(lengths) // 24) + 2  # one step enqueued, one captured


def test_more_images_than_the_decoder_takes_are_decoded_in_turn(torches: Janus, opened: Janus, machine: Any):
    drawn = opened.draw("a", 5, guidance=1.0, seed=4)
    assert [entry[1] for entry in machine.log if entry[0] == "enqueue"].count("decode_image") == 2
    for one, other in zip(drawn, torches.draw("a", 5, guidance=1.0, seed=4), strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(("guidance", "temperature"), [(5.0, 1.0), (5.0, 0.0), (1.0, 1.0)])
def test_a_whole_drawing_has_torchs_codes(
    torches: Janus,
    machine: Any,
    built_bundle: Path,
    codes_of: Callable[..., Any],
    target: str,
    guidance: float,
    temperature: float,
):
    settings = {"guidance": guidance, "temperature": temperature, "seed": 7}
    janus = Janus.from_pretrained(built_bundle, runtime=target)
    expected, images = codes_of(torches, **settings)
    codes, ours = codes_of(janus, **settings)
    np.testing.assert_array_equal(codes, expected)
    for one, other in zip(ours, images, strict=True):  # truncated to 8 bits: a last digit may fall
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_a_drawing_continues_from_a_prefix(
    torches: Janus, machine: Any, built_bundle: Path, codes_of: Callable[..., Any], target: str
):
    janus = Janus.from_pretrained(built_bundle, runtime=target)
    prefix = [3, 60, 0, 7, 12]
    codes, _ = codes_of(janus, seed=7, prefix=prefix)
    np.testing.assert_array_equal(codes, codes_of(torches, seed=7, prefix=prefix)[0])
    assert (codes[:, :5] == prefix).all()


@torch.no_grad()
@pytest.mark.parametrize("chunk", [256, 7, 1])
def test_rows_go_on_as_in_torch_whatever_the_chunks(
    torches: Janus, machine: Any, built_bundle: Path, chunk: int
):
    """Prompts of various lengths with images, then steps in which rows pause."""
    prompts = prompts_of(torches)
    room = max(map(len, prompts)) + 12
    theirs = torches.runtime.open(room)
    janus = Janus.from_pretrained(built_bundle, runtime=options(chunk=chunk))
    ours = janus.runtime.open(room)
    np.testing.assert_allclose(ours.to_host(ours.prefill(prompts)), theirs.prefill(prompts), **CLOSE)
    rng = np.random.default_rng(0)
    for step in range(12):
        x = rng.standard_normal((3, 64), np.float32)
        active = rng.random(3) < 0.7 if step else np.ones(3, np.bool_)
        expected = theirs.step(torch.from_numpy(x), active)
        np.testing.assert_allclose(ours.to_host(ours.step(x, active))[active], expected[active], **CLOSE)
    np.testing.assert_array_equal(ours.lengths, theirs.cache.lengths)
    profiles = {(entry[1], entry[2]) for entry in machine.log if entry[0] == "enqueue"}
    assert {("backbone", 0), ("backbone", 1)} <= profiles


def steps_of(machine: Any, session: TensorRTSession, hidden: Any, count: int) -> list[list[tuple[Any, ...]]]:
    """Draw ``count`` steps as the loop does; return what was asked of the machine in each."""
    noise = np.ones((1, session.sizes["codes"]), np.float32)
    logs = []
    for _ in range(count):
        machine.log.clear()
        _, x = session.run("sample_image", hidden, noise, np.float32(5), np.float32(1))
        hidden = session.step(x)
        logs.append(list(machine.log))
    return logs


def test_a_drawing_step_is_two_copies_in_and_one_launch(opened: Janus, machine: Any):
    """No allocation, no binding, no waiting; the host only sends noise, positions and who sees what."""
    session = opened.runtime.open(64)
    hidden = session.prefill([opened.processor.draw_prompt("a")] * 2)
    logs = steps_of(machine, session, hidden, 6)
    assert [entry[0] for entry in logs[0] if entry[0] in ("enqueue", "capture", "launch")] == [
        "enqueue",  # sample_image and then the backbone: the run that TensorRT wants before a capture
        "enqueue",
    ]
    doing = [entry[0] for entry in logs[1] if entry[0] != "copy"]
    assert doing[-4:] == ["enqueue", "enqueue", "capture", "launch"]
    for log in logs[2:]:
        assert [entry[0] for entry in log] == ["copy", "copy", "launch", "copy"]
        sent, told, kept = (entry for entry in log if entry[0] == "copy")
        assert sent[1:] == ("HostToDevice", sent[2], "")  # pinned: CUDA does not wait for it
        assert told[1:] == ("HostToDevice", told[2], "")
        assert kept[1:] == ("DeviceToDevice", 8, "")  # the code that was chosen


def test_addresses_stay_and_caches_are_written_in_place(opened: Janus, machine: Any):
    session = opened.runtime.open(64)
    hidden = session.prefill([opened.processor.draw_prompt("a")] * 2)
    session.gpu.synchronize()
    steps_of(machine, session, hidden, 6)
    session.gpu.synchronize()
    ran = [entry for entry in machine.log if entry[0] == "run"]
    assert [entry[1] for entry in ran] == ["sample_image", "backbone"] * 6
    backbone = {entry[2] for entry in ran if entry[1] == "backbone"}
    assert len(backbone) == 1
    assert len({entry[2] for entry in ran if entry[1] == "sample_image"}) == 1
    at = dict(next(iter(backbone)))
    aliases = opened.runtime.engine("backbone").contract.aliases
    assert len(aliases) == 4  # keys and values of two layers
    for present, past in aliases.items():
        assert at[present] == at[past] == session.kv_cache.buffers[past].address
    sample_image = dict(next(entry[2] for entry in ran if entry[1] == "sample_image"))
    assert sample_image["hidden"] == at["hidden"]  # what steps hand to each other never moves
    assert sample_image["x"] == at["x"]


@pytest.mark.parametrize(("ahead", "waits"), [(1, 15), (4, 3), (16, 0), (1000, 0)])
def test_a_drawing_waits_every_k_steps_and_at_its_end(
    machine: Any, built_bundle: Path, ahead: int, waits: int
):
    janus = Janus.from_pretrained(built_bundle, runtime=options(sync_every=ahead))
    waited: list[int] = []
    janus.draw("a", progress=lambda done, of: waited.append(janus.runtime.gpu.epoch))
    assert waited[-1] - waited[0] == waits
    assert janus.runtime.gpu.epoch - waited[0] == waits + 2  # the images and their codes are waited for
    assert machine.counted("capture") == 1
    assert machine.counted("launch") == DRAWN - 2  # the first step is enqueued, the last has none behind it


def test_without_graphs_steps_are_enqueued(torches: Janus, machine: Any, built_bundle: Path):
    janus = Janus.from_pretrained(built_bundle, runtime=options(cuda_graph=False))
    drawn = janus.draw("a", seed=3)[0]
    assert machine.counted("capture") == machine.counted("launch") == 0
    apart = np.asarray(drawn, int) - np.asarray(torches.draw("a", seed=3)[0], int)
    assert np.abs(apart).max() <= 1


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_engines_that_cannot_be_captured_draw_too_and_say_so(
    torches: Janus, machine: Any, tiny_bundle: Path, tmp_path: Path, build_engines: Any, target: str
):
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    build_engines(folder, "fp32", target, sample_image={"capturable": False})
    janus = Janus.from_pretrained(folder, runtime=target)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        drawn = janus.draw("a", seed=3)[0]
    apart = np.asarray(drawn, int) - np.asarray(torches.draw("a", seed=3)[0], int)
    assert np.abs(apart).max() <= 1


@torch.no_grad()
def test_sessions_take_turns(torches: Janus, opened: Janus, machine: Any):
    """Two at once on one set of contexts: other rows make graphs void, the same rows only move addresses."""
    drawing = [opened.processor.draw_prompt("a")]
    ours, theirs = [], []
    for rows in (2, 2, 3):
        pair = opened.runtime.open(60), torches.runtime.open(60)
        for session, many in zip(pair, (ours, theirs), strict=True):
            session.prefill(drawing * rows)
            many.append(session)
    rng = np.random.default_rng(1)
    for turn in (0, 0, 0, 1, 1, 1, 0, 1, 2, 2, 2, 0, 0, 0, 1, 2):
        x = rng.standard_normal((3 if turn == 2 else 2, 64), np.float32)
        got = ours[turn].to_host(ours[turn].step(x))
        np.testing.assert_allclose(got, theirs[turn].step(torch.from_numpy(x)), **CLOSE)


def test_a_session_gives_its_memory_back(opened: Janus, machine: Any):
    opened.draw("a")
    held = sum(block.size for block in machine.blocks.values())
    opened.draw("a")
    assert sum(block.size for block in machine.blocks.values()) == held
    session = opened.runtime.open(300)
    session.prefill([opened.processor.draw_prompt("a")])
    assert sum(block.size for block in machine.blocks.values()) > held
    del session
    opened.runtime.gpu.synchronize()  # prompts that are being read keep what they need
    assert sum(block.size for block in machine.blocks.values()) == held


def test_words_alone_load_no_visual_engine(opened: Janus, machine: Any):
    opened.chat("no images here", max_tokens=2)
    assert {entry[1] for entry in machine.log if entry[0] == "load"} == {"backbone", "embed", "sample_text"}


def test_the_stand_in_finds_a_host_buffer_that_is_overwritten_too_early(
    opened: Janus, machine: Any, monkeypatch: pytest.MonkeyPatch
):
    """One lane for all steps, and nobody waits: what the tests above would look like then."""
    right = opened.draw("a", seed=3)[0]
    lane = HostInputs._next_buffer

    def only_one(self: HostInputs) -> Any:
        self.used, self.epoch = 0, self.gpu.epoch
        return lane(self)

    monkeypatch.setattr(HostInputs, "_next_buffer", only_one)
    assert (np.asarray(opened.draw("a", seed=3)[0]) != np.asarray(right)).any()


def test_the_stand_in_finds_a_wait_that_is_missing(
    opened: Janus, machine: Any, monkeypatch: pytest.MonkeyPatch
):
    session = opened.runtime.open(64)
    session.prefill([opened.processor.draw_prompt("a")])
    hidden = session.step(np.ones((1, 64), np.float32))
    monkeypatch.setattr(session.gpu, "synchronize", lambda: None)
    got = session.to_host(hidden)
    early = got.copy()
    machine.drain()
    assert (got != early).any()


@pytest.mark.parametrize(
    ("total", "low", "high", "cut"),
    [
        (10, 1, 16, [(0, 10)]),
        (10, 1, 4, [(0, 4), (4, 4), (6, 4)]),
        (9, 1, 4, [(0, 3), (3, 3), (6, 3)]),
        (3, 5, 8, [(0, 5)]),
        (9, 5, 8, [(0, 5), (4, 5)]),
        (17, 8, 8, [(0, 8), (8, 8), (9, 8)]),
    ],
)
def test_prompts_are_cut_into_even_chunks(total: int, low: int, high: int, cut: list[tuple[int, int]]):
    assert chunks(total, low, high) == cut


def test_chat_and_draw_take_engines_on_the_command_line(machine: Any, built_bundle: Path, tmp_path: Path):
    line = ["chat", str(built_bundle), "what?", "--max-tokens", "4", "--runtime", "tensorrt", "--json"]
    asked = CliRunner().invoke(app, line)
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["answer"]
    to = str(tmp_path / "a.png")
    line = [
        "draw",
        str(built_bundle),
        "a",
        "-n",
        "2",
        "-o",
        to,
        "--runtime",
        "tensorrt-rtx",
        "--variant",
        "fp32",
    ]
    drawn = CliRunner().invoke(app, line)
    assert drawn.exit_code == 0, drawn.output
    assert Path(to).exists()


@pytest.fixture
def small_runtime(machine: Any, tiny_bundle: Path, tmp_path: Path, build_engines: Any) -> Any:
    """Engines that read 4 to 16 positions of three rows, into caches whose rows are not aligned."""
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    changes = {"prefill": {"tokens": [4, 4, 16]}}
    build_engines(folder, "fp32", "tensorrt", rows=3, capacity=41, changes=changes)
    return Janus.from_pretrained(folder, runtime="tensorrt").runtime


@pytest.mark.parametrize("length", [40, 38, 36, 30])
def test_rows_continue_beside_a_full_row(torches: Janus, small_runtime: Any, length: int):
    prompts = [prompt(*range(3, 3 + length)), prompt(5, 6)]
    x = np.random.default_rng(2).standard_normal((2, 14, 64), np.float32)
    pair = small_runtime.open(40), torches.runtime.open(40)
    for session in pair:
        session.prefill(prompts)
    for start in (0, 7):
        ours, theirs = (s.to_host(s.extend(x[:, start : start + 7], [0, 7])) for s in pair)
        np.testing.assert_allclose(ours[1], theirs[1], **CLOSE)
    for session in pair:
        session.truncate([length - 1, 0])
    ours, theirs = (s.to_host(s.extend(x[:, :2], [1, 0])) for s in pair)
    np.testing.assert_allclose(ours[0, 0], theirs[0, 0], **CLOSE)


def test_more_positions_than_the_engine_takes_are_an_error_before_anything_is_enqueued(
    small_runtime: Any, machine: Any
):
    session = small_runtime.open(40)
    session.prefill([prompt(1, 2)])
    machine.log.clear()
    with pytest.raises(PromptError, match="found 17 positions a row; expected 16 at most"):
        session.extend(np.zeros((1, 17, 64), np.float32))
    assert machine.log == []


def test_steps_of_several_positions_are_captured_and_allocate_nothing(small_runtime: Any, machine: Any):
    session = small_runtime.open(40)
    session.prefill([prompt(1, 2), prompt(3)])
    x = session.take(np.ones((10, 64), np.float32), np.arange(10).reshape(2, 5))  # on the GPU
    for _ in range(5):
        machine.log.clear()
        session.extend(x)
    assert {entry[0] for entry in machine.log} == {"copy", "launch"}


class TestTensorRTRuntimeKeepsTheContract(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _of_engines(self, small_runtime: Any) -> None:
        self.runtime = small_runtime

    def make(self) -> tuple[Any, list[Sequence]]:
        return self.runtime, [prompt(1, 2, 3), prompt(4)]

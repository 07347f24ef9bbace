"""``bench`` on the tiny model: its fields exist and are consistent. Speed is not tested."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from janus_export.bench import bytes_read
from janus_export.bench.bytes_read import cache_read, multiplied, read_bandwidth
from janus_export.bench.run import bench
from janus_export.bundle.bundle import load_bundle
from janus_export.process_memory import AnonymousPeak, anonymous_memory, peak_memory
from janus_modular import ConfigError, Janus, JanusError
from janus_modular.checkpoints import convert
from janus_modular.cli.app import app

FEW = ["--tokens", "3", "--rounds", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Read little, and leave torch the threads that it had."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(bytes_read, "MEASURED_BYTES", 1 << 22)
    yield
    torch.set_num_threads(threads)


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, words)])


@pytest.fixture(params=["checkpoint", "bundle"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Path, tiny_bundle: Path) -> Path:
    return tiny_checkpoint if request.param == "checkpoint" else tiny_bundle


def test_json_says_how_fast_each_mode_is(model: Path):
    done = run(model, *FEW, "--batch-size", 2, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["ran"] | {"threads": 1, "rounds": 2, "batch_size": 2, "device": "cpu"} == facts["ran"]
    assert facts["machine"]["cores"] >= 1
    for mode, rows in (("text", 2), ("drawing", 4)):  # an image takes two under guidance
        speed = facts[mode]
        assert speed["rows"] == rows
        assert speed["steps"] == 3
        assert speed["per_s"] == pytest.approx(2 / speed["step_s"])
        share = speed["read_bytes"] / speed["step_s"] / facts["read_bandwidth_bytes_per_s"]
        assert speed["bandwidth_share"] == pytest.approx(share)
    drawing = facts["drawing"]
    whole = drawing["first_s"] + 15 * drawing["step_s"] + drawing["decode_s"]
    assert drawing["positions"] == 16
    assert drawing["image_s"] == pytest.approx(whole / 2)
    assert facts["load_s"] > 0
    assert facts["peak_memory_bytes"] > 1 << 24  # more than Python alone


def test_a_person_reads_the_same(model: Path):
    done = run(model, *FEW)
    assert done.exit_code == 0, done.output
    labels = [line[:16].strip() for line in done.stdout.splitlines()[1:]]
    assert labels == [
        "machine",
        "load",
        *("text", "first token", "a step"),
        *("drawing", "first position", "a step", "an image"),
        "peak memory",
        "read bandwidth",
    ]


def test_an_image_has_no_more_steps_than_codes(tiny_bundle: Path):
    facts = bench(tiny_bundle, tokens=40, rounds=1, threads=1)
    assert facts["text"]["steps"] == 40
    assert facts["drawing"]["steps"] == 15


@pytest.mark.parametrize("tokens", [10**5, 512])
def test_steps_that_the_context_does_not_hold_are_refused(
    tiny_bundle: Path, tiny_checkpoint: Path, tokens: int
):
    for model in (tiny_bundle, tiny_checkpoint):
        with pytest.raises(ConfigError, match=f"tokens: found {tokens}; expected 2[0-9]+ at most"):
            bench(model, tokens=tokens, rounds=1)


def test_a_step_reads_the_same_bytes_in_torch_and_in_graphs(tiny_checkpoint: Path, tiny_bundle: Path):
    torches, bundled = (bench(path, tokens=2, rounds=1, threads=1) for path in (tiny_checkpoint, tiny_bundle))
    quantized = bench(tiny_bundle, variant="cpu-int4", tokens=2, rounds=1, threads=1)
    for mode in ("text", "drawing"):
        whole = torches[mode]["read_bytes"]
        # Graphs hold a few constants where torch computes: sizes, and the ids that are never said.
        assert bundled[mode]["read_bytes"] == pytest.approx(whole, rel=0.01)
        assert quantized[mode]["read_bytes"] < 0.8 * whole
    assert quantized["ran"]["variant"] == "cpu-int4"


def test_tables_that_are_looked_up_are_not_read_whole(tiny_bundle: Path):
    assert multiplied(load_bundle(tiny_bundle), "embed", "fp32") == 0
    assert multiplied(load_bundle(tiny_bundle), "backbone", "fp32") > 0


def test_a_row_reads_keys_and_values_of_its_positions(tiny_checkpoint: Path, tiny_bundle: Path):
    runtimes = [Janus.from_pretrained(path).runtime for path in (tiny_checkpoint, tiny_bundle)]
    config = runtimes[0].model.config.backbone.config.config  # type: ignore[attr-defined]
    heads, width = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    expected = 10 * 2 * config["num_hidden_layers"] * heads * width * 4
    assert [cache_read(runtime, 10) for runtime in runtimes] == [expected, expected]
    runtimes[0].model.to("meta")  # on a device where nothing of ours is made by itself, as on a GPU
    assert cache_read(runtimes[0], 10) == expected


def test_bandwidth_and_memory_are_numbers_of_this_process():
    assert read_bandwidth(2, passes=1) > 0
    if Path("/proc/self/status").exists():
        held, peak = anonymous_memory(os.getpid()), peak_memory()
        assert held
        assert peak
        assert peak >= held
    assert anonymous_memory(2**22 + 1) is None  # beyond the largest id that Linux gives


def test_what_a_checkpoint_has_not_is_refused(tiny_checkpoint: Path):
    with pytest.raises(JanusError, match="checkpoint"):
        bench(tiny_checkpoint, variant="fp32")


@pytest.mark.slow
def test_a_bundle_is_measured_without_torch(tiny_bundle: Path):
    program = (
        "import sys\n"
        "from janus_modular.cli.app import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "finally:\n    assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    line = [sys.executable, "-c", program, "bench", str(tiny_bundle), *FEW, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ran"]["runtime"] == "onnx"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_a_peak_is_of_memory_and_not_of_mapped_files(tmp_path: Path):
    file = tmp_path / "mapped"
    file.write_bytes(bytes(1 << 26))
    mapped = np.memmap(file, np.uint8, "r")
    with AnonymousPeak() as peak:
        assert mapped.sum() == 0
        before = anonymous_memory()
    assert before
    assert peak.bytes
    assert peak.bytes < before + (1 << 25)  # the file is 1 << 26
    before = anonymous_memory() or 0
    with AnonymousPeak() as peak:
        pages = mmap.mmap(-1, 1 << 26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # never of a freed heap
        held = np.frombuffer(pages, np.uint8)
        held[:] = 1
    assert peak.bytes
    assert peak.bytes >= before + held.nbytes - (1 << 24)  # what was there may have become less


def test_a_drawing_of_several_codes_in_a_pass_is_timed_by_code(tiny_checkpoint: Path, tmp_path: Path):
    """It has fewer passes than codes, and feeds positions ahead of those that are timed."""
    convert(tiny_checkpoint, tmp_path / "model", overrides=["image_sampler=parallel"])
    for tokens, timed in ((3, 3), (64, 15)):
        facts = bench(tmp_path / "model", tokens=tokens, rounds=1, threads=1)
        assert facts["drawing"]["steps"] == timed
        assert facts["drawing"]["per_s"] == pytest.approx(1 / facts["drawing"]["step_s"])

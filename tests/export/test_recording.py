"""Recorded sessions: every call of a sampler is recorded, and can be replayed in another session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.reference.recording import RecordingRuntime, Run
from janus_export.verify import verify
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.janus import Janus
from janus_modular.plugins import Plugins

SAMPLER = '''
"""An image sampler that admits prompts out of order and feeds each position twice."""
from dataclasses import dataclass
from typing import Any
import numpy as np
from janus_modular import ImageSampler, ImageSamplerSettings, Registry, hookimpl
from janus_plugins.samplers.noise import exponential_noise

@dataclass
class TwiceSettings(ImageSamplerSettings):
    seed: int = 0

def twice(session, prompts, settings):
    numbers = settings.numbers or range(settings.first, settings.first + len(prompts))
    rngs = [np.random.default_rng((settings.seed, number)) for number in numbers]
    rows = len(prompts)
    session.admit(prompts[::-1], range(rows))
    session.free([0])
    last = session.take(session.admit(prompts[-1:], [0]), [0])
    others = session.take(session.extend(session.run("embed", np.zeros((rows, 1), np.int64))), range(rows))
    session.truncate([len(prompt) for prompt in prompts[::-1]])
    session.free(range(rows))
    hidden = session.admit(prompts, range(rows))
    codes, one = [], np.float32(1)
    for step in range(session.image_positions):
        noise = exponential_noise(rngs, session.sizes["codes"])
        ids, x = session.run("sample_image", hidden, noise, one, one)
        codes.append(ids)
        yield step + 1, session.image_positions
        if step + 1 < session.image_positions:
            pairs = session.take(x, np.repeat(np.arange(rows), 2).reshape(rows, 2))
            counts = np.full(rows, 1 + (step % 2 and step + 2 < session.image_positions))
            states = session.extend(pairs, counts)
            hidden = session.take(states, np.arange(rows) * 2)
            session.truncate(session.lengths - counts + 1)
    return session.to_host(session.run("decode_image", session.stack(codes)))

@hookimpl
def register_image_samplers(registry: Registry[ImageSampler[Any]]) -> None:
    registry.add("twice", twice, TwiceSettings)
'''


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path, plugins: Plugins) -> Path:
    """The tiny model with an image sampler that uses each method of a session."""
    (file := tmp_path / "twice.py").write_text(SAMPLER, "utf-8")
    plugins.add_file(file)
    assembly = ModelAssembly.from_checkpoint(tiny_checkpoint, plugins=plugins)
    assembly.model.config.image_sampler = "twice"
    save(assembly, tmp_path / "model", plugins=plugins)
    return tmp_path / "model"


def recorded(model: Path, plugins: Plugins) -> tuple[RecordingRuntime, Run]:
    janus = Janus.from_pretrained(model, device="cpu", plugins=plugins)
    recording = RecordingRuntime(janus.runtime)
    images = Janus(recording, janus.processor, plugins=plugins).draw(["a", "much longer", "three"], seed=3)
    expected = janus.draw(["a", "much longer", "three"], seed=3)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    return recording, recording.runs[-1]


def test_every_call_of_a_sampler_is_recorded_and_replayed(model: Path, plugins: Plugins):
    recording, run = recorded(model, plugins)
    methods = [call.method for call in run.backbone]
    assert methods[:7] == ["admit", "free", "admit", "extend", "truncate", "free", "admit"]
    assert {"extend", "truncate"} == set(methods[7:])
    assert [len(prompt) for prompt in run.prompts] == run.backbone[0].after.tolist()
    states = run.replay(recording.runtime)
    assert len(states) == len(run.reads) > 10
    for got, read in zip(states, run.reads, strict=True):
        assert np.array_equal(got, read.states())
    kept = [read.valid.sum() for read in run.reads]
    assert set(kept) == {1, 3, 6}


def test_a_row_alone_has_its_recorded_states(model: Path, plugins: Plugins):
    recording, run = recorded(model, plugins)
    for row in range(3):
        alone = run.row(row)
        assert {call.method for call in alone.backbone} == {"prefill", "extend", "truncate"}
        for got, read in zip(alone.replay(recording.runtime), alone.reads, strict=True):
            assert_allclose(got, read.states(), atol=1e-4)  # kernels sum in another order for one row


@pytest.mark.slow
def test_verify_replays_what_the_sampler_called(model: Path, tmp_path: Path):
    export(model, tmp_path / "bundle", ExportConfig(variants=["fp32", "cpu-int8"]))
    for report in verify(tmp_path / "bundle", model):
        assert report.passed, report
        names = [check.name for checks in report.checks.values() for check in checks]
        assert (
            "a drawing's rows: steps" if report.variant == "fp32" else "drawings: cosine of states"
        ) in names

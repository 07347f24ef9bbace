"""Validation during training: the losses of these samples, without an effect on the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from janus_modular import ConfigError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.model.batch import collate
from janus_modular.model.build import build_model
from janus_modular.plugins import default_plugins
from janus_modular.training.dry_run import dry_run
from janus_modular.training.run_setup import open_sources
from janus_modular.training.sampler_check import image_sampler_mismatch
from janus_modular.training.train import train
from janus_modular.training.validation_schema import ValidationConfig
from janus_modular.weights.files import open_weights

from .conftest import Make, Rank

TIMINGS = ("steps_per_second", "samples_per_second", "tokens_per_second")


def validated(data: Path, **changes: Any) -> dict[str, Any]:
    """Return a setting of the config: four samples of each source, two drawings, a question."""
    held_out = {
        "colours": {"name": "jsonl", "path": str(data / "read.jsonl"), "questions": ["Colour?"]},
        "drawn": {"name": "jsonl", "path": str(data / "draw.jsonl"), "task": "draw"},
    }
    return {
        "every": 2,
        "sources": held_out,
        "samples": 4,
        "prompts": ["red", "blue"],
        "questions": [{"text": "Colour?", "images": [str(data / "red.png")]}, {"text": "Why?"}],
        "max_tokens": 4,
        **changes,
    }


@pytest.mark.parametrize("samples", [4, 99])  # 99: more than the sources have
def test_losses_are_those_of_the_saved_model(make: Make, metrics: Any, data: Path, samples: int):
    config = make(
        validation=validated(data, samples=samples), schedule={"steps": 5}, checkpoint_every=2, keep=9
    )
    folder = train(config, quiet=True)
    lines = {line["step"]: line for line in metrics(config) if "validation/drawn" in line}
    assert sorted(lines) == [2, 4, 5]  # also after the last step
    sources = open_sources(config, default_plugins())
    for step, path in ((4, Path(config.output) / "checkpoints" / "step-0000004"), (5, folder)):
        assembly = ModelAssembly.from_checkpoint(path)
        for name, source in (("colours", "read"), ("drawn", "draw")):
            sequences = [
                assembly.processor.sequence(sources[source].sample(i, np.random.default_rng(0)))
                for i in range(min(samples, len(sources[source])))
            ]
            with torch.no_grad():
                losses = assembly.model.eval()(collate(sequences)).losses
            for loss, values in losses.items():
                expected = float(values.mean())
                assert lines[step][f"validation/{name}/{loss}"] == pytest.approx(expected, rel=1e-5)
            expected = float(torch.cat(list(losses.values())).mean())
            assert lines[step][f"validation/{name}"] == pytest.approx(expected, rel=1e-5)


def test_drawings_and_answers_are_written(make: Make, data: Path):
    config = make(validation=validated(data), schedule={"steps": 2})
    janus = Janus.from_pretrained(train(config, quiet=True), device="cpu")
    folder = Path(config.output) / "validation" / "step-0000002"
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers.json",
        "drawing-0.png",
        "drawing-1.png",
    ]
    for number, image in enumerate(janus.draw(["red", "blue"], seed=0)):
        with Image.open(folder / f"drawing-{number}.png") as drawing:
            assert np.abs(np.asarray(drawing, int) - np.asarray(image, int)).max() <= 1
    answers = json.loads((folder / "answers.json").read_text("utf-8"))
    want = janus.chat_batch([("Colour?", [data / "red.png"]), ("Why?", [])], max_tokens=4)
    assert answers == [
        {"question": question, "answer": str(answer)}
        for question, answer in zip(("Colour?", "Why?"), want, strict=True)
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_validated_run_is_the_run_without(
    make: Make, metrics: Any, data: Path, tmp_path: Path, dropout: float
):
    """Losses and weights to the bit, with dropout too: neither modes nor random states change."""
    drop = {"model.backbone.config.attention_dropout": dropout}
    plain = make(**drop)
    train(plain, quiet=True)
    measured = make(**drop, validation=validated(data), output=str(tmp_path / "measured"))
    train(measured, quiet=True)
    kept = [
        [{k: v for k, v in line.items() if k not in TIMINGS} for line in metrics(config) if "loss" in line]
        for config in (plain, measured)
    ]
    assert kept[0] == kept[1]
    a, b = (open_weights(Path(config.output) / "model") for config in (plain, measured))
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("parallel", [{}, {"backbone": "fsdp", "understanding.encoder": "fsdp"}], ids=str)
def test_several_processes_validate_together(
    make: Make, ranks: Callable[..., list[Rank]], metrics: Any, data: Path, tmp_path: Path, parallel: Any
):
    keys = {"batch": 6, "validation": validated(data), "schedule": {"steps": 2}}
    alone = make(**keys)
    train(alone, quiet=True)
    several = make(**keys, parallel=parallel, output=str(tmp_path / "several"))
    outcomes = ranks(2, lambda rank: str(train(several, quiet=True)))
    assert [outcome.error for outcome in outcomes] == ["", ""]
    [one], [two] = ([line for line in metrics(c) if "validation/drawn" in line] for c in (alone, several))
    assert two == pytest.approx(one, rel=1e-4)
    first, second = (
        np.asarray(Image.open(Path(c.output) / "validation/step-0000002/drawing-0.png"), int)
        for c in (alone, several)
    )
    assert np.abs(first - second).max() <= 2


def test_a_tracker_gets_the_drawings(make: Make, data: Path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = [{"name": "tensorboard"}]
    config = make(validation=validated(data), schedule={"steps": 2}, trackers=trackers)
    train(config, quiet=True)
    accumulated = events.EventAccumulator(str(Path(config.output) / "tensorboard"))
    accumulated.Reload()
    assert accumulated.Tags()["images"] == ["validation/red", "validation/blue"]
    [event] = accumulated.Images("validation/red")
    assert (event.step, event.width, event.height) == (2, 32, 32)
    assert "validation/drawn" in accumulated.Tags()["scalars"]
    answers = json.loads((Path(config.output) / "validation/step-0000002/answers.json").read_text("utf-8"))
    [text] = accumulated.Tensors("validation/answer-0/text_summary")
    question, _, answer = text.tensor_proto.string_val[0].decode().partition("\n\n")
    assert {"question": question, "answer": answer} == answers[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {"held": {"name": "jsonl", "path": "missing.jsonl"}}}, "validation.sources.held"),
        ({"questions": [{"text": "?", "images": ["missing.png"]}]}, "validation.questions: .*missing.png"),
    ],
)
def test_what_cannot_be_measured_is_an_error_before_the_run(
    make: Make, data: Path, changes: dict[str, Any], message: str
):
    config = make(validation=validated(data, **changes))
    for run in (
        lambda: train(config, quiet=True),
        lambda: dry_run(config, default_plugins(), Console(quiet=True)),
    ):
        with pytest.raises(ConfigError, match=message):
            run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1}, r"validation\.temperature: found -1"),
        ({"guidance": 1e9}, r"validation\.guidance: found 1000000000"),
        ({"prompts": ["red" * 500]}, r"validation\.prompts: 'redred.*(?s:.*)positions"),
        ({"questions": [{"text": "Colour?" * 300}]}, r"validation\.questions: 'Colour.*positions"),
        ({"questions": [{"text": "Alike?", "images": 40}]}, r"validation\.questions: 'Alike.*positions"),
    ],
)
def test_what_samplers_refuse_is_an_error_before_the_run(
    make: Make, data: Path, changes: dict[str, Any], message: str
) -> None:
    for question in changes.get("questions", ()):
        question["images"] = [str(data / "red.png")] * question.get("images", 0)
    config = make(validation=validated(data, **changes))
    for action in (
        lambda: dry_run(config, default_plugins(), Console(quiet=True)),
        lambda: train(config, quiet=True),
    ):
        with pytest.raises(ConfigError, match=message):
            action()


def test_an_image_sampler_that_does_not_fit_the_path_is_an_error(make: Make, data: Path) -> None:
    config = make(model__image_sampler="rectified-flow")
    for action in (
        lambda: dry_run(config, default_plugins(), Console(quiet=True)),
        lambda: train(config, quiet=True),
    ):
        with pytest.raises(ConfigError, match="'rectified-flow' needs the size 'encoded_shape'"):
            action()


@pytest.mark.parametrize("sampler", ["autoregressive", "parallel", "rectified-flow"])
@pytest.mark.parametrize("path", ["autoregressive", "rectified-flow"])
def test_samplers_fit_their_own_paths(path: str, sampler: str) -> None:
    name = {"autoregressive": "tiny", "rectified-flow": "tiny_flow"}[path]
    model = build_model(resolve(load(name, [f"image_sampler={sampler}"]), ModelConfig), on_meta=True)
    mismatch = image_sampler_mismatch(model, default_plugins())
    assert bool(mismatch) == ((path == "rectified-flow") != (sampler == "rectified-flow"))


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({"every": 2}, "expected every, and something to measure"),
        ({"prompts": ["a"]}, "expected every, and something to measure"),
        ({"every": -1}, "every -1"),
        ({"every": 1, "prompts": ["a", "b", "a"]}, "expected each prompt once"),
        ({"every": 1, "questions": ["Why?"]}, "questions: found 'Why\\?'"),
        ({"every": 1, "questions": [{"text": "a", "image": "b"}]}, "questions: found"),
    ],
)
def test_settings_without_effect_are_errors(make: Make, validation: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make(validation=validation)


@pytest.mark.parametrize("setting", ["guidance", "temperature"])
def test_a_setting_of_drawings_without_prompts_is_an_error(setting: str) -> None:
    with pytest.raises(ValueError, match="expected prompts beside them"):
        ValidationConfig(every=1, questions=[{"text": "What?"}], **{setting: 2.0})

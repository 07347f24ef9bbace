from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from janus_modular import ConfigError
from janus_modular.config import load, resolve
from janus_modular.training.non_finite_samples import FOLDER
from janus_modular.training.run_folder import LOCK, VALIDATION
from janus_modular.training.schema import TrainConfig
from janus_plugins.trackers.jsonl import JsonlConfig, JsonlTracker
from janus_plugins.trackers.run_files import RESERVED
from janus_plugins.trackers.tensorboard import TensorboardConfig, TensorboardTracker


def test_jsonl_has_one_line_for_each_step_after_resuming(tmp_path: Path) -> None:
    first = JsonlTracker(JsonlConfig(), tmp_path / "run")
    for step in (10, 20, 30):
        first.log(step, {"loss": 1 / step})
    first.close()
    path = tmp_path / "run" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # a crash
    second = JsonlTracker(JsonlConfig(), tmp_path / "run")
    second.log(20, {"loss": 7.0})
    second.log(30, {"loss": 8.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 10, "loss": 0.1}, {"step": 20, "loss": 7.0}, {"step": 30, "loss": 8.0}]


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    """By tensorboard's own reader; a resumed run hides the steps that it repeats."""
    for steps in ((1, 2, 3), (2, 3, 4)):
        tracker = TensorboardTracker(TensorboardConfig(folder="curves"), tmp_path)
        for step in steps:
            tracker.log(step, {"loss/text": step / 2})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "curves")).Reload().Scalars("loss/text")
    assert [(event.step, event.value) for event in events] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]


def test_tracker_without_values_closes(tmp_path: Path) -> None:
    TensorboardTracker(TensorboardConfig(), tmp_path).close()
    JsonlTracker(JsonlConfig(), tmp_path).close()
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(("name", "key"), [("jsonl", "file"), ("tensorboard", "folder")])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        *((name, "the run itself writes") for name in RESERVED),
        ("Checkpoints/x", "the run itself writes"),
        ("./model", "the run itself writes"),
        ("", "names nothing"),
        (".", "names nothing"),
        ("../../x.jsonl", "lies outside"),
        ("/tmp/x.jsonl", "lies outside"),
        ("x" * 300, "longer than 255 bytes"),
    ],
)
def test_a_name_in_the_way_of_the_run_is_an_error(name: str, key: str, value: str, problem: str) -> None:
    raw = load("train/janus_pro/stage1", ["model=tiny"]) | {"trackers": [{"name": name, key: value}]}
    with pytest.raises(ConfigError, match=rf"trackers.*{key}: found .*{problem}"):
        resolve(raw, TrainConfig)


def test_the_reserved_names_are_those_of_a_run() -> None:
    assert {LOCK, VALIDATION, FOLDER} <= set(RESERVED)


def test_jsonl_makes_the_folder_of_its_file(tmp_path: Path) -> None:
    tracker = JsonlTracker(JsonlConfig(file="logs/here.jsonl"), tmp_path)
    tracker.log(1, {"loss": 1.0})
    assert (tmp_path / "logs/here.jsonl").is_file()

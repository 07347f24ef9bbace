"""Checkpoints record the data of their run: a resumed run reports changes and bad samples."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from janus_modular import DataError, TrainingError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.checkpoints.native import read_record
from janus_modular.plugins import default_plugins
from janus_modular.training.data_record import DataRecord
from janus_modular.training.run_setup import open_sources
from janus_modular.training.train import train


def record(config) -> dict:
    newest_checkpoint = max((Path(config.output) / "checkpoints").iterdir())
    return read_record(newest_checkpoint)["training"]["data"]


def described(config) -> DataRecord:
    return DataRecord(open_sources(config, default_plugins()), config.bad_samples)


def append(path: Path, line: dict[str, object]) -> None:
    path.write_text(path.read_text().rstrip("\n") + "\n" + json.dumps(line) + "\n")


def repaint(data: Path) -> None:
    lines = (data / "draw.jsonl").read_text().replace('"red"', '"rot"')
    (data / "draw.jsonl").write_text(lines)


CHANGES = {
    "a line more": (
        lambda data: append(data / "text.jsonl", {"text": "more"}),
        "source 'text': samples was 4, is 5",
    ),
    "another word": (repaint, "source 'draw': fingerprint was"),
    "lines in another order": (
        lambda data: (data / "text.jsonl").write_text(
            "\n".join(reversed((data / "text.jsonl").read_text().splitlines()))
        ),
        "source 'text': fingerprint was",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_are_named(make, data: Path, name: str) -> None:
    change, expected = CHANGES[name]
    config = make()
    then = described(config)
    assert len(then.sources["text"]["fingerprint"]) == 64
    change(data)
    with pytest.raises(TrainingError, match="not those that the run was started with") as error:
        described(config).resume({"step": 3, "data": then.to_dict(3)}, accept=False)
    assert expected in str(error.value)
    assert "changed_data=accept" in str(error.value)


def test_changed_data_are_refused_or_accepted_and_reported(
    make, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(make(schedule__stop=1), quiet=True)
    append(data / "text.jsonl", {"text": "more"})
    with pytest.raises(TrainingError, match="'text': samples was 4, is 5"):
        train(make(schedule__stop=2), quiet=True, resume=True)
    with caplog.at_level(logging.WARNING):
        train(make(schedule__stop=2, changed_data="accept"), quiet=True, resume=True)
    assert "'text': samples was 4, is 5" in caplog.text
    after = record(make())
    assert [change["step"] for change in after["changes"]] == [1]
    assert after["changes"][0]["changes"][0] == "source 'text': samples was 4, is 5"
    train(make(schedule__stop=3), quiet=True, resume=True)  # what was accepted is what is compared with
    assert record(make())["changes"] == after["changes"]


@pytest.mark.parametrize(
    "damage", [[], {"sources": []}, {"bad_samples": {"samples": 3}}, {"sources": {"text": {"samples": 4}}}]
)
def test_a_damaged_record_is_a_training_error(make, damage) -> None:
    now = described(make())
    data = {**now.to_dict(0), **damage} if isinstance(damage, dict) else damage
    with pytest.raises(TrainingError, match="the checkpoint's record of its data is damaged"):
        now.resume({"step": 3, "data": data}, accept=True)


def test_a_source_without_a_share_may_change(make, data: Path) -> None:
    mixture = {"read": 1, "draw": 1, "text": 0}
    train(make(mixture=mixture, schedule__stop=1), quiet=True)
    append(data / "text.jsonl", {"text": "more"})
    train(make(mixture=mixture), quiet=True, resume=True)


def spoil(data: Path) -> None:
    """One bad line in each file: an image cut short, a text too long, half a surrogate, an empty answer."""
    Image.new("RGB", (4, 4)).save(data / "bad.png")
    (data / "bad.png").write_bytes((data / "bad.png").read_bytes()[:40])
    append(data / "read.jsonl", {"image": "bad.png", "class": "bad"})
    append(data / "draw.jsonl", {"image": "red.png", "class": "half \ud83d"})
    append(data / "text.jsonl", {"text": "long " * 200})
    append(data / "text.jsonl", {"messages": [{"role": "assistant", "content": " "}]})


def test_a_run_skips_bad_samples_and_resumes_exactly(make, metrics, data: Path, tmp_path: Path) -> None:
    spoil(data)
    with pytest.raises(DataError, match=r"source '\w+', sample \d: "):
        train(make(output=str(tmp_path / "refused")), quiet=True)
    policy = {"unreadable": "skip", "unsupervised": "skip", "too_long": "cut", "limit": 1}
    mixture = {"read": 2, "draw": 2.5, "text": 0.7}
    whole = make(bad_samples=policy, mixture=mixture, workers=2)
    train(whole, quiet=True)
    halves = make(bad_samples=policy, mixture=mixture, output=str(tmp_path / "halves"), schedule__stop=3)
    train(halves, quiet=True)
    train(make(bad_samples=policy, mixture=mixture, output=str(tmp_path / "halves")), quiet=True, resume=True)
    timings = {"steps_per_second", "samples_per_second", "tokens_per_second"}
    lines = [
        [{k: v for k, v in line.items() if k not in timings} for line in metrics(config)]
        for config in (whole, halves)
    ]
    assert lines[0] == lines[1]
    skipped = sum(v for line in lines[0] for k, v in line.items() if k.startswith(("skipped/", "cut/")))
    kept = record(whole)["bad_samples"]
    assert skipped == sum(kept["bad"].values()) > 0
    replaced = sum(v for line in lines[0] for k, v in line.items() if k.startswith("skipped/"))
    assert sum(kept["samples"].values()) == 6 * 5 + replaced
    assert kept == record(halves)["bad_samples"]
    ModelAssembly.from_checkpoint(Path(whole.output) / "model")


def test_a_policy_may_be_relaxed_at_a_resume(make, data: Path) -> None:
    train(make(schedule__stop=1), quiet=True)
    train(make(schedule__stop=2, bad_samples={"too_long": "skip", "limit": 0.5}), quiet=True, resume=True)


def test_checkpoints_without_a_record_of_data_are_resumed_with_a_warning(
    make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make(schedule__stop=1), quiet=True)
    without = lambda folder: {"training": {**read_record(folder)["training"], "data": None}}  # noqa: E731
    monkeypatch.setattr("janus_modular.training.train.read_record", without)
    with caplog.at_level(logging.WARNING):
        train(make(schedule__stop=2), quiet=True, resume=True)
    assert "no record of its data" in caplog.text

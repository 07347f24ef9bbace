"""``data check`` finds what would end a training, and counts what a training would not use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from janus_modular.cli.app import app
from janus_modular.errors import DataError, ImageError, UnsupervisedError
from janus_modular.training.bad_samples import BadSample, BadSampleCounter
from janus_modular.training.data_check import CheckedSample, SourceReport, check_sources
from janus_modular.training.schema import BadSamplesConfig

from .test_bad_samples import Records, builder


@pytest.mark.parametrize(
    ("bad_sample", "problem"),
    [
        (DataError("x"), "unreadable"),
        (ImageError("x"), "unreadable"),
        (KeyError("x"), "unreadable"),
        ("surrogate", "unreadable"),
        (UnsupervisedError("x"), "unsupervised"),
        ("silent", "unsupervised"),
        (1, "unsupervised"),
        (25, "too_long"),
        ("chat", "too_long"),
    ],
)
@pytest.mark.parametrize("action", ["error", "skip", "cut", "split"])
def test_a_sample_is_an_error_exactly_where_training_raises_one(
    bad_sample: Any, problem: str, action: str
) -> None:
    if action in ("cut", "split") and problem != "too_long":
        return
    make = builder(Records(at3=bad_sample), **{problem: action})
    try:
        batch = make.build(0)
    except DataError:
        batch = None
    [report] = check_sources(make).values()
    assert (report.samples, report.checked) == (10, 10)
    assert report.errors == (batch is None)
    assert report.problems == {"unreadable": 0, "unsupervised": 0, "too_long": 0, problem: 1}
    assert sum(report.actions.values()) == (batch is not None)
    assert report.actions.get(action, 0) == (batch is not None)
    assert [example["index"] for example in report.examples if example["problem"] == problem] == [3]
    if batch is not None and action != "skip":
        assert (report.positions, report.supervised) == (batch.tokens["a"], batch.supervised)


def test_lengths_duplicates_and_positions() -> None:
    """Nine samples of 4 positions are equal; threads count the same."""
    make = builder(Records(at2=25, at7=9), too_long="split")
    alone, helped = (check_sources(make, workers=workers)["a"] for workers in (0, 3))
    assert alone == helped
    assert (alone.longest, alone.longest_index) == (25, 2)
    assert alone.duplicates == 7
    assert alone.positions == 25 + 9 + 8 * 4
    texts = {example["reason"] for example in alone.examples if example["problem"] == "duplicate"}
    assert len(texts) == 1


def test_the_limit_takes_the_first_samples_of_training() -> None:
    make = builder(Records(), batch=3)
    read = []
    sample = make.mixture.sources["a"].sample
    make.mixture.sources["a"].sample = lambda index, rng: (read.append(index), sample(index, rng))[1]
    check_sources(make, limit=3)
    checked, read[:] = [*read], []
    make.build(0)
    assert checked == read
    assert len({*checked}) == 3


def test_too_many_skipped_samples_fail_as_in_training() -> None:
    report = SourceReport(100)
    policy = BadSamplesConfig(unreadable="skip", limit=0.1)
    counter = BadSampleCounter(policy)
    for index in range(100):
        bad = index % 5 == 0
        report.add(CheckedSample(index, "unreadable" if bad else None), policy)
        try:
            counter.add({"a": not bad}, [BadSample("a", index, "skip", "x")] if bad else [])
        except DataError:
            assert report.over_limit
            return
        assert not report.over_limit
    pytest.fail("the limit was not reached")


def test_a_source_without_a_usable_sample_ends_training_whatever_the_limit() -> None:
    records = Records(**{f"at{i}": DataError("x") for i in range(10)})
    [report] = check_sources(builder(records, unreadable="skip", limit=1.0)).values()
    assert (report.errors, report.over_limit, report.ends_training) == (0, False, True)
    records.bad_samples.pop(3)
    [report] = check_sources(builder(records, unreadable="skip", limit=1.0)).values()
    assert not report.ends_training


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    raw = {
        "model": "tiny",
        "learn": ["backbone"],
        "sources": {
            "read": {"name": "jsonl", "path": str(data / "read.jsonl")},
            "draw": {"name": "jsonl", "path": str(data / "draw.jsonl"), "task": "draw"},
            "unused": {"name": "jsonl", "path": "none.jsonl"},
        },
        "mixture": {"read": 1, "draw": 1, "unused": 0},
        "batch": 4,
        "length": 512,
        "condition_dropout": 1.0,
        "schedule": {"steps": 2},
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def check(config: Path, *words: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["data", "check", str(config), "--json", *words])
    return done.exit_code, json.loads(done.stdout)


def test_the_command_in_both_forms(config: Path, data: Path) -> None:
    code, found = check(config)
    assert (code, found["ok"], {*found["sources"]}) == (0, True, {"read", "draw"})
    draw = found["sources"]["draw"]
    assert (draw["checked"], draw["duplicates"], draw["supervised"]) == (4, 0, 4 * 16)
    assert check(config, "--limit", "2")[1]["sources"]["read"]["checked"] == 2

    lines = (data / "read.jsonl").read_text().splitlines()
    (data / "read.jsonl").write_text("\n".join([*lines, lines[0], "{}"]))
    code, found = check(config)
    read = found["sources"]["read"]
    assert (code, found["ok"], read["errors"], read["duplicates"]) == (1, False, 1, 1)
    reason = f"{data / 'read.jsonl'}, line 6: has nothing"
    [example] = [example for example in read["examples"] if example["problem"] == "unreadable"]
    assert example["index"] == 5
    assert example["reason"].startswith(reason)
    assert check(config, "bad_samples.unreadable=skip")[0] == 0

    done = CliRunner().invoke(app, ["data", "check", str(config)])
    assert done.exit_code == 1
    assert f"read, sample 5: unreadable: {reason}" in done.stdout
    assert "read: samples that would end the training: 1. Correct them" in done.stdout

from __future__ import annotations

import math
from typing import Any

import pytest

from janus_modular import ConfigError
from janus_modular.config import load, resolve, shipped
from janus_modular.training.mixture import apportion, samples_before
from janus_modular.training.schema import TrainConfig

# Janus, table 1; Janus-Pro, table 2: lr, schedule, weight decay, warm-up, steps, stopped at, batch, mixture.
PAPERS: dict[str, tuple[Any, ...]] = {
    "janus/stage1": (1e-3, "cosine", 0.0, 300, 10_000, None, 256, (1, 0, 1)),
    "janus/stage2": (1e-4, "constant", 0.0, 5_000, 180_000, None, 512, (2, 3, 5)),
    "janus/stage3": (2e-5, "constant", 0.1, 0, 24_000, None, 256, (7, 3, 10)),
    "janus_pro/stage1": (1e-3, "constant", 0.0, 600, 20_000, None, 256, (1, 0, 3)),
    "janus_pro/stage2": (1e-4, "constant", 0.0, 5_000, 360_000, 270_000, 512, (2, 3, 5)),
    "janus_pro/stage3": (4e-5, "constant", 0.0, 0, 80_000, None, 128, (5, 1, 4)),
}


@pytest.mark.parametrize("name", PAPERS)
def test_shipped_stages_match_the_papers(name: str) -> None:
    config = resolve(load(f"train/{name}"), TrainConfig)
    lr, schedule, decay, warmup, steps, stop, batch, ratio = PAPERS[name]
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.clip) == (
        lr,
        (0.9, 0.95),
        decay,
        1.0,
    )
    assert (config.schedule.name, config.schedule.warmup, config.schedule.steps, config.schedule.stop) == (
        schedule,
        warmup,
        steps,
        stop,
    )
    assert (config.batch, config.length, config.condition_dropout) == (batch, 4096, 0.1)
    assert config.supervise == ("answers" if name.endswith("3") else "all")
    for phase in config.mixture_phases():
        drawn = sum(
            share for source, share in phase.shares.items() if source not in ("understanding", "text")
        )
        assert (phase.shares["understanding"], phase.shares["text"], drawn) == ratio
        assert sum(apportion(phase.shares, batch).values()) == batch


def test_a_short_name_of_a_dtype_is_the_long_one() -> None:
    assert resolve(load("train/janus/stage2", ["dtype=bf16"]), TrainConfig).dtype == "bfloat16"


def test_janus_draws_classes_first() -> None:
    first, second = resolve(load("train/janus/stage2"), TrainConfig).mixture_phases()
    assert (first.until, second.until) == (120_000, None)
    assert (first.shares["classes"], first.shares["pairs"]) == (5, 0)
    assert (second.shares["classes"], second.shares["pairs"]) == (0, 5)


def test_every_shipped_training_is_tested_here() -> None:
    stages = {name for name in shipped() if name.startswith("train/") and "chain" not in load(name)}
    recipes = {name for name in stages if name.startswith("train/finetune/")}
    assert {name.removeprefix("train/") for name in stages - recipes} == set(PAPERS)
    assert {name.rpartition("/")[2] for name in recipes} == {"understanding", "drawing", "both", "stage3"}


def raw(**changes: Any) -> dict[str, Any]:
    base = {
        "model": "tiny",
        "learn": ["backbone"],
        "sources": {
            "text": {"name": "jsonl", "path": "a.jsonl"},
            "draw": {"name": "jsonl", "path": "b.jsonl"},
        },
        "mixture": {"text": 1, "draw": 1},
    }
    return base | changes


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        resolve(
            load(
                raw(
                    batchsize=3,
                    supervise="some",
                    optimizer={"lr": -1},
                    sources={
                        "text": {"name": "jsonl", "path": "a", "task": "paint"},
                        "draw": {"name": "jsonI"},
                    },
                )
            ),
            TrainConfig,
        )
    message = str(error.value)
    for part in (
        "batchsize: unknown key",
        "supervise: found 'some'",
        "optimizer: lr -1",
        "text.task",
        "draw.name",
    ):
        assert part in message
    assert len(error.value.errors) == 5


def test_fields_that_contradict_each_other_are_all_reported() -> None:
    with pytest.raises(ConfigError) as error:
        resolve(
            load(
                raw(init="somewhere", batch=0, learn=[], condition_dropout=2, mixture={"text": -1, "dra": 1})
            ),
            TrainConfig,
        )
    message = str(error.value)
    for part in (
        "found both of model and init",
        "batch: 0; expected at least 1",
        "learn: nothing",
        "condition_dropout: 2.0",
        "mixture.text: found -1",
        "mixture.dra: no such source; sources: text, draw. Did you mean 'draw'?",
        "source 'draw' has no share",
    ):
        assert part in message


def test_nested_errors_do_not_hide_top_level_errors() -> None:
    changes = dict.fromkeys(("batch", "length", "accumulate", "log_every", "keep"), 0)
    changes |= {
        "condition_dropout": 2,
        "schedule": {"steps": -1},
        "seed": -1,
        "device": "foo",
        "workers": "many",
    }
    with pytest.raises(ConfigError) as error:
        resolve(load(raw(**changes)), TrainConfig)
    assert sorted(fault.path for fault in error.value.errors) == sorted(changes | {"schedule": 0})
    assert "\n  length: 0; expected positions" in str(error.value)


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:1"])
def test_devices_of_other_machines_are_valid(device: str) -> None:
    assert resolve(load(raw(device=device)), TrainConfig).device == device


@pytest.mark.parametrize(
    ("mixture", "fault"),
    [
        (None, "expected {source: share}"),
        ([], "expected {source: share}"),
        ({"text": 0, "draw": 0}, "all shares are 0"),
        ({"text": "1", "draw": 0}, "found '1'"),
        ({"text": math.nan, "draw": 1}, "mixture.text: found nan; expected a share"),
        ({"text": math.inf, "draw": 1}, "mixture.text: found inf; expected a share"),
        (
            {"text": 1e-9, "draw": 1},
            "mixture.text: a share of 1e-09 in 1 gives no sample in 1,000 steps of 256",
        ),
        (
            [{"until": 2, "text": 1, "draw": 1}, {"text": 1, "draw": 1e-6}],
            "mixture.draw: a share of 1e-06 in 1 gives no sample in 998 steps",
        ),
        (
            [{"until": 1200, "text": 1, "draw": 0}, {"text": 1, "draw": 1}],
            "mixture: phase 2 begins at step 1,200, and the run ends at 1,000 (schedule.steps)",
        ),
        ([{"until": 5, "text": 1, "draw": 1}], "its last phase ends at step 5"),
        ([{"text": 1, "draw": 1}, {"text": 1, "draw": 0}], "phase 1 has until None"),
        ([{"until": 5, "text": 1, "draw": 0}, {"until": 5, "text": 1}, {"draw": 1}], "phase 2 has until 5"),
    ],
)
def test_invalid_mixtures_are_errors(mixture: Any, fault: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(load(raw(mixture=mixture)), TrainConfig)
    assert fault in str(error.value)


def test_what_a_stop_leaves_out_is_remarked_and_no_error() -> None:
    """The run may be continued to the end of its schedule."""
    schedule = {"steps": 10_000, "stop": 10}
    config = resolve(load(raw(mixture={"text": 999, "draw": 1}, batch=10, schedule=schedule)), TrainConfig)
    (remark,) = config.unused_before_stop()
    assert remark == "mixture: no sample of source 'draw' is taken before schedule.stop, step 10."
    phases = [{"until": 10, "text": 1, "draw": 1}, {"text": 1, "draw": 1}]
    config = resolve(load(raw(mixture=phases, schedule=schedule)), TrainConfig)
    assert config.unused_before_stop() == [
        "mixture: phase 2 begins at step 10, after schedule.stop, step 10."
    ]
    config = resolve(load(raw(mixture=phases, schedule=schedule | {"stop": 11})), TrainConfig)
    assert not config.unused_before_stop()
    assert not resolve(load("train/janus_pro/stage2"), TrainConfig).unused_before_stop()


def test_a_warm_up_that_the_run_does_not_finish_is_remarked() -> None:
    config = resolve(load(raw(schedule={"steps": 40, "warmup": 50, "stop": 10})), TrainConfig)
    assert config.unused_before_stop() == [
        "schedule.warmup: 50 steps, and the run ends at step 10: the learning rate stays below optimizer.lr,"
        " at 20% of it at most."
    ]
    config = resolve(load(raw(schedule={"steps": 40, "warmup": 40})), TrainConfig)
    assert not config.unused_before_stop()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"worker_type": "process", "workers": 0}, "worker_type: process, which has no effect with workers"),
        ({"trackers": ["jsonl", "tensorboard", "jsonl"]}, r"trackers\[2\]: equal to another before it"),
    ],
)
def test_settings_without_effect_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(load(raw(**settings)), TrainConfig)
    two_files = ["jsonl", {"name": "jsonl", "file": "copy.jsonl"}]
    assert len(resolve(load(raw(trackers=two_files)), TrainConfig).trackers) == 2


def test_sources_without_a_share_are_not_used() -> None:
    assert resolve(load(raw(mixture={"text": 1, "draw": 0})), TrainConfig).used_sources() == ["text"]
    assert resolve(load("train/janus_pro/stage1"), TrainConfig).used_sources() == [
        "understanding",
        "generation",
    ]


@pytest.mark.parametrize(
    "wrong", [{"lr": "nan"}, {"lr": "inf"}, {"weight_decay": "nan"}, {"clip": "nan"}, {"clip": 0}]
)
def test_values_without_convergence_are_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"not a finite number|expected lr above 0, weight_decay of"):
        resolve(load(raw(optimizer=wrong)), TrainConfig)


@pytest.mark.parametrize("limit", [-0.1, 1.5, "nan"])
def test_a_limit_is_a_share(limit: Any) -> None:
    with pytest.raises(ConfigError, match=r"bad_samples.limit: .*(not a finite|expected a share)"):
        resolve(load(raw(bad_samples={"limit": limit})), TrainConfig)


def test_the_first_sample_of_a_share_may_come_late() -> None:
    config = resolve(load(raw(mixture={"text": 99, "draw": 1}, batch=10)), TrainConfig)
    [phase] = config.mixture_phases()
    assert [samples_before([phase], 10, step)["draw"] for step in (4, 5, 6, 15, 1000)] == [0, 0, 1, 1, 100]

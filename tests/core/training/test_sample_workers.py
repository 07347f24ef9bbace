"""Worker processes in the commands: a run, a check and an encoding are those of threads."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from janus_modular.errors import ConfigError, DataError
from janus_modular.plugins import default_plugins
from janus_modular.training import sample_workers
from janus_modular.training.data_check import check_data
from janus_modular.training.sample_workers import SampleWorkers
from janus_modular.training.train import train

from .conftest import Make

# Chat templates are rendered in a child process, which each worker starts for itself.
SETTINGS: dict[str, Any] = {"workers": 2, "model.processor.template": "janus"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def test_a_run_with_processes_equals_a_run_with_threads(make: Make, tmp_path: Path) -> None:
    trained = [
        weights(train(make(**SETTINGS, worker_type=kind, output=str(tmp_path / kind)), quiet=True))
        for kind in ("thread", "process")
    ]
    assert {*trained[0]} == {*trained[1]}
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_a_check_with_processes_equals_a_check_with_threads(make: Make, data: Path) -> None:
    (data / "blue.png").write_bytes(b"no image")
    reports = [
        check_data(make(**SETTINGS, worker_type=kind, bad_samples__unreadable="skip"), default_plugins())
        for kind in ("thread", "process")
    ]
    assert reports[0] == reports[1]
    assert reports[0]["draw"].problems["unreadable"] == 1
    with pytest.raises(DataError, match=r"source 'read', sample 2: .*blue.png"):
        train(make(**SETTINGS, worker_type="process"), quiet=True)


def test_where_processes_cannot_be_forked_the_setting_is_an_error(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_workers, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ConfigError, match=r"worker_type: found process, .* expected thread"):
        check_data(make(**SETTINGS, worker_type="process"), default_plugins())


@pytest.mark.usefixtures("garbage_with_threads")
def test_a_worker_does_not_wait_for_threads_of_the_parents_garbage() -> None:
    with SampleWorkers(gc.collect, 1, "process") as pool:
        assert pool.submit(2).result(timeout=60) >= 0

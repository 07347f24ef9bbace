"""A model of 0.1 M parameters and four coloured images, which it learns in seconds."""

from __future__ import annotations

import gc
import json
import os
import pickle
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from janus_modular.config import load, resolve
from janus_modular.model.model import JanusModel
from janus_modular.processing.processor import Processor
from janus_modular.training.schema import TrainConfig
from janus_modular.training.train import train

from .objective_configs import MakeStage, add_noise, stage_config

NAMES = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (20, 40, 230), "white": (250, 250, 250)}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """On one thread: at these sizes a second one costs more than it brings, most of all on a busy machine."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with read.jsonl, draw.jsonl, text.jsonl and their images."""
    return write_data(tmp_path / "data")


def write_data(folder: Path) -> Path:
    folder.mkdir()
    pairs = []
    for name, colour in NAMES.items():
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
        pairs.append({"image": f"{name}.png", "class": name})
    text = [{"text": f"{name} is a colour, and {len(name)} letters long."} for name in NAMES]
    for file, lines in {"read": pairs, "draw": pairs, "text": text}.items():
        (folder / f"{file}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


Make = Callable[..., TrainConfig]


@pytest.fixture
def make(data: Path, tmp_path: Path) -> Make:
    """Build a config of a small run; keyword arguments replace keys, ``a__b=c`` inner ones."""
    return partial(small_config, data, tmp_path / "run")


def small_config(data: Path, output: Path, /, **changes: Any) -> TrainConfig:
    raw: dict[str, Any] = {
        "model": "tiny",
        "learn": ["understanding", "generation", "backbone"],
        "sources": {
            "read": {"name": "jsonl", "path": str(data / "read.jsonl"), "questions": ["Colour?"]},
            "draw": {"name": "jsonl", "path": str(data / "draw.jsonl"), "task": "draw"},
            "text": {"name": "jsonl", "path": str(data / "text.jsonl")},
        },
        "mixture": {"read": 2, "draw": 2, "text": 1},
        "batch": 5,
        "length": 256,
        "supervise": "answers",
        "optimizer": {"lr": 3e-3},
        "schedule": {"steps": 6, "warmup": 2},
        "log_every": 1,
        "checkpoint_every": 100,
        "workers": 0,
        "device": "cpu",
        "output": str(output),
        "trackers": [{"name": "jsonl"}],
    }
    # The default system text is 200 bytes, which are 200 positions here.
    system = {} if changes.get("model") == "null" else {"model.processor.system": "''"}
    overrides = system | {k.replace("__", "."): v for k, v in changes.items()}
    words = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in overrides.items()]
    return resolve(load(raw, words), TrainConfig)


@pytest.fixture
def make_stage(data: Path, tmp_path: Path) -> MakeStage:
    """Build the config of a small run of an objective: ``make_stage(objective, "batch=8")``."""
    add_noise(data)
    return partial(stage_config, data, tmp_path / "run")


RUN_PROMPTS = ["red", "<b>blue</b>"]
QUESTIONS = [{"text": "Why?"}, {"text": "Why?"}]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs: `first`, and `second` with another learning rate and fewer logged steps."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_data(folder / "data")
    validation = {
        "every": 2,
        "sources": {"drawn": {"name": "jsonl", "path": str(data / "draw.jsonl"), "task": "draw"}},
        "samples": 2,
        "prompts": RUN_PROMPTS,
        "questions": QUESTIONS,
        "max_tokens": 4,
    }
    first = small_config(data, folder / "runs/first", validation=validation, checkpoint_every=3)
    second = small_config(data, folder / "runs/deep/second", optimizer={"lr": 1e-3}, log_every=2)
    for config in (first, second):
        train(config, quiet=True)
    return folder / "runs"


def logged(run: Path) -> dict[int, dict[str, float]]:
    """Return the content of metrics.jsonl by step."""
    values: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        values.setdefault(line.pop("step"), {}).update(line)
    return values


@pytest.fixture
def built(make: Make) -> tuple[JanusModel, Processor]:
    from janus_modular.checkpoints import ModelAssembly

    config = make()
    assert config.model is not None
    assembly = ModelAssembly.from_config(config.model)
    return assembly.model, assembly.processor


@pytest.fixture
def metrics() -> Callable[[TrainConfig], list[dict[str, float]]]:
    """Read what the jsonl tracker of a run wrote."""

    def read(config: TrainConfig) -> list[dict[str, float]]:
        lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return read


@pytest.fixture
def garbage_with_threads() -> Iterator[None]:
    """Leave a process group with threads, which only the garbage collector would destroy."""
    from torch import distributed as dist

    cycle: list[Any] = []
    gc.disable()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    cycle += [cycle, dist.group.WORLD]
    dist.destroy_process_group()
    del cycle
    yield
    gc.enable()


@dataclass
class Rank:
    """How a process of a run ended."""

    status: int  # 0, 1 for an exception, or minus a signal
    result: Any = None
    error: str = ""  # class and text, with notes


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[..., list[Rank]]]:
    """``ranks(2, action)`` runs ``action(rank)`` in two processes that torchrun's variables connect."""
    with connected_ranks(tmp_path) as run:
        yield run


@contextmanager
def connected_ranks(folder: Path) -> Iterator[Callable[..., list[Rank]]]:
    """Yield what the fixture `ranks` is; results pass through files in ``folder``."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    started: list[int] = []

    def child(rank: int, world: int, port: int, action: Callable[[int], object], file: Path) -> None:
        gc.freeze()  # what earlier tests left would wait for its threads, which a fork does not copy
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        status, outcome = 1, Rank(1)
        try:
            outcome = Rank(0, action(rank))
            status = 0
        except BaseException as error:
            notes = "\n".join(getattr(error, "__notes__", ()))
            outcome = Rank(1, error=f"{type(error).__name__}: {error}\n{notes}")
            traceback.print_exc()
        finally:
            file.write_bytes(pickle.dumps(outcome))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def run(world: int, action: Callable[[int], object], seconds: int = 120) -> list[Rank]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        files = [folder / f"rank{rank}" for rank in range(world)]
        children = []
        for rank, file in enumerate(files):
            file.unlink(missing_ok=True)
            pid = os.fork()
            if not pid:
                child(rank, world, port, action, file)
            children.append(pid)
        started[:] = children
        limit, outcomes = time.monotonic() + seconds, []
        for pid, file in zip(children, files, strict=True):
            while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
                assert time.monotonic() < limit, f"rank {len(outcomes)} has not ended: a rank hangs"
                select.select([], [], [], 0.01)
            started.remove(pid)
            status = os.waitstatus_to_exitcode(ended[1])
            outcomes.append(pickle.loads(file.read_bytes()) if file.exists() else Rank(status))
        return outcomes

    yield run
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

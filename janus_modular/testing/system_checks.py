"""What promises are made around the model: by samplers, sources, trackers, formats and runtimes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np
import torch

from janus_modular import samplers
from janus_modular.protocols import CheckpointFormat, Runtime, Source, Tracker
from janus_modular.sequence import ImageTarget, Sample, Sequence, Text
from janus_modular.testing.check import check_for, ensure
from janus_modular.testing.examples import CheckpointFormatExample, SamplingExample

STEPS = 100_000
"""A sampler that has not ended by then never will."""

IMPORTS_TORCH = """
import importlib, importlib.util, sys
name, file = sys.argv[1:]
if importlib.util.find_spec(name):
    importlib.import_module(name)
else:
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
sys.exit("torch" in sys.modules)
"""


@check_for("text_samplers", "image_samplers")
def check_sampler_ends(sampler: Any, example: SamplingExample) -> None:
    """It yields after its steps, and ends."""
    yielded, _ = run_sampler(sampler, example, example.prompts)
    ensure(bool(yielded), "it yielded nothing: whoever waits for it cannot show progress or stop it")


@check_for("text_samplers")
def check_yields_token_ids(sampler: Any, example: SamplingExample) -> None:
    """After each step it yields the next token id of every row."""
    for yielded in run_sampler(sampler, example, example.prompts)[0]:
        samplers.check_token_ids(sampler.__name__, yielded, len(example.prompts))


@check_for("image_samplers")
def check_returns_images(sampler: Any, example: SamplingExample) -> None:
    """After each step it yields its progress, and in the end it returns one image a row."""
    steps = sampler(example.open(), example.prompts, example.settings)
    samplers.draw_images(sampler.__name__, steps, len(example.prompts), lambda done, total: None)


@check_for("text_samplers", "image_samplers")
def check_sampler_repeats(sampler: Any, example: SamplingExample) -> None:
    """All its chance comes from its settings: with the same ones it does the same."""
    first, again = (run_sampler(sampler, example, example.prompts) for _ in range(2))
    ensure(same(first, again), "two runs with the same settings differ")


@check_for("text_samplers", "image_samplers")
def check_sampler_rows(sampler: Any, example: SamplingExample) -> None:
    """What a row gets does not depend on its company."""
    rows = len(example.prompts)
    ensure(rows > 1, f"the example has {rows} prompts: give at least 2")
    company, alone = (run_sampler(sampler, example, some) for some in (example.prompts, example.prompts[:1]))
    ensure(same(first_row(company, rows), first_row(alone, 1)), "the first row alone gets something else")


@check_for("text_samplers", "image_samplers")
def check_sampler_imports(sampler: Any, example: SamplingExample) -> None:
    """It imports no torch: a server that runs a bundle has none."""
    module = sys.modules[sampler.__module__]
    imports_torch(module.__name__, str(module.__file__))


@check_for("sources")
def check_source_samples(source: Source, indices: Many[int]) -> None:
    """It is as long as it says, and each sample teaches something."""
    ensure(len(source) > 0, "it has no samples")
    for index in [*indices, len(source) - 1]:
        sample = source.sample(index, np.random.default_rng(0))
        ensure(isinstance(sample, Sample), f"sample {index} is {type(sample).__name__}, not a Sample")
        segments = [one for message in sample.messages for one in message.content]
        taught = [one for one in segments if isinstance(one, Text | ImageTarget) and one.supervised]
        ensure(bool(taught), f"nothing in sample {index} is supervised")


@check_for("sources")
def check_source_repeats(source: Source, indices: Many[int]) -> None:
    """A sample can be had again, in any order: all chance comes from its generator."""
    first = [source.sample(index, np.random.default_rng((7, index))) for index in indices]
    for index, before in reversed(list(zip(indices, first, strict=True))):
        again = source.sample(index, np.random.default_rng((7, index)))
        ensure(again == before, f"sample {index} is another one when it is asked for again")


@check_for("sources")
def check_source_own_chance(source: Source, indices: Many[int]) -> None:
    """It leaves everybody else's chance alone: Python's, numpy's and torch's."""

    def states() -> list[Any]:
        return [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]

    before = states()
    for index in indices:
        source.sample(index, np.random.default_rng(0))
    ensure(states() == before, "it draws from a global generator: use the one that is passed")


@check_for("trackers")
def check_tracker_logs(opened: Callable[[Path], Tracker], values: Mapping[str, float]) -> None:
    """It keeps values step by step, goes on in the folder of a run that was cut short, and closes."""
    given = dict(values)
    with tempfile.TemporaryDirectory() as folder:
        for steps in ((1, 2, 3), (2, 3, 4)):  # the second repeats what was logged after its checkpoint
            tracker = opened(Path(folder, "run"))
            for step in steps:
                tracker.log(step, values)
            tracker.close()
    ensure(dict(values) == given, "it changes the values that it is given")


@check_for("trackers")
def check_tracker_idle(opened: Callable[[Path], Tracker], values: Mapping[str, float]) -> None:
    """A run that ends before its first step can be closed."""
    with tempfile.TemporaryDirectory() as folder:
        opened(Path(folder, "run")).close()


@check_for("formats")
def check_format_detects(checkpoint_format: CheckpointFormat, example: CheckpointFormatExample) -> None:
    """It knows its own config.json, and nobody else's."""
    ensure(checkpoint_format.detect(example.config), "it does not detect the example's config")
    said = example.config.get("model_type")
    ensure(
        checkpoint_format.model_type == said,
        f"it says model_type '{checkpoint_format.model_type}'; the example has '{said}'",
    )
    for strange in ({}, {"model_type": "of-somebody-else"}):
        ensure(not checkpoint_format.detect(strange), f"it detects {strange} as its own")


@check_for("formats")
def check_format_round_trip(checkpoint_format: CheckpointFormat, example: CheckpointFormatExample) -> None:
    """Weights that went to their format and back are what they were, under the names they had."""
    native = dict(checkpoint_format.to_native(example.weights))
    ensure(bool(native), f"of {len(example.weights)} weights none has a native name")
    again = dict(checkpoint_format.to_native(dict(checkpoint_format.from_native(native))))
    ensure(set(again) == set(native), f"other names came back: {sorted(set(again) ^ set(native))[:4]}")
    changed = [name for name, tensor in native.items() if not torch.equal(again[name], tensor)]
    ensure(not changed, f"these came back changed: {changed[:4]}")


@check_for("runtimes")
def check_runtime_says(runtime: Runtime, prompts: Many[Sequence]) -> None:
    """It names its samplers and its context, and its sessions say their sizes."""
    ensure(runtime.context > 0, f"its context is {runtime.context}")
    for name in (runtime.text_sampler, runtime.image_sampler):
        ensure(isinstance(name, str) and bool(name), f"a sampler is called {name!r}")
    session = runtime.open(64)
    for name in ("vocab_size", "pad_id", "image_positions"):
        number = getattr(session, name, None)
        ensure(isinstance(number, int), f"its sessions have the {name} {number!r}; expected a whole number")
    sizes = getattr(session, "sizes", None)
    ensure(isinstance(sizes, Mapping), f"its sessions have the sizes {sizes!r}; expected a mapping")


@check_for("runtimes")
def check_runtime_rows(runtime: Runtime, prompts: Many[Sequence]) -> None:
    """A row is read alike alone and in company."""
    states = []
    for some in (prompts, prompts[:1]):
        session = runtime.open(max(map(len, prompts)) + 1)
        states.append(session.to_host(session.prefill(some)))
    apart = float(np.abs(states[0][:1] - states[1]).max())
    size = float(np.abs(states[1]).max())
    # float32 sums in another order; half precision keeps 3 digits
    ensure(apart <= 1e-2 * size, f"the first row alone is {apart:.2e} away, at values up to {size:.2e}")


def run_sampler(sampler: Any, example: SamplingExample, prompts: Many[Sequence]) -> tuple[list[Any], Any]:
    """Run a sampler to its end; return what it yielded and what it returned.

    A session that lacks what the sampler uses raises `NotApplicable`; any other error is the sampler's own.

    Raises:
        CheckError: the sampler does not end.
    """
    running = sampler(example.open(), prompts, example.settings)
    yielded: list[Any] = []
    try:
        while len(yielded) < STEPS:
            yielded.append(next(running))
    except StopIteration as end:
        return yielded, end.value
    ensure(False, f"it has not ended after {STEPS} steps")
    raise AssertionError


def first_row(run: tuple[list[Any], Any], rows: int) -> list[Any]:
    """Return what of a run belongs to its first row."""

    def of(x: Any) -> Any:
        return x[:1] if isinstance(x, np.ndarray) and len(x) == rows else x

    return [*map(of, run[0]), of(run[1])]


def same(one: Any, other: Any) -> bool:
    """Say whether nested results are the same, arrays to the bit."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(np.array_equal(one, other))


def imports_torch(module: str, file: str) -> None:
    """Import a module in a process of its own, and see whether torch came along.

    Raises:
        CheckError: it did, or the module does not import.
    """
    line = [sys.executable, "-c", IMPORTS_TORCH, module, file]
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        line, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    ensure(not done.stderr, f"{module} does not import by itself: {done.stderr.strip()[-200:]}")
    ensure(done.returncode == 0, f"importing {module} imports torch")

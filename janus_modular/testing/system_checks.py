"""The checks of components outside the model: samplers, sources, trackers, formats and runtimes."""

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
from janus_modular.protocols import CheckpointFormat, EncodedImages, Runtime, Source, Tracker
from janus_modular.sequence import ImageTarget, Sample, Sequence, Text
from janus_modular.testing.check import check_for, ensure
from janus_modular.testing.examples import CheckpointFormatExample, SamplingExample

STEPS = 100_000
"""Most steps of a sampler on an example; a sampler that takes more is taken to run forever."""

PROBE = """
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
    """The sampler yields after each of its steps, and ends."""
    yielded, _ = run_sampler(sampler, example, example.prompts)
    ensure(
        bool(yielded), "it yielded nothing; expected a yield after each step, for progress and cancellation"
    )


@check_for("text_samplers")
def check_yields_token_ids(sampler: Any, example: SamplingExample) -> None:
    """After each step, the sampler yields the next token id of every row."""
    for yielded in run_sampler(sampler, example, example.prompts)[0]:
        samplers.check_token_ids(sampler.__name__, yielded, len(example.prompts))


@check_for("image_samplers")
def check_returns_images(sampler: Any, example: SamplingExample) -> None:
    """After each step, the sampler yields its progress; at the end, it returns an image for each row."""
    steps = sampler(example.open(), example.prompts, example.settings)
    samplers.draw_images(sampler.__name__, steps, len(example.prompts), lambda done, total: None)


@check_for("text_samplers", "image_samplers")
def check_sampler_repeats(sampler: Any, example: SamplingExample) -> None:
    """The randomness of a sampler comes from its settings alone: the same settings give the same result."""
    first, second = (run_sampler(sampler, example, example.prompts) for _ in range(2))
    ensure(same(first, second), "two runs with the same settings differ")


@check_for("text_samplers", "image_samplers")
def check_sampler_rows(sampler: Any, example: SamplingExample) -> None:
    """The result of a row does not depend on the other rows."""
    rows = len(example.prompts)
    ensure(rows > 1, f"the example has {rows} prompts; expected at least 2")
    batch, alone = (run_sampler(sampler, example, x) for x in (example.prompts, example.prompts[:1]))
    ensure(
        same(outputs_of_first_row(batch, rows), outputs_of_first_row(alone, 1)),
        "the first row has another result alone than in a batch",
    )


@check_for("text_samplers", "image_samplers")
def check_sampler_imports(sampler: Any, example: SamplingExample) -> None:
    """The sampler's module does not import torch, which is not installed on a server that runs a bundle."""
    module = sys.modules[sampler.__module__]
    check_imports_no_torch(module.__name__, str(module.__file__))


@check_for("sources")
def check_source_samples(source: Source, indices: Many[int]) -> None:
    """The source has as many samples as it declares, each with supervised content."""
    ensure(len(source) > 0, "it has no samples")
    for index in [*indices, len(source) - 1]:
        sample = source.sample(index, np.random.default_rng(0))
        ensure(isinstance(sample, Sample), f"sample {index} is a {type(sample).__name__}; expected a Sample")
        segments = [segment for message in sample.messages for segment in message.content]
        ensure(
            any(isinstance(x, Text | ImageTarget) and x.supervised for x in segments),
            f"nothing in sample {index} is supervised",
        )


@check_for("sources")
def check_source_repeats(source: Source, indices: Many[int]) -> None:
    """A sample is the same each time, in any order: its randomness comes from the generator passed to it."""
    first = [source.sample(index, np.random.default_rng((7, index))) for index in indices]
    for index, expected in reversed(list(zip(indices, first, strict=True))):
        sample = source.sample(index, np.random.default_rng((7, index)))
        ensure(sample == expected, f"sample {index} differs between two calls with equal generators")


@check_for("sources")
def check_source_randomness(source: Source, indices: Many[int]) -> None:
    """The source does not use the global random generators of Python, numpy and torch."""

    def states() -> list[Any]:
        return [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]

    before = states()
    for index in indices:
        source.sample(index, np.random.default_rng(0))
    ensure(
        states() == before, "it uses a global random generator; expected the generator that is passed to it"
    )


@check_for("trackers")
def check_tracker_logs(opened: Callable[[Path], Tracker], values: Mapping[str, float]) -> None:
    """The tracker logs values step by step, also into the folder of an interrupted run, and closes."""
    original = dict(values)
    with tempfile.TemporaryDirectory() as folder:
        for steps in ((1, 2, 3), (2, 3, 4)):  # a resumed run logs the steps after its checkpoint again
            tracker = opened(Path(folder, "run"))
            for step in steps:
                tracker.log(step, values)
            tracker.close()
    ensure(dict(values) == original, "it changes the values that are passed to it")


@check_for("trackers")
def check_tracker_idle(opened: Callable[[Path], Tracker], values: Mapping[str, float]) -> None:
    """A tracker can be closed before its first step."""
    with tempfile.TemporaryDirectory() as folder:
        opened(Path(folder, "run")).close()


@check_for("formats")
def check_format_detects(checkpoint_format: CheckpointFormat, example: CheckpointFormatExample) -> None:
    """The format detects its own config.json, and no other."""
    ensure(checkpoint_format.detect(example.config), "it does not detect the example's config")
    model_type = example.config.get("model_type")
    ensure(
        checkpoint_format.model_type == model_type,
        f"its model_type is '{checkpoint_format.model_type}'; the example has '{model_type}'",
    )
    for config in ({}, {"model_type": "of-another-format"}):
        ensure(not checkpoint_format.detect(config), f"it detects {config} as its own")


@check_for("formats")
def check_format_round_trip(checkpoint_format: CheckpointFormat, example: CheckpointFormatExample) -> None:
    """Weights have the same names and values after a round trip through the format."""
    native = dict(checkpoint_format.to_native(example.weights))
    ensure(bool(native), f"none of {len(example.weights)} weights has a native name")
    restored = dict(checkpoint_format.to_native(dict(checkpoint_format.from_native(native))))
    names = sorted(set(restored) ^ set(native))
    ensure(not names, f"names differ after a round trip: {names[:4]}")
    changed = [name for name, tensor in native.items() if not torch.equal(restored[name], tensor)]
    ensure(not changed, f"values differ after a round trip: {changed[:4]}")


@check_for("runtimes")
def check_runtime_attributes(runtime: Runtime, prompts: Many[Sequence]) -> None:
    """The runtime declares its samplers and its context, and its sessions declare their sizes."""
    ensure(runtime.context > 0, f"its context is {runtime.context}")
    for name in (runtime.text_sampler, runtime.image_sampler):
        ensure(isinstance(name, str) and bool(name), f"the name of a sampler is {name!r}")
    session = runtime.open(min(64, runtime.context))
    for name in ("hidden_size", "vocab_size", "pad_id", "image_positions"):
        number = getattr(session, name, None)
        ensure(isinstance(number, int), f"the {name} of its sessions is {number!r}; expected a whole number")
    sizes = getattr(session, "sizes", None)
    ensure(isinstance(sizes, Mapping), f"the sizes of its sessions are {sizes!r}; expected a mapping")


@check_for("runtimes")
def check_runtime_rows(runtime: Runtime, prompts: Many[Sequence]) -> None:
    """The hidden state of a row does not depend on the other rows."""
    states = []
    for batch in (prompts, prompts[:1]):
        session = runtime.open(max(map(len, prompts)) + 1)
        states.append(session.to_host(session.prefill(batch)))
    difference = float(np.abs(states[0][:1] - states[1]).max())
    scale = float(np.abs(states[1]).max())
    # float32 sums in another order; half precision keeps 3 digits
    ensure(
        difference <= 1e-2 * scale,
        f"the first row differs by {difference:.2e} alone and in a batch, at values up to {scale:.2e}",
    )


def run_sampler(
    sampler: Any, example: SamplingExample, prompts: Many[Sequence]
) -> tuple[list[Any], list[Any]]:
    """Run a sampler to its end; return the values that it yields, and what it returns.

    The example's session raises `NotApplicable` for graphs and sizes that it lacks.

    Raises:
        CheckError: the sampler does not end.
    """
    running = sampler(example.open(), prompts, example.settings)
    yielded: list[Any] = []
    try:
        while len(yielded) < STEPS:
            yielded.append(next(running))
    except StopIteration as end:
        returned = end.value
        is_encoded = isinstance(returned, EncodedImages)
        return yielded, [returned.images, returned.encoded] if is_encoded else [returned]
    ensure(False, f"it has not ended after {STEPS} steps")
    raise AssertionError


def outputs_of_first_row(run: tuple[list[Any], list[Any]], rows: int) -> list[Any]:
    """Return the part of a run's outputs that belongs to its first row; progress is of all rows."""

    def first(x: Any) -> Any:
        return x[:1] if isinstance(x, np.ndarray) and len(x) == rows else x

    yielded = [x for x in run[0] if isinstance(x, np.ndarray)]
    return [*map(first, yielded), *map(first, run[1])]


def same(x: Any, y: Any) -> bool:
    """Return True if nested results are equal, arrays to the bit."""
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(same, x, y))
    return bool(np.array_equal(x, y))


def check_imports_no_torch(module: str, file: str) -> None:
    """Import a module in a new process, and check that torch is not imported.

    Raises:
        CheckError: torch is imported, or the module cannot be imported.
    """
    line = [sys.executable, "-c", PROBE, module, file]
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.run(
        line, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    ensure(not process.stderr, f"{module} cannot be imported by itself: {process.stderr.strip()[-200:]}")
    ensure(process.returncode == 0, f"importing {module} imports torch")

"""``data check``: every sample of every source, read once as training reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np

from janus_modular.plugins import Plugins
from janus_modular.sequence import Sample, Sequence
from janus_modular.training.bad_samples import (
    MAX_LOGGED,
    Action,
    Problem,
    SampleError,
    exceeds_limit,
)
from janus_modular.training.encode_images import open_run_codes
from janus_modular.training.initial_model import initial_model
from janus_modular.training.mixture import SampleRef
from janus_modular.training.objective import build_objective
from janus_modular.training.run_setup import open_sources, step_builder
from janus_modular.training.sample_workers import SampleWorkers, WorkerType
from janus_modular.training.schema import BadSamplesConfig, TrainConfig
from janus_modular.training.step_batches import BatchBuilder
from janus_modular.training.step_builder import StepBuilder


@dataclass
class CheckedSample:
    """What is known of a sample once it was read."""

    index: int
    problem: Problem | None = None
    action: Action | None = None
    reason: str = ""
    length: int = 0  # positions, before it was cut or split; 0 if unknown
    positions: int = 0  # used by training
    supervised: int = 0
    not_encoded: int = 0  # target images without stored codes
    digest: bytes = b""  # of tokens and pixels


@dataclass
class SourceReport:
    """The counts of a source."""

    samples: int  # of an epoch
    checked: int = 0
    problems: dict[Problem, int] = field(
        default_factory=lambda: {"unreadable": 0, "unsupervised": 0, "too_long": 0}
    )
    actions: dict[Action, int] = field(default_factory=lambda: {"skip": 0, "cut": 0, "split": 0})
    errors: int = 0  # samples that end a training run
    over_limit: bool = False  # more are skipped or cut than `bad_samples.limit` allows
    duplicates: int = 0  # samples that are equal to an earlier sample of the source
    longest: int = 0  # positions of the longest sample
    longest_index: int | None = None  # of that sample
    positions: int = 0
    supervised: int = 0
    not_encoded: int = 0  # target images that `codes.path` lacks
    examples: list[dict[str, Any]] = field(default_factory=list)  # the first problems and duplicates

    @property
    def ends_training(self) -> bool:
        """Return True if a training run that takes these samples ends with an error."""
        return bool(self.errors or self.not_encoded) or self.over_limit or not self.supervised

    def add(self, sample: CheckedSample, policy: BadSamplesConfig) -> None:
        """Count a sample."""
        self.checked += 1
        self.positions += sample.positions
        self.supervised += sample.supervised
        self.not_encoded += sample.not_encoded
        if sample.length > self.longest:
            self.longest, self.longest_index = sample.length, sample.index
        problem: Problem | None = "too_long" if sample.action else sample.problem
        if problem is None:
            return
        self.problems[problem] += 1
        if sample.action:
            self.actions[sample.action] += 1
        elif getattr(policy, problem) == "skip":
            self.actions["skip"] += 1
        else:
            self.errors += 1
        self.add_example(sample.index, problem, sample.reason)
        bad = self.actions["skip"] + self.actions["cut"]
        self.over_limit = exceeds_limit(policy, bad, self.checked)

    def add_example(self, index: int, problem: str, reason: str) -> None:
        """Keep an example, of which each problem has a few."""
        if sum(example["problem"] == problem for example in self.examples) < MAX_LOGGED:
            self.examples.append({"index": index, "problem": problem, "reason": reason})


OnProgress = Callable[[str, int, int], None]
"""Gets a source, the number of its samples that are read, and the number that will be."""


def check_data(
    config: TrainConfig, plugins: Plugins, *, limit: int | None = None, on_progress: OnProgress | None = None
) -> dict[str, SourceReport]:
    """Return the report of each source that a config's mixture uses; see `check_sources`.

    Raises:
        JanusError: the config cannot be used, or a source cannot be opened.
    """
    assembly = initial_model(config, plugins, "meta")
    objective = build_objective(config.objective, assembly.model, plugins, "meta")
    codes, sources = open_run_codes(config, assembly, plugins), open_sources(config, plugins)
    builder = step_builder(config, sources, assembly, objective, codes=codes)
    return check_sources(
        builder,
        workers=config.workers,
        worker_type=config.worker_type,
        limit=limit,
        on_progress=on_progress,
    )


def check_sources(
    builder: StepBuilder,
    *,
    workers: int = 0,
    worker_type: WorkerType = "thread",
    limit: int | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, SourceReport]:
    """Return the report of each source, from its first epoch or from the first ``limit`` samples of it."""
    if isinstance(builder, BatchBuilder):
        builder = replace(builder, condition_dropout=0.0)  # pads in place of prompts look like duplicates
    reports = {}
    for name, source in builder.mixture.sources.items():
        report = reports[name] = SourceReport(len(source))
        total = report.samples if limit is None else min(limit, report.samples)
        seen: dict[bytes, int] = {}
        refs = (SampleRef(name, i) for i in range(total))
        with SampleWorkers(partial(check_sample, builder), workers, worker_type) as pool:
            for sample in pool.map(refs):
                report.add(sample, builder.policy)
                if sample.digest and (first := seen.setdefault(sample.digest, sample.index)) != sample.index:
                    report.duplicates += 1
                    report.add_example(sample.index, "duplicate", f"is equal to sample {first}")
                if on_progress:
                    on_progress(name, report.checked, total)
    return reports


def check_sample(builder: StepBuilder, ref: SampleRef) -> CheckedSample:
    """Read a sample as a training run does, without a replacement if it cannot be used."""
    checked = CheckedSample(builder.mixture.index(ref))
    if not isinstance(builder, BatchBuilder):
        return _check_example(builder, ref, checked)

    def measured(sample: Sample, drops_condition: bool) -> Sequence:
        sequence = builder.sequence(sample, drops_condition)
        checked.length, checked.digest = len(sequence), _digest(sequence)
        return sequence

    try:
        sequences, checked.action, checked.reason = replace(builder, sequence=measured).try_sample(ref)
    except SampleError as error:
        checked.problem, checked.reason = error.problem, str(error)
        return checked
    checked.positions = sum(map(len, sequences))
    checked.supervised = sum(map(builder.count_supervised, sequences))
    if builder.codes is not None:
        images = [image for sequence in sequences for image in sequence.generation_images]
        checked.not_encoded = sum(builder.codes.find(x) is None for x in images if x.dtype == np.uint8)
    return checked


def _check_example(builder: StepBuilder, ref: SampleRef, checked: CheckedSample) -> CheckedSample:
    """Read a sample as the example of an objective, which counts as one supervised item."""
    try:
        [example], _, _ = builder.try_sample(ref)
    except SampleError as error:
        checked.problem, checked.reason = error.problem, str(error)
        return checked
    digest = blake2b(digest_size=16)
    for name, array in example.items():
        digest.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    checked.supervised, checked.digest = 1, digest.digest()
    return checked


def _digest(sequence: Sequence) -> bytes:
    """Return a digest of the tokens and the pixels of a sequence."""
    digest = blake2b(sequence.tokens.tobytes() + sequence.generation_mask.tobytes(), digest_size=16)
    for image in (*sequence.understanding_pixels, *sequence.generation_images):
        digest.update(f"{image.dtype}{image.shape}".encode() + image.tobytes())
    return digest.digest()

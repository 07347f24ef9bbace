from __future__ import annotations

import itertools
import os
import select
import signal
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from janus_modular import IGNORE_INDEX, DataError, Message, Sample, Sequence, Text, TrainingError
from janus_modular.training.mixture import Mixture, MixturePhase
from janus_modular.training.sample_workers import SampleWorkers
from janus_modular.training.step_batches import BatchBuilder


class Numbered:
    """Samples of various lengths; the condition is dropped where token 0 is 1."""

    def __len__(self) -> int:
        return 9

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        return Sample([Message("user", [Text(str(index))])])


def sequence(sample: Sample, drop: bool) -> Sequence:
    nowhere = np.zeros(4, np.bool_)
    return Sequence(
        np.full(4, drop), np.array([IGNORE_INDEX, 5, 6, IGNORE_INDEX]), nowhere, nowhere, source=sample.source
    )


def builder(**changes: object) -> BatchBuilder:
    mixed = Mixture({"a": Numbered(), "b": Numbered()}, [MixturePhase({"a": 3.0, "b": 1.0})], 400, 0)
    settings = {"image_tokens": 16, "pad": 0, "length": 10, "condition_dropout": 0.1} | changes
    return BatchBuilder(mixed, sequence, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("worker_type", ["thread", "process"])
def test_workers_do_not_change_batches(worker_type: Any) -> None:
    alone, helped = (
        list(builder().build_all(3, 8, workers=workers, worker_type=worker_type)) for workers in (0, 3)
    )
    assert len(alone) == len(helped) == 5
    for a, b in zip(alone, helped, strict=True):
        assert a.samples == b.samples == {"a": 300, "b": 100}
        assert torch.equal(a.batches[0].tokens, b.batches[0].tokens)


def test_only_a_few_steps_are_prepared_ahead() -> None:
    work = builder().build_all(0, 10**9, workers=2)
    assert len(list(itertools.islice(work, 2))) == 2
    work.close()


SHARES = {"a": 5.0, "b": 3.0, "c": 2.0}


@pytest.mark.parametrize(
    ("world", "workers", "worker_type"),
    [*((world, workers, "thread") for world in (1, 2, 4) for workers in (0, 2)), (2, 2, "process")],
)
def test_ten_thousand_samples_meet_each_share_exactly(world: int, workers: int, worker_type: Any) -> None:
    """Counted from the sequences of all ranks; their samples are those of one process, in the same order."""
    sources = {name: Numbered() for name in SHARES}
    mixed = Mixture(sources, [MixturePhase(SHARES)], 100, seed=1)
    ranks = [
        replace(builder(length=None), mixture=mixed, sequence=named, condition_dropout=0, rank=r, world=world)
        for r in range(world)
    ]
    runs = [make.build_all(0, 100, workers=workers, worker_type=worker_type) for make in ranks]
    drawn: list[tuple[int, int]] = []  # source and index
    for steps in zip(*runs, strict=True):
        rows = [step.batches[0].tokens[:, :2].tolist() for step in steps]
        for of_ranks in itertools.zip_longest(*rows):
            drawn += [tuple(row) for row in of_ranks if row is not None]
    assert [sum(source == i for source, _ in drawn) for i in range(3)] == [5000, 3000, 2000]
    expected = [
        ([*SHARES].index(ref.source), mixed.index(ref))
        for step in range(100)
        for ref in mixed.sample_refs(step)
    ]
    assert drawn == expected
    for i in range(3):  # whole epochs: each sample of a source nearly as often as the others
        counts = np.bincount([index for source, index in drawn if source == i], minlength=9)
        assert counts.max() - counts.min() <= 1


def named(sample: Sample, drop: bool) -> Sequence:
    """A sequence that begins with the number of its source and the index of its sample."""
    made = sequence(sample, drop)
    index = int(sample.messages[0].content[0].text)
    return replace(made, tokens=np.array([[*SHARES].index(sample.source), index, 0, 0]))


class Killed(Numbered):
    """A source whose eighth sample ends its process, as a lack of memory does."""

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index, rng)


def test_a_killed_worker_ends_the_run_with_an_error() -> None:
    mixed = Mixture({"a": Killed()}, [MixturePhase({"a": 1.0})], 20, 0)
    batches = replace(builder(), mixture=mixed).build_all(0, 2, workers=2, worker_type="process")
    with pytest.raises(TrainingError, match=r"was killed.*Set fewer workers"):
        next(batches)


def test_worker_processes_end_with_their_parent(tmp_path: Path) -> None:
    """Killed by SIGKILL, which no parent can handle."""
    pids = tmp_path / "pids"

    def parent() -> None:
        pool = SampleWorkers(_own_id, 2, "process")
        pids.write_text(" ".join(str(pool.result(pool.submit(i))) for i in range(20)))
        os.kill(os.getpid(), signal.SIGKILL)

    process = get_context("fork").Process(target=parent)
    process.start()
    process.join()
    workers = {int(pid) for pid in pids.read_text().split()}
    assert workers
    assert all(_ends(pid) for pid in workers)


def _own_id(_: int) -> int:
    return os.getpid()


def _ends(pid: int) -> bool:
    """Wait until a process that is no child of this one has ended, at most 30 s; a zombie has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(descriptor) as handle:
        return bool(select.select([handle], [], [], 30)[0])


def test_a_tenth_of_the_conditions_is_dropped() -> None:
    dropped = [
        builder().prepare(draw).sequences[0].tokens[0]
        for step in range(5)
        for draw in builder().mixture.sample_refs(step)
    ]
    assert np.mean(dropped) == pytest.approx(0.1, abs=0.03)  # 2000 draws: five standard deviations


def test_accumulation_divides_rows_not_counts() -> None:
    whole, cut = builder().build(0), builder(accumulate=7).build(0)
    assert len(cut.batches) == 7
    assert (
        sum(len(batch.tokens) for batch in cut.batches) == len(whole.batches[0].tokens) == 200
    )  # two of 4 in 10
    assert cut.supervised == whole.supervised == 800


def test_a_sample_without_supervised_positions_is_named() -> None:
    def unsupervised(sample: Sample, drop: bool) -> Sequence:
        made = sequence(sample, drop)
        made.labels[:] = IGNORE_INDEX
        return made

    one = builder()
    bad = BatchBuilder(one.mixture, unsupervised, image_tokens=16, pad=0)
    with pytest.raises(DataError, match=r"source 'a', sample \d: nothing in it is supervised"):
        bad.build(0)


def test_errors_in_threads_are_raised_unchanged() -> None:
    with pytest.raises(DataError, match=r"4 positions.*rows of 3: raise length"):
        next(builder(length=3).build_all(0, 5, workers=2))

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from janus_modular import IGNORE_INDEX, DataError, Sample, Sequence
from janus_modular.training.mixture import Mixture, MixturePhase
from janus_modular.training.step_batches import BatchBuilder


class Numbered:
    """Samples of various lengths; the condition is dropped where token 0 is 1."""

    def __len__(self) -> int:
        return 9

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        return Sample([], source=str(index))


def sequence(sample: Sample, drop: bool) -> Sequence:
    nowhere = np.zeros(4, np.bool_)
    return Sequence(
        np.full(4, drop), np.array([IGNORE_INDEX, 5, 6, IGNORE_INDEX]), nowhere, nowhere, source=sample.source
    )


def builder(**changes: object) -> BatchBuilder:
    mixed = Mixture({"a": Numbered(), "b": Numbered()}, [MixturePhase({"a": 3.0, "b": 1.0})], 400, 0)
    settings = {"image_tokens": 16, "pad": 0, "length": 10, "condition_dropout": 0.1} | changes
    return BatchBuilder(mixed, sequence, **settings)  # type: ignore[arg-type]


def test_threads_do_not_change_batches() -> None:
    alone, helped = (list(builder().build_all(3, 8, workers=workers)) for workers in (0, 3))
    assert len(alone) == len(helped) == 5
    for a, b in zip(alone, helped, strict=True):
        assert a.samples == b.samples == {"a": 300, "b": 100}
        assert torch.equal(a.batches[0].tokens, b.batches[0].tokens)


def test_only_a_few_steps_are_prepared_ahead() -> None:
    work = builder().build_all(0, 10**9, workers=2)
    assert len(list(itertools.islice(work, 2))) == 2
    work.close()


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

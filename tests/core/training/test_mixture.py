from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from janus_modular import DataError, Message, Sample, Text
from janus_modular.training.mixture import Mixture, apportion, shuffled
from janus_modular.training.schema import Phase


class Numbers:
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        if index == 13:
            raise DataError("it is the unlucky one.")
        return Sample([Message("user", [Text(f"{index} {rng.integers(1_000_000)}", True)])], template=False)


def mixture(seed: int = 0, **lengths: int) -> Mixture:
    shares = {"pairs": 2.0, "text": 3.0, "draw": 5.0}
    sources = {name: Numbers(lengths.get(name, 7)) for name in shares}
    return Mixture(sources, [Phase(shares)], batch=512, seed=seed)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 1000])
def test_shuffling_permutes(length: int) -> None:
    places = [shuffled(i, length, (1, 2, 3)) for i in range(length)]
    assert sorted(places) == list(range(length))


def test_shuffling_leaves_no_order_and_differs_by_seed() -> None:
    one, other = ([shuffled(i, 1000, (seed,)) for i in range(1000)] for seed in (1, 2))
    # Of a random permutation of n, the correlation with the order has standard deviation 1/sqrt(n): 0.032.
    assert abs(np.corrcoef(one, range(1000))[0, 1]) < 0.16
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.16
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 10  # 1 expected


@pytest.mark.parametrize("total", [1, 7, 128, 256, 512])
def test_shares_fill_the_batch_exactly(total: int) -> None:
    shares = {"understanding": 7.0, "text": 3.0, "generation": 10.0}
    counts = apportion(shares, total)
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - total * share / 20) < 1 for name, share in shares.items())


def test_every_step_has_the_same_counts() -> None:
    mixed = mixture()
    for step in range(5):
        assert Counter(draw.source for draw in mixed.plan(step)) == {"pairs": 102, "text": 154, "draw": 256}
    assert mixed.taken(4) == {"pairs": 408, "text": 616, "draw": 1024}


def test_an_epoch_takes_every_sample_once_and_the_next_has_another_order() -> None:
    mixed = mixture(text=154)
    first, second = (
        [mixed.index(draw) for draw in mixed.plan(step) if draw.source == "text"] for step in (0, 1)
    )
    assert sorted(first) == sorted(second) == list(range(154))
    assert first != second


def test_a_sample_is_a_function_of_the_seed() -> None:
    one, same, other = mixture(3), mixture(3), mixture(4)
    plan = one.plan(9)[::37]
    assert [one.sample(draw) for draw in plan] == [same.sample(draw) for draw in reversed(plan)][::-1]
    assert [one.sample(draw) for draw in plan] != [other.sample(draw) for draw in plan]
    assert one.sample(plan[0]).source == plan[0].source


def test_phases_follow_each_other_and_count_on() -> None:
    sources = {"classes": Numbers(5), "pairs": Numbers(5)}
    mixed = Mixture(
        sources, [Phase({"classes": 1.0, "pairs": 0.0}, 2), Phase({"pairs": 3.0, "classes": 1.0})], 4, 0
    )
    assert [mixed.counts(step).get("pairs", 0) for step in range(4)] == [0, 0, 3, 3]
    assert mixed.taken(5) == {"classes": 4 + 4 + 3, "pairs": 9}
    assert [draw.number for draw in mixed.plan(4)] == [10, 6, 7, 8]


def test_ranks_share_a_step() -> None:
    mixed = mixture()
    shares = [mixed.plan(2, rank=rank, world=3) for rank in range(3)]
    assert Counter(draw for share in shares for draw in share) == Counter(mixed.plan(2))


def test_a_bad_sample_is_named() -> None:
    mixed = mixture(text=14)
    bad = next(draw for draw in mixed.plan(0) if draw.source == "text" and mixed.index(draw) == 13)
    with pytest.raises(DataError, match="source 'text', sample 13: it is the unlucky one"):
        mixed.sample(bad)


def test_an_empty_source_is_named() -> None:
    with pytest.raises(DataError, match="'draw' has no samples"):
        mixture(draw=0)

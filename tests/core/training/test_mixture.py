from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_modular import DataError, Message, Sample, Text
from janus_modular.training.mixture import Mixture, MixturePhase, SampleRef, apportion, shuffled


class Numbers:
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        return Sample([Message("user", [Text(f"{index} {rng.integers(1_000_000)}", True)])], template=False)


def mixture(seed: int = 0, **lengths: int) -> Mixture:
    shares = {"pairs": 2.0, "text": 3.0, "draw": 5.0}
    sources = {name: Numbers(lengths.get(name, 7)) for name in shares}
    return Mixture(sources, [MixturePhase(shares)], batch=512, seed=seed)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 1000])
def test_shuffling_is_a_permutation(length: int) -> None:
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


def test_rounding_of_shares_is_made_up_for_in_later_steps() -> None:
    mixed = mixture()
    exact = {"pairs": 102.4, "text": 153.6, "draw": 256}
    for step in range(5):
        counts = Counter(draw.source for draw in mixed.sample_refs(step))
        assert counts == mixed.counts(step)
        assert all(abs(counts[name] - value) < 1 for name, value in exact.items())
    assert mixed.samples_before(5) == {"pairs": 512, "text": 768, "draw": 1280}
    assert mixed.samples_before(5_000_000) == {
        "pairs": 512_000_000,
        "text": 768_000_000,
        "draw": 1_280_000_000,
    }


@pytest.mark.parametrize(
    ("shares", "batch", "steps"),
    [
        ({"big": 99, "small": 1}, 10, 10),
        ({"big": 0.999, "small": 0.001}, 4, 250),
        ({"a": 1, "b": 1, "c": 1}, 1, 3),
        ({"a": 1e-3, "b": 1, "c": 1, "d": 1}, 2, 3001),
    ],
)
def test_small_shares_have_their_turn(shares: dict[str, float], batch: int, steps: int) -> None:
    mixed = Mixture({name: Numbers(5) for name in shares}, [MixturePhase(shares)], batch, 0)
    drawn = Counter(draw for step in range(steps) for draw in mixed.sample_refs(step))
    assert set(drawn.values()) == {1}  # no number twice
    totals = Counter(draw.source for draw in drawn)
    unit = batch * steps / sum(shares.values())
    assert totals == {name: pytest.approx(share * unit) for name, share in shares.items()}
    assert mixed.samples_before(steps) == totals


SHARES = st.lists(st.integers(0, 1000) | st.floats(0.001, 1000), min_size=1, max_size=6).filter(any)


@given(shares=SHARES, total=st.integers(0, 10_000))
def test_apportioned_counts_are_monotone_whole_and_near_the_shares(shares: list[float], total: int) -> None:
    """A count is off by less than the rounding of all sources together, and never falls with the total."""
    named = {str(i): share for i, share in enumerate(shares)}
    counts, after = apportion(named, total), apportion(named, total + 1)
    assert sum(counts.values()) == total
    assert sorted(after[name] - count for name, count in counts.items()) == [0] * (len(named) - 1) + [1]
    for name, share in named.items():
        exact = total * share / sum(shares)
        assert (
            abs(counts[name] - exact) <= 0.5 + len(shares) / 2 * share / sum(shares) + 1e-6
        )  # float64 `exact`


def test_an_epoch_takes_every_sample_once_and_the_next_has_another_order() -> None:
    mixed = mixture(text=384)
    taken = [
        mixed.index(draw) for step in range(5) for draw in mixed.sample_refs(step) if draw.source == "text"
    ]
    first, second = taken[:384], taken[384:]
    assert sorted(first) == sorted(second) == list(range(384))
    assert first != second


def test_a_replacement_is_a_fixed_sample_of_the_same_source() -> None:
    mixed = mixture(text=20)
    drawn = [
        mixed.index(SampleRef("text", number, attempt)) for number in range(40) for attempt in range(1, 4)
    ]
    assert set(drawn) == set(range(20))  # 120 draws of 20: each is missed with a chance of 0.2 %
    assert drawn == [
        mixture(text=20).index(SampleRef("text", n, attempt)) for n in range(40) for attempt in range(1, 4)
    ]


def test_a_sample_is_a_function_of_the_seed() -> None:
    one, same, other = mixture(3), mixture(3), mixture(4)
    plan = one.sample_refs(9)[::37]
    assert [one.sample(draw) for draw in plan] == [same.sample(draw) for draw in reversed(plan)][::-1]
    assert [one.sample(draw) for draw in plan] != [other.sample(draw) for draw in plan]
    assert one.sample(plan[0]).source == plan[0].source


def test_phases_follow_each_other_and_count_on() -> None:
    sources = {"classes": Numbers(5), "pairs": Numbers(5)}
    mixed = Mixture(
        sources,
        [MixturePhase({"classes": 1.0, "pairs": 0.0}, 2), MixturePhase({"pairs": 3.0, "classes": 1.0})],
        4,
        0,
    )
    assert [mixed.counts(step).get("pairs", 0) for step in range(4)] == [0, 0, 3, 3]
    assert mixed.samples_before(5) == {"classes": 4 + 4 + 3, "pairs": 9}
    assert [draw.number for draw in mixed.sample_refs(4)] == [10, 6, 7, 8]


def test_ranks_share_a_step() -> None:
    mixed = mixture()
    shares = [mixed.sample_refs(2, rank=rank, world=3) for rank in range(3)]
    assert Counter(draw for share in shares for draw in share) == Counter(mixed.sample_refs(2))


def test_an_empty_source_is_named() -> None:
    with pytest.raises(DataError, match="'draw' has no samples"):
        mixture(draw=0)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("a text", "returns str; expected a janus_modular.Sample"),
        (None, "returns NoneType; expected"),
        (Sample([Text("bare", True)]), "a Sample of Text; expected messages"),  # type: ignore[list-item]
    ],
)
def test_a_source_must_return_samples_of_messages(
    returned: object, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Numbers, "sample", lambda *_: returned)
    with pytest.raises(DataError, match=expected):
        mixture().sample(SampleRef("text", 0))


@pytest.mark.parametrize("length", [2.5, -1, None])
def test_a_source_without_a_length_is_named(length: Any) -> None:
    with pytest.raises(DataError, match=r"source 'text' has no length: .*a whole number"):
        mixture(text=length)

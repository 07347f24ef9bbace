"""Unusable samples: an error that names them, or skipped, cut, split, and counted."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_modular import (
    IGNORE_INDEX,
    DataError,
    ImageError,
    Message,
    PromptError,
    Sample,
    Sequence,
    Text,
    UnsupervisedError,
)
from janus_modular.model.batch import collate
from janus_modular.training.bad_samples import MIN_TOLERATED, BadSample, BadSampleCounter, cut, split
from janus_modular.training.mixture import Mixture, MixturePhase, SampleRef
from janus_modular.training.schema import BadSamplesConfig
from janus_modular.training.step_batches import BatchBuilder
from janus_modular.training.step_builder import MAX_ATTEMPTS, StepBatch


def text(length: int, learned: bool = True) -> Sequence:
    """A sequence of ids 0 to ``length - 1``, each the label before it."""
    tokens, nowhere = np.arange(length), np.zeros(length, np.bool_)
    labels = np.append(tokens[1:], IGNORE_INDEX) if learned else np.full(length, IGNORE_INDEX)
    return Sequence(tokens, labels, nowhere, nowhere.copy())


def with_images(*runs: tuple[str, int]) -> Sequence:
    """A sequence of runs of text, and of images to read and to draw between begin and end tokens."""
    reads, draws = [False], [False]
    for kind, length in runs:
        edge = 0 if kind == "text" else 1
        for flags, is_here in ((reads, kind == "read"), (draws, kind == "draw")):
            flags += [False] * edge + [is_here] * length + [False] * edge
    made = text(len(reads))
    pixels = [[np.full((3, 1, 1), i, np.uint8)] for i, (kind, _) in enumerate(runs) if kind != "text"]
    kinds = [kind for kind, _ in runs if kind != "text"]
    return replace(
        made,
        understanding_mask=np.array(reads),
        generation_mask=np.array(draws),
        understanding_pixels=[p for [p], kind in zip(pixels, kinds, strict=True) if kind == "read"],
        generation_images=[p for [p], kind in zip(pixels, kinds, strict=True) if kind == "draw"],
        generation_supervised=[True for kind in kinds if kind == "draw"],
    )


class Records:
    """Ten samples; what is wrong with each is in ``faults``, by index."""

    def __init__(self, **bad_samples: Any) -> None:
        self.bad_samples = {
            int(key.removeprefix("at")): bad_sample for key, bad_sample in bad_samples.items()
        }

    def __len__(self) -> int:
        return 10

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        bad_sample = self.bad_samples.get(index)
        if isinstance(bad_sample, Exception):
            raise bad_sample
        return Sample(
            [Message("user", [Text(str(bad_sample if bad_sample else 4))])], template=bad_sample == "chat"
        )


def builder(records: Records, batch: int = 10, longest: int | None = None, **policy: Any) -> BatchBuilder:
    """Ten samples a step, a whole epoch: text of as many positions as the sample says."""

    def sequence(sample: Sample, drop: bool) -> Sequence:
        words = sample.messages[0].content[0].text
        if words == "surrogate":
            raise PromptError("no letter")
        if words == "silent":
            raise DataError("nothing to learn")
        return replace(text(25 if words == "chat" else int(words)), source=sample.source)

    mixed = Mixture({"a": records}, [MixturePhase({"a": 1.0})], batch, 0)
    return BatchBuilder(mixed, sequence, 16, 0, length=10, longest=longest, policy=BadSamplesConfig(**policy))


@pytest.mark.parametrize(
    ("bad_sample", "problem", "expected"),
    [
        (DataError("line 3: not JSON"), "unreadable", "not JSON"),
        (ImageError("a.png is damaged"), "unreadable", "is damaged"),
        (FileNotFoundError(2, "No such file"), "unreadable", "No such file"),
        (UnicodeDecodeError("utf-8", b"a", 0, 1, "invalid byte"), "unreadable", "invalid byte"),
        (KeyError("label"), "unreadable", "the source fails: it lacks 'label'"),
        (IndexError("list index out of range"), "unreadable", "the source fails: IndexError: list index"),
        ("surrogate", "unreadable", "no letter"),
        (UnsupervisedError("an empty answer"), "unsupervised", "an empty answer"),
        ("silent", "unsupervised", "nothing to learn"),
        (1, "unsupervised", "nothing in it is supervised"),
        (25, "too_long", "25 positions (24 supervised) do not fit into rows of 10: raise length"),
        ("chat", "too_long", "do not fit"),
    ],
)
def test_each_problem_is_an_error_or_skipped_by_its_own_key(
    bad_sample: Any, problem: str, expected: str
) -> None:
    with pytest.raises(DataError, match="source 'a', sample 3: ") as error:
        builder(Records(at3=bad_sample)).build(0)
    assert expected in str(error.value)
    others = {"unreadable", "unsupervised", "too_long"} - {problem}
    with pytest.raises(DataError, match="source 'a', sample 3: "):
        builder(Records(at3=bad_sample), **dict.fromkeys(others, "skip")).build(0)
    work = builder(Records(at3=bad_sample), **{problem: "skip"}).build(0)
    assert work.samples == {"a": 10}
    assert {(f.source, f.index, f.action) for f in work.bad_samples} == {("a", 3, "skip")}
    assert expected in work.bad_samples[0].reason
    assert work.bad_sample_counts() == {"skipped/a": len(work.bad_samples)}


def test_threads_skip_the_same_samples() -> None:
    records = Records(at1=DataError("x"), at2=25, at7="silent")
    policy = {"unreadable": "skip", "too_long": "split", "unsupervised": "skip"}
    alone, helped = (list(builder(records, 7, **policy).build_all(2, 9, workers=w)) for w in (0, 3))
    for a, b in zip(alone, helped, strict=True):
        assert a.bad_samples == b.bad_samples
        assert a.batches[0].tokens.tolist() == b.batches[0].tokens.tolist()
    assert sum(len(work.bad_samples) for work in alone) > 10


def test_a_source_without_a_usable_sample_ends_the_run() -> None:
    records = Records(**{f"at{i}": DataError(f"bad {i}") for i in range(10)})
    with pytest.raises(
        DataError, match=rf"source 'a': {MAX_ATTEMPTS} samples in a row cannot be used, .*: bad \d"
    ):
        builder(records, unreadable="skip").build(0)


def test_long_texts_are_cut_or_split_into_further_rows() -> None:
    shortened = builder(Records(at3=25), too_long="cut").build(0)
    assert shortened.tokens == {"a": 9 * 4 + 10}
    assert shortened.supervised == 9 * 3 + 9
    assert shortened.bad_sample_counts() == {"cut/a": 1}
    whole = builder(Records(at3=25), too_long="split").build(0)
    assert whole.tokens == {"a": 9 * 4 + 25}
    assert whole.supervised == 9 * 3 + 24
    assert whole.samples == {"a": 10}
    assert whole.bad_sample_counts() == {"split/a": 1}


def test_conversations_are_not_split() -> None:
    with pytest.raises(DataError, match=r"sample 3: .*only plain text can be split: raise length, shorten"):
        builder(Records(at3="chat"), too_long="split").build(0)


@pytest.mark.parametrize(("context", "raises"), [(11, True), (10, False)])
def test_longer_rows_are_advised_only_where_the_context_has_room(context: int, raises: bool) -> None:
    with pytest.raises(DataError, match="do not fit into rows of 10: ") as error:
        builder(Records(at3=25), longest=context).build(0)
    assert ("raise length" in str(error.value)) == raises


@given(length=st.integers(1, 50), room=st.integers(2, 20))
def test_a_split_text_supervises_every_token_once(length: int, room: int) -> None:
    pieces = split(text(length), room)
    labels = [label for piece in pieces for label in piece.labels if label != IGNORE_INDEX]
    assert labels == list(range(1, length))
    assert all(len(piece) <= room for piece in pieces)


@pytest.mark.parametrize(
    ("length", "kept", "images"),
    [
        (4, 4, 0),  # BOS and three of text
        (5, 4, 0),  # begin-of-image alone leads nowhere
        (7, 4, 0),  # within the image
        (8, 8, 1),  # the image, without its end
        (9, 9, 1),
        (12, 9, 1),  # within the second, which follows at once
        (13, 13, 2),
        (14, 14, 2),
        (99, 15, 2),
    ],
)
def test_a_cut_keeps_whole_images(length: int, kept: int, images: int) -> None:
    sequence = with_images(("text", 3), ("read", 3), ("draw", 3), ("text", 1))
    assert len(sequence) == 15
    short = cut(sequence, length)
    assert len(short) == kept
    pixels = [*short.understanding_pixels, *short.generation_images]
    assert [int(p[0, 0, 0]) for p in pixels] == [1, 2][:images]
    assert len(short.generation_images) == len(short.generation_supervised)
    assert short.labels[-1] == IGNORE_INDEX
    assert short.labels[: kept - 1].tolist() == sequence.labels[: kept - 1].tolist()


def test_a_cut_sequence_keeps_the_mask_of_its_hidden_prompt() -> None:
    sequence = with_images(("text", 3), ("draw", 2), ("text", 9))
    hidden = np.isin(np.arange(len(sequence)), [1, 2, 3])
    batch = collate([cut(replace(sequence, hidden=hidden), 10)])
    assert batch.hidden is not None
    assert batch.hidden[0].tolist() == hidden[:10].tolist()


def test_a_cut_may_leave_nothing_supervised() -> None:
    made = builder(Records(), too_long="cut")

    def late(sample: Sample, drop: bool) -> Sequence:
        sequence = text(20)
        sequence.labels[:15] = IGNORE_INDEX
        return sequence

    with pytest.raises(DataError, match="nothing in it is supervised after it was cut"):
        replace(made, sequence=late).prepare(SampleRef("a", 0))


def bad_sample(index: int, action: str = "skip") -> BadSample:
    return BadSample("a", index, action, f"reason {index}")


def test_exceeding_the_limit_stops_the_run_and_names_samples() -> None:
    counter = BadSampleCounter(BadSamplesConfig(limit=0.1))
    counter.add({"a": 80, "b": 100}, [bad_sample(i) for i in range(MIN_TOLERATED + 10)])
    with pytest.raises(DataError, match="source 'a': 21 of 100 samples were skipped or cut") as error:
        counter.add({}, [bad_sample(77, "cut")])
    assert "  sample 0: reason 0\n" in str(error.value)
    assert "more than 0.1 of them (bad_samples.limit)" in str(error.value)


@pytest.mark.parametrize(("limit", "stops"), [(0.74, True), (0.75, False), (1, False)])
def test_the_limit_is_a_share_of_the_samples_tried(limit: float, stops: bool) -> None:
    """Three of four samples are skipped; a limit of 1 never stops a run."""
    counter = BadSampleCounter(BadSamplesConfig(limit=limit))
    with pytest.raises(DataError, match="raise the limit") if stops else nullcontext():
        counter.add({"a": 1_000}, [bad_sample(i) for i in range(3_000 + 4 * MIN_TOLERATED)])


def test_cut_samples_count_once() -> None:
    counter = BadSampleCounter(BadSamplesConfig(limit=0))
    counter.add({"a": 20}, [bad_sample(0, "cut"), bad_sample(1), bad_sample(2, "split")])
    assert (counter.samples, counter.bad) == ({"a": 21}, {"a": 2})


def test_split_texts_lose_nothing_and_do_not_count_against_the_limit() -> None:
    counter = BadSampleCounter(BadSamplesConfig(limit=0))
    counter.add({"a": 100}, [bad_sample(i, "split") for i in range(50)])
    assert counter.bad == {}


def test_counts_continue_in_a_resumed_run() -> None:
    first, second = (BadSampleCounter(BadSamplesConfig(limit=0)) for _ in range(2))
    first.add({"a": 5}, [bad_sample(i) for i in range(MIN_TOLERATED)])
    second.load_state(first.state())
    with pytest.raises(DataError, match="11 of 17 samples were skipped or cut"):
        second.add({"a": 1}, [bad_sample(0)])


def test_each_bad_sample_is_logged_once_up_to_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    counter = BadSampleCounter(BadSamplesConfig(limit=1))
    with caplog.at_level(logging.WARNING):
        for index in (1, 1, 2, *range(100)):
            counter.add({"a": 1}, [bad_sample(index)])
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"skipped source 'a', sample {i}" for i in (1, 2, 0, 3, 4, 5, 6, 7, 8, 9)
    ]
    assert "only counted" in caplog.records[-1].getMessage()


def test_steps_without_bad_samples_add_no_metrics() -> None:
    assert StepBatch([], 0, {}, {}).bad_sample_counts() == {}


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_control_characters_of_a_sample_are_escaped_in_logs(
    policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Names in data may hold escape sequences, NUL, or thousands of letters."""
    records = Records(at3=ImageError("\x1b[2J\0" + "a" * 5000))
    made = builder(records, unreadable=policy)
    with caplog.at_level(logging.WARNING):
        if policy == "error":
            with pytest.raises(DataError) as error:
                made.build(0)
            text_shown = str(error.value)
        else:
            BadSampleCounter(BadSamplesConfig(unreadable="skip")).add({"s": 10}, made.build(0).bad_samples)
            text_shown = caplog.text
    assert r"\x1b[2J\x00aaa" in text_shown
    assert "\x1b" not in text_shown
    assert len(text_shown) < 3000

"""Samplers, trackers, formats and runtimes that each violate one rule: the check of this rule fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from janus_modular import ImageSamplerSettings, TextSamplerSettings, check_max_seq_len
from janus_modular.testing import SamplingExample, checks_of, run_check
from janus_modular.testing.examples import CheckpointFormatExample, NumpySession, prompt

PROMPTS = [prompt(1, 2, 3), prompt(4, 5)]


@dataclass
class Answers(TextSamplerSettings):
    """Settings of the text samplers below."""

    max_tokens: int = 3


def result_of(slot: str, check: str, component: Any, example: Any) -> tuple[str, str]:
    [chosen] = [one for one in checks_of(slot) if one.name == check]
    result = run_check(chosen, lambda: (component, example), slot=slot)
    return result.outcome, result.note


def answer(session: Any, prompts: Any, settings: Any, noise: Any = None) -> Any:
    hidden = session.prefill(prompts)
    for _ in range(settings.max_tokens):
        ones = np.ones((len(prompts), session.vocab_size), np.float32)
        ids, x = session.run("sample_text", hidden, ones if noise is None else noise(ones), np.float32(1))
        yield ids
        hidden = session.step(x)


def silent(session: Any, prompts: Any, settings: Any) -> Any:
    session.prefill(prompts)
    return
    yield


def yields_floats(session: Any, prompts: Any, settings: Any) -> Any:
    for ids in answer(session, prompts, settings):
        yield ids.astype(np.float32)


def draws_nothing(session: Any, prompts: Any, settings: Any) -> Any:
    session.prefill(prompts)
    yield 1, 1


def by_chance(session: Any, prompts: Any, settings: Any) -> Any:
    yield from answer(session, prompts, settings, lambda x: np.random.standard_exponential(x.shape))


def by_batch(session: Any, prompts: Any, settings: Any) -> Any:
    yield from answer(session, prompts, settings, lambda x: x * (1 + len(prompts)) ** np.arange(x.shape[1]))


TEXT_SAMPLERS: Mapping[str, tuple[str, Any, str]] = {
    "that yields nothing": ("sampler_ends", silent, "it yielded nothing"),
    "that yields other than ids": ("yields_token_ids", yields_floats, "an array (2,) of float32"),
    "whose chance is not of its settings": ("sampler_repeats", by_chance, "two runs with the same settings"),
    "whose rows depend on their number": ("sampler_rows", by_batch, "the first row has another result alone"),
    "that imports torch": ("sampler_imports", silent, "imports torch"),
}


@pytest.mark.parametrize(("check", "sampler", "note"), TEXT_SAMPLERS.values(), ids=TEXT_SAMPLERS)
def test_checks_find_a_broken_text_sampler(check: str, sampler: Any, note: str) -> None:
    example = SamplingExample(Answers(), PROMPTS, NumpySession)
    if check != "sampler_imports":  # this file imports torch itself
        assert result_of("text_samplers", check, answer, example)[0] == "passed"
    outcome, said = result_of("text_samplers", check, sampler, example)
    assert (outcome, note in said) == ("failed", True), said


def test_checks_find_an_image_sampler_that_returns_no_images() -> None:
    example = SamplingExample(ImageSamplerSettings(), PROMPTS, NumpySession)
    outcome, note = result_of("image_samplers", "returns_images", draws_nothing, example)
    assert (outcome, "returned None" in note) == ("failed", True), note


class Keeps:
    """A good tracker; its subclasses each break one promise."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "values.txt"

    def log(self, step: int, values: Any) -> None:
        with self.file.open("a") as file:
            file.write(f"{step} {dict(values)}\n")

    def close(self) -> None:
        """Nothing is open."""


class NeedsANewFolder(Keeps):
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        super().__init__(folder)


class TakesValuesOut(Keeps):
    def log(self, step: int, values: Any) -> None:
        super().log(step, values)
        values.pop("lr", None)


class ClosesWhatItWrote(Keeps):
    def close(self) -> None:
        self.file.read_text()


@pytest.mark.parametrize(
    ("check", "tracker", "note"),
    [
        ("tracker_logs", NeedsANewFolder, "File exists"),
        ("tracker_logs", TakesValuesOut, "it changes the values"),
        ("tracker_idle", ClosesWhatItWrote, "No such file"),
    ],
)
def test_a_broken_tracker_is_found(check: str, tracker: type[Keeps], note: str) -> None:
    values = {"loss": 0.5, "lr": 1e-3}
    assert result_of("trackers", check, Keeps, values)[0] == "passed"
    outcome, said = result_of("trackers", check, tracker, values)
    assert (outcome, note in said) == ("failed", True), said


class Renames:
    """A good format; its subclasses each break one promise."""

    model_type = "theirs"

    def detect(self, config: Any) -> bool:
        return config.get("model_type") == self.model_type

    def to_native(self, weights: Any) -> Any:
        return ((f"native.{name}", weights[name]) for name in weights)

    def from_native(self, weights: Any) -> Any:
        return ((name.removeprefix("native."), weights[name]) for name in weights)


class DetectsAll(Renames):
    def detect(self, config: Any) -> bool:
        return True


class DetectsNone(Renames):
    def detect(self, config: Any) -> bool:
        return False


class CallsItselfOtherwise(Renames):
    model_type = "ours"

    def detect(self, config: Any) -> bool:
        return config.get("model_type") == "theirs"


class Halves(Renames):
    def from_native(self, weights: Any) -> Any:
        return ((name, tensor / 2) for name, tensor in super().from_native(weights))


class LosesSome(Renames):
    def from_native(self, weights: Any) -> Any:
        return list(super().from_native(weights))[1:]


class ReadsNone(Renames):
    def to_native(self, weights: Any) -> Any:
        return ()


@pytest.mark.parametrize(
    ("check", "broken", "note"),
    [
        ("format_detects", DetectsAll, "as its own"),
        ("format_detects", DetectsNone, "does not detect the example's config"),
        ("format_detects", CallsItselfOtherwise, "its model_type is 'ours'"),
        ("format_round_trip", Halves, "values differ after a round trip"),
        ("format_round_trip", LosesSome, "names differ after a round trip"),
        ("format_round_trip", ReadsNone, "none of 2 weights has a native name"),
    ],
)
def test_a_broken_format_is_found(check: str, broken: type[Renames], note: str) -> None:
    weights: dict[str, Tensor] = {"a": torch.ones(2), "b": torch.ones(3)}
    example = CheckpointFormatExample({"model_type": "theirs"}, weights)
    assert result_of("formats", check, Renames(), example)[0] == "passed"
    outcome, said = result_of("formats", check, broken(), example)
    assert (outcome, note in said) == ("failed", True), said


class Runs:
    """A good runtime; its subclasses each break one promise."""

    context, text_sampler, image_sampler = 64, "text", "autoregressive"

    def open(self, max_seq_len: int, rows: int | None = None) -> Any:
        return NumpySession(check_max_seq_len(max_seq_len, self.context or 64), rows)


class NoContext(Runs):
    context = 0


class NoSampler(Runs):
    image_sampler = ""


class NoSizes(Runs):
    def open(self, max_seq_len: int, rows: int | None = None) -> Any:
        session = super().open(max_seq_len, rows)
        del session.pad_id
        return session


class MixesRows(Runs):
    def open(self, max_seq_len: int, rows: int | None = None) -> Any:
        session = super().open(max_seq_len, rows)
        read = session.prefill
        session.prefill = lambda prompts: (states := read(prompts)) - states.mean(0)
        return session


class DisturbsRows(Runs):
    def open(self, max_seq_len: int, rows: int | None = None) -> Any:
        class Session(NumpySession):
            def read_prompts(self, prompts: Any, first_row: int) -> Any:
                for states in self.states:
                    states[-1:] = [2 * state for state in states[-1:]]
                return super().read_prompts(prompts, first_row)

        return Session(max_seq_len, rows)


class FeedsTheFirst(Runs):
    def open(self, max_seq_len: int, rows: int | None = None) -> Any:
        class Session(NumpySession):
            def feed(self, x: Any, counts: Any) -> Any:
                return super().feed(np.broadcast_to(x[:, :1], x.shape), counts)

        return Session(max_seq_len, rows)


class IgnoresCounts(Runs):
    def open(self, max_seq_len: int, rows: int | None = None) -> Any:
        class Session(NumpySession):
            def feed(self, x: Any, counts: Any) -> Any:
                fed = np.zeros(x.shape, np.float32)
                for row, states in enumerate(self.states):
                    self._feed_row(row, x[row])
                    fed[row] = states[-x.shape[1] :]
                return fed

        return Session(max_seq_len, rows)


class ForgetsToCut(Runs):
    def open(self, max_seq_len: int, rows: int | None = None) -> Any:
        class Session(NumpySession):
            def feed(self, x: Any, counts: Any) -> Any:
                lengths, self._lengths = self._lengths, np.array([len(states) for states in self.states])
                fed, self._lengths = super().feed(x, counts), lengths
                return fed

        return Session(max_seq_len, rows)


class KeepsWhatWasFreed(Runs):
    def open(self, max_seq_len: int, rows: int | None = None) -> Any:
        class Session(NumpySession):
            def read_prompts(self, prompts: Any, first_row: int) -> Any:
                for row, read in enumerate(prompts, first_row):
                    self._feed_row(row, self.table[read.tokens])
                return np.stack([self.states[first_row + i][-1] for i in range(len(prompts))])

        return Session(max_seq_len, rows)


class AdmitsAnywhere(Runs):
    def open(self, max_seq_len: int, rows: int | None = None) -> Any:
        class Session(NumpySession):
            def admit(self, prompts: Any, rows: Any) -> Any:
                if self.lengths.any():
                    self.free(rows)
                return super().admit(prompts, rows)

        return Session(max_seq_len, rows)


class ReturnsItsMemory(Runs):
    def open(self, max_seq_len: int, rows: int | None = None) -> Any:
        class Session(NumpySession):
            memory = np.zeros((2, 3, 6), np.float32)

            def feed(self, x: Any, counts: Any) -> Any:
                fed = super().feed(x, counts)
                if fed.shape == self.memory.shape:
                    self.memory[:] = fed
                    return self.memory
                return fed

            def to_host(self, x: Any) -> Any:
                return x

        return Session(max_seq_len, rows)


@pytest.mark.parametrize(
    ("check", "runtime", "note"),
    [
        ("runtime_attributes", NoContext, "its context is 0"),
        ("runtime_attributes", NoSampler, "the name of a sampler is ''"),
        ("runtime_attributes", NoSizes, "the pad_id of its sessions is None; expected a whole number"),
        ("runtime_rows", MixesRows, "the first row differs by"),
        ("session_admit", DisturbsRows, "beside rows that came earlier or later"),
        ("session_extend", FeedsTheFirst, "1 positions at once"),
        ("session_counts", IgnoresCounts, "row 0 with counts (1, 7)"),
        ("session_full_rows", IgnoresCounts, "a row beside a full one"),
        ("session_truncate", ForgetsToCut, "row 0 cut back to 5 of 9 positions"),
        ("session_free", KeepsWhatWasFreed, "the last states of prompts a row used again"),
        ("session_limits", AdmitsAnywhere, "into a row that is not free raises no error"),
        ("session_copies", ReturnsItsMemory, "changes when the session goes on"),
    ],
)
def test_a_broken_runtime_is_found(check: str, runtime: type[Runs], note: str) -> None:
    assert result_of("runtimes", check, Runs(), PROMPTS)[0] == "passed"
    outcome, said = result_of("runtimes", check, runtime(), PROMPTS)
    assert (outcome, note in said) == ("failed", True), said

"""Drawing several codes in a pass, against drawing them one by one: the same codes, in fewer passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from janus_modular import PromptError, SessionWrapper
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_plugins.samplers import autoregressive, parallel
from janus_plugins.samplers.autoregressive import DrawSettings
from janus_plugins.samplers.drafts import NoiseWindow, confirmed
from janus_plugins.samplers.noise import exponential_noise
from janus_plugins.samplers.parallel import ParallelSettings

TEXTS = ["a", "a longer text", "two words"]
CODES = 16  # of an image of configs/model/tiny
TWO_CODES = [
    "generation.tokenizer={name: open-magvit2, channels: 8, channel_multipliers: [1, 1, 2, 2],"
    " residual_blocks: 1, bits: [3, 4]}",
    "generation.head={name: factorized, layers: 2, heads: 2, hidden: 32}",
]


def build(std: float, overrides: list[str] = []) -> Janus:  # noqa: B006 - it is only read
    """Build a tiny model. Of weights near 0, the noise alone decides, and all drafts but the first are right;
    of large weights, each code changes all that follow.
    """
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(load("model/tiny", overrides), ModelConfig))
    with torch.no_grad():
        for weight in assembly.model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=std)
    return Janus.of(assembly)


@pytest.fixture(
    scope="module", params=[(0.02, []), (0.3, []), (0.15, TWO_CODES)], ids=["near 0", "large", "two codes"]
)
def janus(request: pytest.FixtureRequest) -> Janus:
    return build(*request.param)


class CountingSession(SessionWrapper):
    """Counts the passes of the backbone after the prompts, and keeps the lengths that rows were cut to."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        self.passes, self.cuts = 0, list[list[int]]()

    def extend(self, x: Any, counts: Any = None) -> Any:
        self.passes += 1
        return super().extend(x, counts)

    def step(self, x: Any, active: Any = None) -> Any:
        self.passes += 1
        return super().step(x, active)

    def truncate(self, lengths: Any) -> None:
        self.cuts.append([*lengths])
        super().truncate(lengths)


def codes_of(janus: Janus, settings: DrawSettings, texts: list[str] = TEXTS) -> tuple[Any, CountingSession]:
    prompts = [janus.processor.draw_prompt(text) for text in texts]
    positions = max(map(len, prompts)) + janus.model.generation.num_tokens
    session = CountingSession(janus.runtime.open(positions))
    sampler = parallel if isinstance(settings, ParallelSettings) else autoregressive
    steps = sampler.draw(session, prompts, settings)  # type: ignore[arg-type]
    progress = []
    while True:
        try:
            progress.append(next(steps))
        except StopIteration as stop:
            assert progress == sorted(progress)
            assert progress[-1] == (CODES, CODES)
            return stop.value.encoded, session


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_codes_are_those_of_drawing_one_by_one(janus: Janus, guidance: float, temperature: float) -> None:
    for seed in range(3 if temperature else 1):
        common: Any = {"guidance": guidance, "temperature": temperature, "seed": seed}
        expected, one_by_one = codes_of(janus, DrawSettings(**common))
        codes, session = codes_of(janus, ParallelSettings(**common))
        np.testing.assert_array_equal(codes, expected)
        assert session.passes <= one_by_one.passes == CODES - 1


def test_fewer_passes_where_drafts_are_right() -> None:
    """With weights near 0, what a pass chooses behind a wrong draft is right: all but first drafts."""
    _, session = codes_of(build(0.02), ParallelSettings(window=8), ["a"])
    assert session.passes <= CODES // 2
    confirmed_per_image = np.diff([cut[0] for cut in session.cuts])
    assert confirmed_per_image.max() > 1


def test_rows_of_a_batch_accept_different_counts() -> None:
    janus = build(0.05)
    _, session = codes_of(janus, ParallelSettings(window=8, guidance=1.0))
    accepted = np.diff(session.cuts, axis=0)  # (passes, images)
    assert (accepted.min(axis=1) < accepted.max(axis=1)).any()
    assert (accepted[-1] == 0).any()  # an image was done before the last
    alone = [codes_of(janus, ParallelSettings(window=8, guidance=1.0), [text])[1].passes for text in TEXTS]
    assert session.passes == max(alone)


def test_any_window_and_any_drafts_draw_the_same(janus: Janus) -> None:
    expected, _ = codes_of(janus, DrawSettings(seed=5))
    for window, drafts in [(1, "above"), (2, "left"), (16, "above"), (40, "left")]:
        codes, session = codes_of(janus, ParallelSettings(seed=5, window=window, drafts=drafts))  # type: ignore[arg-type]
        np.testing.assert_array_equal(codes, expected)
        assert window > 1 or session.passes == CODES - 1


@pytest.mark.parametrize("length", [1, 5, 15])
def test_a_prefix_is_continued_the_same(janus: Janus, length: int) -> None:
    prefix = codes_of(janus, DrawSettings(seed=1), ["a"])[0][0][:length]
    expected, _ = codes_of(janus, DrawSettings(seed=5, prefix=prefix))
    codes, _ = codes_of(janus, ParallelSettings(seed=5, prefix=prefix))
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(codes[:, :length], np.stack([prefix] * len(TEXTS)))


@given(st.data())
def test_confirmed_counts_as_a_plain_loop_does(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 6))
    row = st.lists(st.integers(0, 2), min_size=2 * width - 1, max_size=2 * width - 1)
    rows = data.draw(st.lists(st.tuples(st.integers(0, width), row), min_size=1, max_size=4))
    expected = []
    for count, ids in rows:
        right = 0
        for position in range(count):  # the choice behind the last known id is right, in any case
            if position and ids[position - 1] != ids[width - 1 + position - 1]:
                break
            right += 1
        expected.append(right)
    ids = np.array([ids for _, ids in rows])
    counts = np.array([count for count, _ in rows])
    assert confirmed(ids[:, : width - 1], ids[:, width - 1 :], counts).tolist() == expected


def test_noise_of_a_window_is_that_of_its_positions() -> None:
    def rngs() -> list[np.random.Generator]:
        return [np.random.default_rng((3, i)) for i in range(2)]

    one_by_one = rngs()
    expected = np.stack([exponential_noise(one_by_one, 5) for _ in range(9)], axis=1)  # (rows, 9, 5)
    noise = NoiseWindow(rngs(), 5, greedy=False)
    for starts, counts in [([2, 0], [3, 1]), ([3, 0], [3, 3]), ([4, 6], [0, 3]), ([8, 6], [1, 3])]:
        window = noise.read(np.array(starts), np.array(counts), 3)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            np.testing.assert_array_equal(window[row, :count], expected[row, start : start + count])
            assert (window[row, count:] == 1).all()


def test_unsupported_sessions_raise() -> None:
    janus = build(0.1)
    prompt = janus.processor.draw_prompt("a")

    def refused(message: str, *, sizes: Any = None, settings: Any = None, **attributes: Any) -> None:
        session = janus.runtime.open(len(prompt) + CODES)
        session.sizes = session.sizes if sizes is None else sizes
        for name, value in attributes.items():
            setattr(session, name, value)
        with pytest.raises(PromptError, match=message):
            next(parallel.draw(session, [prompt], settings or ParallelSettings()))

    refused("recurrent layers, whose states cannot be cut back: choose the sampler 'autoreg", has_states=True)
    refused(r"window: found 4; expected 3 at most.*built to take at once", max_feed=3)
    refused(r"draws codes; found a model whose sizes are encoded_shape", sizes={"encoded_shape": [1]})
    refused(r"export the model again, or set drafts=left", sizes={"codes": 64, "codebooks": [64]})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"window": 0}, "window: found 0; expected a whole number from 1"),
        ({"window": 2.0}, "window: found 2.0"),
        ({"drafts": "below"}, "drafts: found 'below'; expected 'above' or 'left'"),
        ({"guidance": "much"}, "guidance"),
    ],
)
def test_settings_are_checked(setting: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        ParallelSettings(**setting)


@pytest.mark.proof
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_thousand_seeds_draw_the_same(guidance: float) -> None:
    """In float32: W positions at once are summed in another order than one, which decides near ties alone."""
    janus = build(0.15)
    for first in range(0, 1000, 50):
        common: Any = {"guidance": guidance, "seed": 11, "numbers": range(first, first + 50)}
        expected, _ = codes_of(janus, DrawSettings(**common), ["a"] * 50)
        codes, _ = codes_of(janus, ParallelSettings(**common), ["a"] * 50)
        np.testing.assert_array_equal(codes, expected)

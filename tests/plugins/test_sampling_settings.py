"""Settings of the built-in samplers are checked as the numbers that are computed with."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from janus_modular import Janus, PromptError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_plugins.samplers.autoregressive import DrawSettings
from janus_plugins.samplers.noise import LEAST, exponential_noise
from janus_plugins.samplers.text import TextSettings

NAN, INF = float("nan"), float("inf")
NO_NUMBERS: list[Any] = [NAN, INF, -INF, True, False, "1", None, [1], 1j, np.array([1.0]), 10**400]


@pytest.fixture(scope="module")
def janus() -> Janus:
    torch.manual_seed(0)
    return Janus.of(ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig)))


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1e-40, 1e-7, 5e-324, 1e39, -1, -1e-50, Fraction(1, 10**60)])
@pytest.mark.parametrize("settings", [TextSettings, DrawSettings])
def test_invalid_temperature_is_an_error(settings: type, value: Any) -> None:
    with pytest.raises(PromptError, match=r"temperature: found .*; expected 0, which is greedy"):
        settings(temperature=value)


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1e39, -1e39, 1e7, -2e6])
def test_guidance_that_overflows_is_an_error(value: Any) -> None:
    with pytest.raises(PromptError, match=r"guidance: found .*; expected a number from"):
        DrawSettings(guidance=value)


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 0.0, 1e-50, 1e-40, 1.1, -0.5, 2])
def test_invalid_top_p_is_an_error(value: Any) -> None:
    with pytest.raises(PromptError, match=r"top_p: found .*; expected a number above 0"):
        TextSettings(top_p=value)


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        *((TextSettings, "top_k", value) for value in (2**63, 2**64, -1, 2.0, True, "5", NAN, None)),
        *((TextSettings, "max_tokens", value) for value in (0, -3, 2.5, True, INF, "9", None)),
        *((item, "seed", value) for item in (TextSettings, DrawSettings) for value in (-1, 0.5, True, NAN)),
        *((DrawSettings, "first", value) for value in (-1, 1.0, False, np.float32(1))),
    ],
)
def test_invalid_integers_are_errors(settings: type, name: str, value: Any) -> None:
    with pytest.raises(PromptError, match=rf"{name}: found .*; expected a whole number from"):
        settings(**{name: value})


def test_numbers_of_other_types_become_python_numbers() -> None:
    settings = DrawSettings(guidance=np.float16(2), temperature=Fraction(1, 2), seed=np.uint8(250))
    assert (settings.guidance, settings.temperature, settings.seed + 10) == (2.0, 0.5, 260)
    assert [type(x) for x in (settings.guidance, settings.temperature, settings.seed)] == [float, float, int]


def test_bounds_are_allowed() -> None:
    TextSettings(temperature=1e-6, top_k=2**63 - 1, top_p=1, max_tokens=10**40, seed=10**40)
    DrawSettings(guidance=-1e6, temperature=3e38)


@given(
    temperature=st.floats(1e-6, 3e38) | st.just(0.0),
    top_p=st.floats(2e-38, 1),
    top_k=st.integers(0, 2**63 - 1),
    scale=st.sampled_from([1e-30, 1.0, 1e4, 1e30]),
)
def test_allowed_settings_sample_likely_tokens(
    janus: Janus, temperature: float, top_p: float, top_k: int, scale: float
) -> None:
    settings = TextSettings(temperature=temperature, top_p=top_p, top_k=top_k)
    logits = torch.linspace(-scale, scale, 99).repeat(2, 1)
    model = SimpleNamespace(
        backbone=SimpleNamespace(logits=lambda x: logits, embed=lambda ids: ids[..., None])
    )
    noise = torch.from_numpy(exponential_noise([np.random.default_rng(i) for i in range(2)], 99))
    divisor = np.float32(settings.temperature or 1)
    ids, _ = type(janus.model).sample_text(
        model,
        torch.zeros(2, 1),
        noise,
        torch.tensor(divisor),
        settings.top_k,
        settings.top_p,
        torch.tensor([98]),
    )
    assert ((ids >= 0) & (ids < 98)).all()


@given(guidance=st.floats(-1e6, 1e6, width=32), temperature=st.floats(1e-6, 3e38))
def test_allowed_settings_draw_codes(janus: Janus, guidance: float, temperature: float) -> None:
    settings = DrawSettings(guidance=guidance, temperature=temperature)
    path = janus.model.generation
    noise = torch.from_numpy(exponential_noise([np.random.default_rng(0)], path.sizes["codes"]))
    hidden = torch.randn(2, janus.model.backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    guided = (torch.tensor(np.float32(item)) for item in (settings.guidance, settings.temperature))
    with torch.no_grad():
        codes, x = path.sample_image(1e3 * hidden, noise, *guided)
    assert ((codes >= 0) & (codes < path.sizes["codes"])).all()
    assert x.isfinite().all()


class Zeros:
    """A generator at its worst: numpy's returns 0 once in 8 million float32 numbers."""

    def standard_exponential(self, width: int, dtype: Any) -> Any:
        return np.zeros(width, dtype)


def test_noise_is_never_zero() -> None:
    assert (exponential_noise([Zeros(), Zeros()], 7) == LEAST).all()
    rng = np.random.default_rng(5)
    drawn = np.concatenate([rng.standard_exponential(10**7, np.float32) for _ in range(2)])
    assert (drawn == 0).any()  # what this is about
    assert drawn[drawn > 0].min() * 4 > LEAST


def test_noise_above_the_minimum_is_unchanged() -> None:
    expected = np.stack(
        [np.random.default_rng((3, row)).standard_exponential(99, np.float32) for row in (0, 1)]
    )
    np.testing.assert_array_equal(
        exponential_noise([np.random.default_rng((3, row)) for row in (0, 1)], 99), expected
    )


@pytest.mark.parametrize("value", [0, -1, 2.5, True, NAN, "2", None])
@pytest.mark.parametrize("name", ["n", "batch_size"])
def test_counts_of_images_must_be_integers(janus: Janus, name: str, value: Any) -> None:
    with pytest.raises(PromptError, match=rf"{name}: found .*; expected a whole number from 1"):
        janus.draw("a", **{name: value})


def test_huge_integer_is_an_error() -> None:
    with pytest.raises(PromptError, match=r"top_k: found a whole number of \d+ bits; expected"):
        TextSettings(top_k=10**5000)

"""What checks say of a component that returns NaN, or numbers of the wrong type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from janus_modular.plugins import default_plugins
from janus_modular.testing import checks_of, run_check
from janus_modular.testing.fixtures import context


def note_of(slot: str, component: str, check: str, around: Callable[[Any], Any], method: str) -> str:
    """Return what a check says of a built-in component whose method's results are changed."""
    make = context(default_plugins(), slot, component)

    def changed() -> tuple[Any, Any]:
        made, example = make()
        old = getattr(made, method)
        vars(made)[method] = lambda *arguments, **options: around(old(*arguments, **options))
        return made, example

    [chosen] = [each for each in checks_of(slot) if each.name == check]
    result = run_check(chosen, changed, slot=slot)
    assert result.outcome == "failed"
    return result.note


@pytest.mark.parametrize("check", ["deterministic", "batch_invariance"])
def test_an_output_with_nan_is_not_finite(check: str) -> None:
    note = note_of(
        "understanding_encoders", "vit", check, lambda features: features * float("nan"), "forward"
    )
    assert "the output is not finite" in note
    assert "differ" not in note


def test_a_number_of_numpy_is_no_array() -> None:
    def scalars(example: dict[str, Any]) -> dict[str, Any]:
        return {**example, "turn": np.int64(1)}

    note = note_of("objectives", "sigmoid-contrastive", "objective_examples", scalars, "example")
    assert "'turn' is of type int64; expected a numpy array: np.asarray(x)" in note

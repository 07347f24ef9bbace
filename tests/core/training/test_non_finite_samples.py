"""A loss that is not finite: the message names the samples, and a page shows them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_modular import TrainingError
from janus_modular.model.model import Understanding
from janus_modular.training import non_finite_samples
from janus_modular.training.engine import NonFiniteLossError
from janus_modular.training.train import train

from .conftest import Make, Rank


@pytest.fixture
def breaks_on_white(monkeypatch: pytest.MonkeyPatch) -> None:
    """White input images have features that are NaN, as a broken image may."""
    forward = Understanding.forward

    def broken(self: Understanding, pixels: torch.Tensor) -> torch.Tensor:
        white = (pixels > 240).flatten(1).all(1)
        return torch.where(white[:, None, None], float("nan"), forward(self, pixels))

    monkeypatch.setattr(Understanding, "forward", broken)


@pytest.mark.usefixtures("breaks_on_white")
def test_samples_are_named_and_shown(make: Make):
    config = make(mixture={"read": 4, "draw": 0, "text": 2}, batch=6)
    with pytest.raises(NonFiniteLossError, match="step 0: not finite: loss") as caught:
        train(config, quiet=True)
    message = "\n".join(caught.value.__notes__)
    assert "not finite, alone too: sample 3 of source 'read'. See the pages in" in message
    assert "first component" not in message  # each component returns finite values for finite inputs
    page = (Path(config.output) / "non_finite" / "step-0000000.html").read_text("utf-8")
    assert len(re.findall("<section>", page)) == 1
    assert "white" in page
    assert "data:image/png;base64," in page


@pytest.mark.usefixtures("breaks_on_white")
@pytest.mark.parametrize("parallel", [{}, {"backbone": "fsdp", "understanding.encoder": "fsdp"}], ids=str)
def test_samples_of_other_processes_are_named_too(
    make: Make, ranks: Callable[..., list[Rank]], parallel: dict[str, str]
):
    config = make(mixture={"read": 4, "draw": 0, "text": 2}, batch=6, parallel=parallel)
    outcomes = ranks(2, lambda rank: train(config, quiet=True))
    for outcome in outcomes:
        assert outcome.error.startswith("NonFiniteLossError: step 0: not finite: loss")
        assert "alone too: sample 3 of source 'read'." in outcome.error
    [page] = (Path(config.output) / "non_finite").iterdir()
    assert re.fullmatch(r"step-0000000-rank[01].html", page.name)


def test_samples_that_are_finite_alone_are_not_accused(make: Make, monkeypatch: pytest.MonkeyPatch):
    """An infinite gradient alone: of a loss that is finite."""
    losses = "janus_modular.training.train.step_losses"
    original = __import__("janus_modular.training.objective", fromlist=["step_losses"]).step_losses

    def steep(*arguments: Any) -> Any:
        for loss in original(*arguments):
            loss.value = loss.value + (loss.value - loss.value.detach()) * float("inf")
            loss.value = torch.where(loss.value.isnan(), loss.value.detach().nan_to_num(), loss.value)
            yield loss

    monkeypatch.setattr(losses, steep)
    with pytest.raises(NonFiniteLossError) as caught:
        train(make(), quiet=True)
    assert "Each of the step's samples has finite losses alone" in "\n".join(caught.value.__notes__)


@pytest.mark.usefixtures("breaks_on_white")
def test_a_failing_search_does_not_hide_the_error(make: Make, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(non_finite_samples, "write_text", full)
    with pytest.raises(TrainingError, match="step 0: not finite: loss") as caught:
        train(make(mixture={"read": 4, "draw": 0, "text": 2}, batch=6), quiet=True)
    assert "The samples of the step could not be searched: no space left" in "\n".join(caught.value.__notes__)

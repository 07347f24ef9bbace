"""Each check fails for a component that violates its rule."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from janus_modular import PixelSpec
from janus_modular.registry import SLOTS
from janus_modular.testing import (
    NotApplicable,
    SamplingExample,
    check_for,
    checks_of,
    contracts,
    ensure,
    run_check,
)
from janus_modular.testing.examples import NumpySession, prompt


@dataclass
class Config:
    """Of the encoder below."""

    width: int = 4
    sides: tuple[int, int] = (2, 2)


class Encoder(nn.Module):
    """A good encoder; its subclasses each break one promise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = Config()
        self.feature_dim, self.pixels = 4, PixelSpec(height=8, width=8)
        self.cut = nn.Conv2d(3, 4, 4, stride=4)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 4, width // 4

    def forward(self, pixels: Tensor) -> Tensor:
        return self.cut(pixels).flatten(2).transpose(1, 2)


class TooMany(Encoder):
    def grid(self, height: int, width: int) -> tuple[int, int]:
        return 1, 5


class Mixes(Encoder):
    def forward(self, pixels: Tensor) -> Tensor:
        x = super().forward(pixels)
        return x - x.mean(0)


class Random(Encoder):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels) + torch.rand(())


class Writes(Encoder):
    def forward(self, pixels: Tensor) -> Tensor:
        pixels.clamp_(0, 0.5)
        return super().forward(pixels)


class Counts(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return super().forward(pixels)


class Detached(Encoder):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels).detach()


class Idle(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.unexpected_keys = nn.Linear(2, 2)


class OnTheCpu(Encoder):
    def forward(self, pixels: Tensor) -> Tensor:
        x = super().forward(pixels)
        return x.new_zeros(()).to("cpu") + torch.zeros(x.shape)


class Float32(Encoder):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels).float()


class KnowsItsRows(Encoder):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels).reshape(len(pixels), 4, 4)


class Branches(Encoder):
    def forward(self, pixels: Tensor) -> Tensor:
        x = super().forward(pixels)
        return x if float(pixels.sum()) > 0 else -x


def factory(encoder: type[Encoder]) -> Callable[[], tuple[Encoder, Tensor]]:
    return lambda: (encoder(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def outcomes(encoder: type[Encoder]) -> dict[str, str]:
    checks = [
        one for one in checks_of("understanding_encoders") if not one.slow and one.name != "onnx_parity"
    ]
    results = [run_check(check, factory(encoder), slot="understanding_encoders") for check in checks]
    return {result.check: result.outcome for result in results}


def test_a_good_encoder_passes_them_all() -> None:
    assert set(outcomes(Encoder).values()) == {"passed"}


@pytest.mark.parametrize(
    ("encoder", "broken"),
    [
        (TooMany, {"encoder_sizes"}),
        (Mixes, {"batch_invariance"}),
        (Random, {"deterministic", "batch_invariance", "exports"}),
        (Writes, {"deterministic"}),
        (Counts, {"deterministic"}),
        (Detached, {"gradients"}),
        (Idle, {"gradients"}),
        (OnTheCpu, {"meta_device"}),
        (Float32, {"half_precision"}),
        (KnowsItsRows, {"exports"}),
        (Branches, {"exports", "meta_device"}),
    ],
)
def test_a_violated_interface_fails_its_check(encoder: type[Encoder], broken: set[str]) -> None:
    found = {name for name, outcome in outcomes(encoder).items() if outcome == "failed"}
    assert broken <= found


def test_what_is_frozen_keeps_no_gradient_and_passes_it_on() -> None:
    check = named("frozen")
    slot = "understanding_encoders"
    assert run_check(check, factory(Encoder), slot=slot).outcome == "passed"
    assert run_check(check, factory(Detached), slot=slot).outcome == "skipped"


def test_expected_failures_have_to_fail() -> None:
    check = named("batch_invariance")
    reasons, slot = {check.name: "by design"}, "understanding_encoders"
    mixes, good = (run_check(check, factory(one), reasons, slot=slot) for one in (Mixes, Encoder))
    assert (mixes.outcome, mixes.note) == ("expected", "by design")
    assert (good.outcome, good.note) == ("failed", "it passes, and was expected to fail: by design")


def named(name: str, slot: str = "understanding_encoders") -> Any:
    return next(check for check in checks_of(slot) if check.name == name)


def endless(session: Any, prompts: Any, settings: Any) -> Any:
    hidden = session.prefill(prompts)
    while True:
        yield hidden[:, 0] * np.random.rand()
        hidden = session.step(hidden)


def asks_for_more(session: Any, prompts: Any, settings: Any) -> Any:
    yield session.run("velocity", session.prefill(prompts))


def asks_for_another_size(session: Any, prompts: Any, settings: Any) -> Any:
    yield session.prefill(prompts)[:, : session.sizes["patches"]]


def misspells_a_key(session: Any, prompts: Any, settings: Any) -> Any:
    yield session.prefill(prompts)[:, {"width": 0}["widht"]]


def counts_too_far(session: Any, prompts: Any, settings: Any) -> Any:
    yield [session.prefill(prompts)][1]


def test_checks_find_broken_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("janus_modular.testing.system_checks.STEPS", 5)
    example = SamplingExample(None, [prompt(1, 2), prompt(3)], NumpySession)

    def outcome(check: str, sampler: Any) -> tuple[str, str]:
        result = run_check(named(check, "text_samplers"), lambda: (sampler, example))
        return result.outcome, result.note

    assert outcome("sampler_ends", endless) == ("failed", "it has not ended after 5 steps")
    assert outcome("sampler_ends", asks_for_more) == (
        "skipped",
        "the example's session has no graph 'velocity': pass a session that has it",
    )
    assert outcome("sampler_ends", asks_for_another_size)[0] == "skipped"
    assert outcome("sampler_ends", misspells_a_key) == ("failed", "KeyError: 'widht'")
    assert outcome("sampler_ends", counts_too_far)[0] == "failed"


class ReadsOneCode(nn.Module):
    """A head for three codes whose logits follow one of those that are known, and no other."""

    codebooks = (5, 4, 3)

    def __init__(self, read: int) -> None:
        super().__init__()
        self.read = read

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        known = before.shape[-1]
        logits = hidden[..., : self.codebooks[known]]
        return logits + before[..., [min(self.read, known - 1)]] if known else logits


@pytest.mark.parametrize(("read", "missed"), [(0, "code 3 does not depend on code 2"), (1, "on code 1")])
def test_a_head_that_reads_one_of_the_codes_before_is_found(read: int, missed: str) -> None:
    result = run_check(named("head_order", "heads"), lambda: (ReadsOneCode(read), torch.rand(2, 3, 8)))
    assert result.outcome == "failed"
    assert missed in result.note


class Careless:
    """A source that breaks every promise."""

    def __len__(self) -> int:
        return 3

    def sample(self, index: int, rng: np.random.Generator) -> float:
        return float(np.random.rand())


def test_a_careless_source_fails_every_check() -> None:
    results = [run_check(check, lambda: (Careless(), [0, 1])) for check in checks_of("sources")]
    assert {result.outcome for result in results} == {"failed"}
    assert any("global random generator" in result.note for result in results)


def test_every_slot_has_a_contract_and_every_check_says_what_it_promises() -> None:
    classes = [
        one
        for one in vars(contracts).values()
        if isinstance(one, type) and issubclass(one, contracts.Contract)
    ]
    assert {one.slot for one in classes if one.slot} == set(SLOTS)
    for slot in SLOTS:
        assert checks_of(slot)
        for check in checks_of(slot):
            assert check.promise.endswith(".")


def test_two_checks_of_one_name_are_an_error() -> None:
    from janus_modular import PluginError

    def check_batch_invariance(component: Any, example: Any) -> None:
        """Another one."""

    with pytest.raises(PluginError, match="two checks are called 'batch_invariance'"):
        check_for("adaptors")(check_batch_invariance)


def test_a_check_of_several_slots_needs_the_slot() -> None:
    result = run_check(named("batch_invariance"), factory(Encoder))
    assert result.outcome == "failed"
    assert "needs a slot of understanding_encoders, image_tokenizers" in result.note


def test_a_check_that_does_not_apply_says_why() -> None:
    def run(component: Any, example: Any) -> None:
        raise NotApplicable("no such thing here")

    from janus_modular.testing import Check

    result = run_check(Check("x", run, ("adaptors",)), factory(Encoder))
    assert (result.outcome, result.note) == ("skipped", "no such thing here")


TESTS = """
import torch
from torch import nn
from janus_modular.testing import AdaptorContract, parametrize_with_checks

class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = None
    def num_tokens(self, grid):
        return grid[0] * grid[1]
    def forward(self, x, grid):
        return x / 2

def make():
    return Halves(), torch.rand(2, 2, 2, 6)

class TestHalves(AdaptorContract):
    expected_failures = {"config_round_trip": "it has no options", "adaptor_sizes": "an old reason"}
    def make(self):
        return make()

@parametrize_with_checks(
    "adaptors", {"halves": make}, expected_failures={"halves": {"config_round_trip": "it has no options"}}
)
def test_again(component, check):
    check(component)
"""


@pytest.mark.slow
def test_under_pytest_as_an_author_has_it(tmp_path: Path) -> None:
    """One expected failure each way, and one that passes after all, which is a failure."""
    (tmp_path / "test_halves.py").write_text(TESTS)
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "config or sizes"]
    line += ["-W", "error::pytest.PytestUnknownMarkWarning", "--strict-markers"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 1 passed" in done.stdout
    assert "2 xfailed" in done.stdout
    assert "[XPASS(strict)] an old reason" in done.stdout


def test_the_pytest_plugin_imports_pytest_alone() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import janus_modular.testing.pytest_plugin\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['janus_modular', 'lazy_loader']"


def test_a_misspelt_expected_failure_is_an_error() -> None:
    from janus_modular.errors import CheckError

    with pytest.raises(CheckError, match=r"no check 'batch_invarianse'\. Did you mean 'batch_invariance'"):

        class TestMine(contracts.AdaptorContract):
            expected_failures = {"batch_invarianse": "why"}  # noqa: RUF012

    with pytest.raises(CheckError, match=r"names \['b'\]"):
        contracts.parametrize_with_checks(
            "adaptors", {"a": lambda: (None, None)}, expected_failures={"b": {}}
        )
    with pytest.raises(CheckError, match="it broke"):
        ensure(False, "it broke")

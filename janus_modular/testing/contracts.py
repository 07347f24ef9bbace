"""Contracts as pytest classes: a subclass makes a component, and the checks of its slot are test methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest

from janus_modular.errors import CheckError
from janus_modular.suggest import did_you_mean
from janus_modular.testing.check import Check, NotApplicable
from janus_modular.testing.running import Make, checks_of


def _method(check: Check, slot: str) -> Callable[..., None]:
    def test(self: Contract, request: pytest.FixtureRequest) -> None:
        if (reason := self.expected_failures.get(check.name)) is not None:
            request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        _runner(check, slot)(self.make)

    test.__name__ = f"test_{check.name}"
    test.__doc__ = check.promise
    return pytest.mark.slow(test) if check.slow else test


def _runner(check: Check, slot: str) -> Callable[[Make], None]:
    def run(make: Make) -> None:
        try:
            check(*make(), slot)
        except NotApplicable as reason:
            pytest.skip(str(reason))

    return run


def _check_names(failures: Mapping[str, str], slot: str) -> None:
    known: Sequence[str] = [check.name for check in checks_of(slot)] if failures else []
    for name in failures:
        if name not in known:
            raise CheckError(
                f"expected_failures: {slot} has no check '{name}'. {did_you_mean(name, known)}\n"
                f"Checks: {', '.join(known)}"
            )


class Contract:
    """The contract of a slot; each check of the slot is a test method, ``test_<check>``."""

    slot: ClassVar[str] = ""
    expected_failures: ClassVar[Mapping[str, str]] = {}
    """Names of checks that this component is known to fail, with reasons; such a check fails if it passes."""

    def __init_subclass__(cls, slot: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if slot:
            cls.slot = slot
            for check in checks_of(slot):
                setattr(cls, f"test_{check.name}", _method(check, slot))
        _check_names(cls.expected_failures, cls.slot)

    def make(self) -> Any:
        """Return a component and an example input; called for each check, which may change them."""
        raise NotImplementedError(f"{type(self).__name__} needs make(self) -> (component, example)")


class UnderstandingEncoderContract(Contract, slot="understanding_encoders"):
    """``make`` returns an encoder and normalised pixels (N, 3, H, W) of at least 2 images."""


class ImageTokenizerContract(Contract, slot="image_tokenizers"):
    """``make`` returns a tokenizer and pixels (N, 3, H, W) in its value range."""


class ImageAutoencoderContract(Contract, slot="image_autoencoders"):
    """``make`` returns an autoencoder and pixels (N, 3, H, W) in its value range."""


class AdaptorContract(Contract, slot="adaptors"):
    """``make`` returns an adaptor and features in their grid (N, rows, columns, C)."""


class HeadContract(Contract, slot="heads"):
    """``make`` returns a head and hidden states (B, T, D)."""


class BackboneContract(Contract, slot="backbones"):
    """``make`` returns a backbone and token ids (B, T), of at least 2 rows and 4 positions."""


class GenerationPathContract(Contract, slot="generation"):
    """``make`` returns a path and images (N, 3, height, width), uint8."""


class TextSamplerContract(Contract, slot="text_samplers"):
    """``make`` returns a sampler and a `SamplingExample`."""


class ImageSamplerContract(Contract, slot="image_samplers"):
    """``make`` returns a sampler and a `SamplingExample`."""


class SourceContract(Contract, slot="sources"):
    """``make`` returns a source and a few indices of samples."""


class ObjectiveContract(Contract, slot="objectives"):
    """``make`` returns an objective and an example: ``on_tiny_model(factory, config)`` returns both."""


class TrackerContract(Contract, slot="trackers"):
    """``make`` returns a function that opens the tracker in a folder, and named values to log."""


class CheckpointFormatContract(Contract, slot="formats"):
    """``make`` returns a format and a `CheckpointFormatExample`."""


class SchedulerContract(Contract, slot="schedulers"):
    """``make`` returns a scheduler and a number of rows, 3 or more."""


class RuntimeContract(Contract, slot="runtimes"):
    """``make`` returns a runtime and a few prompts."""


def parametrize_with_checks(
    slot: str,
    components: Mapping[str, Make],
    *,
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
) -> pytest.MarkDecorator:
    """Parametrize a test ``(component, check)`` over components and the checks of their slot.

    ``components`` maps a name to a function that returns a component and an example;
    ``expected_failures`` maps a name to checks that are known to fail there, each with the reason::

        @parametrize_with_checks("adaptors", {"wide": make_wide}, expected_failures={})
        def test_adaptors(component, check):
            check(component)
    """
    known = dict(expected_failures or {})
    if unknown := sorted(set(known) - set(components)):
        raise CheckError(f"expected_failures names {unknown}; the components are {sorted(components)}")
    for failures in known.values():
        _check_names(failures, slot)
    rows = []
    for name, make in components.items():
        for check in checks_of(slot):
            reason = known.get(name, {}).get(check.name)
            marks = [pytest.mark.slow] if check.slow else []
            if reason is not None:
                marks.append(pytest.mark.xfail(reason=reason, strict=True))
            rows.append(pytest.param(make, _runner(check, slot), marks=marks, id=f"{name}-{check.name}"))
    return pytest.mark.parametrize(("component", "check"), rows)

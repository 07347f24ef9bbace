"""Prove that a bundle does what its model does: a ladder of gates, from the files up to whole drawings.

A gate takes a `Subject` and yields `Check`s: what was looked at, what was found, what was wanted. Gates are
independent, so that one that fails does not hide the next. Results go into the bundle's manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from janus_export import (
    verify_engines,
    verify_files,
    verify_layers,
    verify_numbers,
    verify_rounded,
    verify_runs,
)
from janus_export.bundle import Bundle, load_bundle
from janus_export.errors import BundleError
from janus_export.on_disk import float32_bytes, free_bytes
from janus_export.verify_lean import LeanReference
from janus_export.verify_subject import Check, Reference, Subject
from janus_modular.checkpoints.opening import describe
from janus_modular.suggest import did_you_mean

Gate = Callable[[Subject], Iterable[Check]]

GATES: dict[str, Gate] = {
    "checker": verify_files.checker,
    "lint": verify_files.lint,
    "sizes": verify_files.sizes,
    "graphs": verify_numbers.graphs,
    "rows": verify_numbers.rows,
    "cache": verify_numbers.cache,
    "engines": verify_engines.engines,
    "range": verify_rounded.activations,
    "rounding": verify_rounded.forced,
    "answer": verify_runs.answer,
    "drawing": verify_runs.drawing,
}
"""In the order in which they are tried; each says itself to which variants it applies."""

LAYER_GATES: dict[str, Gate] = {
    **{name: GATES[name] for name in ("checker", "lint", "sizes", "engines")},
    "parts": verify_layers.parts,
    "layers": verify_layers.layers,
}
"""Those of a model that does not fit into memory."""


@dataclass(frozen=True)
class Report:
    """What came of a variant."""

    variant: str
    how: str  # what ran, and on what
    checks: dict[str, list[Check]]  # by gate
    not_run: tuple[str, ...] = ()  # gates that need more memory than there was

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(check.passed for checks in self.checks.values() for check in checks)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        checks = {gate: [asdict(check) for check in checks] for gate, checks in self.checks.items()}
        return {
            "variant": self.variant,
            "passed": self.passed,
            "how": self.how,
            "not_run": list(self.not_run),
            "gates": checks,
        }


def verify(
    folder: str | Path,
    against: str | Path,
    *,
    variants: Iterable[str] = (),
    runtime: str = "onnx",
    device: str = "auto",
    gates: Iterable[str] = (),
    layers: bool | None = None,
    tell: Callable[[str, str], None] = lambda variant, gate: None,
) -> list[Report]:
    """Hold variants of a bundle (default: all) against the model they were made from, in torch and float32.

    ``runtime`` is what users are to run: every gate that computes does so in it, those before look at the
    ONNX graphs. One that has ``evidence`` (which engines, on which GPU) gets an entry in the manifest's
    ``executed``. ``gates``: some of them only, in which case nothing is recorded. ``layers``: layer by layer,
    in the memory of one of them; None: where the whole does not fit.

    Raises:
        BundleError: the bundle is damaged, so that there is nothing to verify; or a gate is unknown.
    """
    bundle = load_bundle(folder)
    wanted = list(variants) or bundle.variants
    bundle.verify_weights(_weights(bundle, wanted))
    lack = "as asked" if layers else lack_of_memory(against) if layers is None else None
    ladder = LAYER_GATES if lack else GATES
    chosen = list(gates)
    for name in chosen:
        if name not in ladder:
            raise BundleError(
                f"no gate{' of those that go layer by layer' if lack else ''} is called '{name}'."
                f" {did_you_mean(name, ladder)}\nGates: {', '.join(ladder)}"
            )
    if lack and (runtime != "onnx" or device not in ("auto", "cpu")):
        raise BundleError(
            f"layer by layer ({lack}) it is verified by ONNX Runtime on the CPU: leave --runtime and --device"
            " out, or say --whole"
        )
    reference = LeanReference.opened(describe(against)) if lack else Reference.of(against)
    reports = []
    for variant in wanted:
        with Subject.of(bundle, variant, reference, runtime=runtime, device=device) as subject:
            checks = {}
            for gate in chosen or ladder:
                tell(variant, gate)
                checks[gate] = list(_tried(ladder[gate], subject))
            how = f"layer by layer ({lack}), {subject.how}" if lack else subject.how
            found = {gate: results for gate, results in checks.items() if results}
            report = Report(variant, how, found, tuple(gate for gate in GATES if gate not in ladder))
            evidence = getattr(subject.whole, "evidence", None)
        reports.append(report)
        if not chosen:
            _record(bundle, variant if runtime == "onnx" else f"{variant} {runtime}", report, evidence)
    return reports


def _weights(bundle: Bundle, variants: Iterable[str]) -> list[str]:
    """List the weights of variants, which no gate could tell from slightly different ones."""
    for variant in variants:
        bundle.path("backbone", variant)  # says which variants there are, if this is none
    records = bundle.manifest["variants"]
    return sorted({name for variant in variants for name in records[variant]["weights"]})


def _record(bundle: Bundle, key: str, report: Report, evidence: Mapping[str, str] | None) -> None:
    told: dict[str, Any] = {
        "passed": report.passed,
        "how": report.how,
        "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    gates = {gate: _summary(found) for gate, found in report.checks.items()}
    not_run = {"not_run": list(report.not_run)} if report.not_run else {}
    bundle.record("parity", key, {**told, "gates": gates, **not_run})
    if evidence:
        engines = evidence["engines"]
        bundle.record("executed", engines, {**told, **evidence})
        bundle.record("built", engines, {**bundle.manifest["built"][engines], "executed": report.passed})


def lack_of_memory(against: str | Path) -> str | None:
    """Say what is missing to verify a model as a whole: once in torch and once in a runtime, in float32."""
    wanted, free = 2 * float32_bytes(describe(against)), free_bytes()
    if free is None or wanted <= free:
        return None
    return f"as a whole it takes {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def _tried(gate: Gate, subject: Subject) -> Iterator[Check]:
    try:
        yield from gate(subject)
    except Exception as error:  # a graph that does not even run has failed, and the ladder goes on
        yield Check("runs", False, f"{type(error).__name__}: {error}".split("\n")[0][:300], "no error")


def _summary(checks: list[Check]) -> str:
    failed = [f"{check.what}: {check.found}, wanted {check.wanted}" for check in checks if not check.passed]
    return "; ".join(failed) or f"{len(checks)} passed"

"""Verification of a bundle against its checkpoint, by a sequence of gates, from files to whole images.

A gate is a function that takes a `VerificationTarget` and yields `CheckResult`s: name, measured and expected
value of each comparison. All gates run, also after a failure. The manifest records the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from textwrap import shorten
from typing import Any

from janus_export.bundle.bundle import MANIFEST, Bundle, load_bundle
from janus_export.bundle.source import describe_source, difference
from janus_export.errors import BundleError
from janus_export.gates import end_to_end, engines, files, graphs, layerwise, quantized
from janus_export.reference.on_disk import float32_bytes, free_bytes
from janus_export.reference.streamed import StreamedReference
from janus_export.reference.target import CheckResult, Reference, VerificationTarget
from janus_export.runtimes.contract import GivesEvidence
from janus_modular import arguments
from janus_modular.bundles import DIGESTS, digest_of
from janus_modular.checkpoints.merging import merge_adapters
from janus_modular.checkpoints.opening import open_lazily
from janus_modular.suggest import did_you_mean

Gate = Callable[[VerificationTarget], Iterable[CheckResult]]

GATES: dict[str, Gate] = {
    "checker": files.checker,
    "lint": files.lint,
    "sizes": files.sizes,
    "graphs": graphs.graphs,
    "rows": graphs.rows,
    "cache": graphs.cache,
    "engines": engines.engines,
    "range": quantized.activations,
    "rounding": quantized.teacher_forced,
    "answer": end_to_end.answer,
    "drawing": end_to_end.drawing,
}
"""The gates, in the order in which they run. A gate that does not apply to a variant yields nothing."""

LAYER_GATES: dict[str, Gate] = {
    **{name: GATES[name] for name in ("checker", "lint", "sizes", "engines")},
    "other_graphs": layerwise.other_graphs,
    "layers": layerwise.layers,
}
"""The gates for a model that does not fit into memory."""


@dataclass(frozen=True)
class Report:
    """The results of verifying a variant."""

    variant: str
    how: str  # runtime and device
    checks: dict[str, list[CheckResult]]  # by gate
    not_run: tuple[str, ...] = ()  # gates that needed more memory than was available
    nothing_to_check: tuple[str, ...] = ()  # gates that do not apply to the variant
    errors: Mapping[str, Exception] = field(default_factory=dict)  # by gate: the exception that ended it
    another_model: str | None = None  # if failed: what shows that it was compared with another model

    @property
    def passed(self) -> bool:
        """True if all checks passed."""
        return all(check.passed for checks in self.checks.values() for check in checks)

    @property
    def failures(self) -> str:
        """One line per failed check; empty if all passed."""
        failed = [check for checks in self.checks.values() for check in checks if not check.passed]
        return "\n".join(f"{check.name}: {check.measured}" for check in failed)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values for JSON."""
        checks = {gate: [asdict(check) for check in checks] for gate, checks in self.checks.items()}
        return {
            "variant": self.variant,
            "passed": self.passed,
            "how": self.how,
            "not_run": list(self.not_run),
            "nothing_to_check": list(self.nothing_to_check),
            "another_model": self.another_model,
            "gates": checks,
        }


class NotRecordedError(BundleError):
    """The results could not be written to the bundle's manifest; ``reports`` contains them."""

    def __init__(self, message: str, reports: list[Report]) -> None:
        super().__init__(message)
        self.reports = reports


def verify(
    folder: str | Path,
    against: str | Path,
    *,
    variants: Iterable[str] = (),
    runtime: str = "onnx",
    device: str = "auto",
    gates: Iterable[str] = (),
    layers: bool | None = None,
    on_progress: Callable[[str, str], None] = lambda variant, gate: None,
) -> list[Report]:
    """Compare variants of a bundle (default: all) with the model they were made from, in torch and float32.

    ``runtime``: the runtime to verify, in which every gate that computes runs; gates on files read the ONNX
    graphs. A runtime that `GivesEvidence` (which engines, on which GPU) gets an entry in the manifest's
    ``executed``. ``gates``: run only these, and record nothing; a gate that does not apply to a variant
    fails. ``layers``: verify layer by layer, in the memory of about one layer; None: only if the whole model
    does not fit. A failure against a model that is evidently another one than the bundle's is not recorded.

    Raises:
        BundleError: the bundle is damaged, or a gate is unknown.
        NotRecordedError: the manifest cannot be written; the error contains the reports.
    """
    folder, against = (
        arguments.folder_path(*argument) for argument in ((folder, "folder"), (against, "against"))
    )
    variants, gates = (arguments.texts(*argument) for argument in ((variants, "variants"), (gates, "gates")))
    bundle = load_bundle(folder, check_graphs=False)  # gates check them, with more detail
    selected = variants or bundle.variants
    bundle.verify_weights(_weights(bundle, selected))
    lack = "as asked" if layers else lack_of_memory(against) if layers is None else None
    available = LAYER_GATES if lack else GATES
    chosen = gates
    for name in chosen:
        if name not in available:
            raise BundleError(
                f"no {'layer-by-layer ' if lack else ''}gate is called '{name}'."
                f" {did_you_mean(name, available)}\nGates: {', '.join(available)}"
            )
    if lack and (runtime != "onnx" or device not in ("auto", "cpu")):
        raise BundleError(
            f"layer-by-layer verification ({lack}) runs in ONNX Runtime on the CPU: omit --runtime and"
            " --device, or use --whole"
        )
    reference = (
        StreamedReference.opened(merge_adapters(open_lazily(against))) if lack else Reference.of(against)
    )
    reports = []
    unwritten: Exception | None = None
    for variant in selected:
        with VerificationTarget.of(bundle, variant, reference, runtime=runtime, device=device) as target:
            checks, errors = {}, dict[str, Exception]()
            for gate in chosen or available:
                on_progress(variant, gate)
                checks[gate], error = _run_gate(available[gate], target)
                if error:
                    errors[gate] = error
                if chosen and not checks[gate]:
                    checks[gate] = [CheckResult(variant, False, "nothing to check", "something to check")]
            how = f"layer by layer ({lack}), {target.how}" if lack else target.how
            evidence = target.whole.evidence if isinstance(target.whole, GivesEvidence) else None
        report = Report(
            variant,
            how,
            {gate: results for gate, results in checks.items() if results},
            not_run=tuple(gate for gate in GATES if gate not in available),
            nothing_to_check=tuple(gate for gate, results in checks.items() if not results),
            errors=errors,
        )
        if not report.passed:
            report = replace(report, another_model=difference_of_models(bundle, against))
        reports.append(report)
        if not chosen and not report.another_model:
            try:
                _record(bundle, variant if runtime == "onnx" else f"{variant} {runtime}", report, evidence)
            except (OSError, BundleError) as error:
                unwritten = error
    if unwritten:
        raise NotRecordedError(
            f"the results are not recorded: {bundle.folder / MANIFEST} cannot be written ({unwritten})."
            " Make the folder writable, or verify a copy of it",
            reports,
        ) from unwritten
    return reports


def _weights(bundle: Bundle, variants: Iterable[str]) -> list[str]:
    """List the weight files of variants: their hashes are checked, since no gate detects small changes."""
    for variant in variants:
        bundle.path("backbone", variant)  # raises an error that lists the variants if this one is unknown
    records = bundle.manifest["variants"]
    return sorted({name for variant in variants for name in records[variant]["weights"]})


def _record(bundle: Bundle, key: str, report: Report, evidence: Mapping[str, str] | None) -> None:
    outcome: dict[str, Any] = {
        "passed": report.passed,
        "how": report.how,
        "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    gates = {gate: _summary(results) for gate, results in report.checks.items()}
    not_run = {"not_run": list(report.not_run)} if report.not_run else {}
    nothing_to_check = {"nothing_to_check": list(report.nothing_to_check)} if report.nothing_to_check else {}
    bundle.record("parity", key, {**outcome, "gates": gates, **not_run, **nothing_to_check})
    if report.passed:
        bundle.record(DIGESTS, report.variant, digest_of(bundle.manifest, report.variant))
    if evidence:
        engines = evidence["engines"]
        bundle.record("executed", engines, {**outcome, **evidence})
        bundle.record("built", engines, {**bundle.manifest["built"][engines], "executed": report.passed})


def lack_of_memory(against: str | Path) -> str | None:
    """Return why a model does not fit into memory twice in float32 (torch and a runtime); None if it fits."""
    needed, free = 2 * float32_bytes(open_lazily(against)), free_bytes()
    if free is None or needed <= free:
        return None
    return f"the whole model takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def difference_of_models(bundle: Bundle, against: str | Path) -> str | None:
    """Return what shows that a checkpoint is not the one that a bundle was exported from; None: nothing."""
    return difference(bundle.manifest["source"], describe_source(str(against), open_lazily(against).folder))


def _run_gate(gate: Gate, target: VerificationTarget) -> tuple[list[CheckResult], Exception | None]:
    """Return a gate's results, and the exception that stopped it, if any."""
    checks: list[CheckResult] = []
    try:
        checks.extend(gate(target))
    except Exception as error:  # a graph that does not run counts as failed; other gates still run
        message = shorten(f"{type(error).__name__}: {error}".split("\n")[0], 300, placeholder=" ...")
        return [*checks, CheckResult("runs", False, message, "no error")], error
    return checks, None


def _summary(checks: list[CheckResult]) -> str:
    failed = [
        f"{check.name}: {check.measured}, expected {check.expected}" for check in checks if not check.passed
    ]
    return "; ".join(failed) or f"{len(checks)} passed"

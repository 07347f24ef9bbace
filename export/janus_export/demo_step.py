"""The export step of the demo: exports the trained model and verifies the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from janus_export.bundle.bundle import load_bundle
from janus_export.config import ExportConfig
from janus_export.errors import ExportError
from janus_export.onnx_export.export import export
from janus_export.tensorrt_build.build import BuildConfig, build
from janus_export.verify import Report, verify
from janus_modular.errors import MissingExtraError
from janus_modular.janus import Janus

VARIANTS = ["fp32", "fp16", "cpu-int4"]
TARGET, PRECISION, ARCHITECTURE = "tensorrt-rtx", "fp16", "8.9"
"""Compute capability that engines are built for (RTX 40 series); building needs no GPU."""

Row = tuple[str, str, str]


@dataclass(frozen=True)
class ReportSection:
    """What this step adds to the demo's report: a text, a table, strips of images by caption, metrics."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Row]
    strips: Mapping[str, Sequence[Image.Image]]
    metrics: Mapping[str, float]


def bundle(
    checkpoint: Path,
    output: Path,
    *,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
) -> ReportSection:
    """Export to a bundle that runs without torch, compare its results with the model's, build engines."""
    folder = export(checkpoint, output / "bundle", ExportConfig(variants=VARIANTS))
    reports = verify(folder, checkpoint)
    torch_images, bundle_images = (
        Janus.from_pretrained(path, device="cpu").draw(prompts, **settings) for path in (checkpoint, folder)
    )
    if torch_images.encoded is None or bundle_images.encoded is None:
        raise ExportError("the model's image sampler returns no codes to compare; expected EncodedImages")
    agreement, metrics = compare(np.stack(torch_images.encoded), np.stack(bundle_images.encoded))
    engines = build_engines(folder)
    passed = sum(report.passed for report in reports)
    return ReportSection(
        title="To production",
        text=(
            f"The same model for ONNX Runtime and TensorRT: {passed} of {len(reports)} variants of its bundle"
            f" pass all gates. Drawn from the same noise, {agreement}."
        ),
        columns=("variant", "what", "result"),
        rows=[*(row for report in reports for row in table(report)), *engines],
        strips={"in torch": torch_images, "from the bundle": bundle_images},
        metrics={
            "bundle_variants_passed": passed / len(reports),
            **metrics,
            "engines_built": sum(label.startswith("engine of") for _, label, _ in engines),
        },
    )


def compare(expected: NDArray[Any], computed: NDArray[Any]) -> tuple[str, dict[str, float]]:
    """Compare encoded images from torch and from a bundle; return a phrase and a metric.

    Codes are compared one by one; latents by their largest difference, relative to the largest of torch's.
    """
    if np.issubdtype(expected.dtype, np.integer):
        equal = float((expected == computed).mean())
        return f"{equal:.1%} of the codes are torch's", {"bundle_codes_equal": equal}
    error = float(np.abs(expected - computed).max() / np.abs(expected).max())
    return f"latents differ from torch's by {error:.1e} of their range", {"bundle_latents_error": error}


def build_engines(folder: Path) -> list[Row]:
    """Build an engine of each graph; return a row per engine, or a single row that names what is missing."""
    try:
        key, _ = build(folder, BuildConfig(TARGET, PRECISION, sm=(ARCHITECTURE,)))
    except MissingExtraError as error:
        return [(PRECISION, "engines", f"not built: {error}")]
    built = load_bundle(folder).manifest["built"][key]["engines"]
    return [
        (
            f"{PRECISION}, {TARGET}, {ARCHITECTURE}",
            f"engine of {graph}",
            f"built in {engine['seconds']:.1f} s, {engine['bytes'] / 1e6:.1f} MB; never executed",
        )
        for graph, engine in built.items()
    ]


def table(report: Report) -> list[Row]:
    """Return a row for each gate, with the names of failed checks."""
    rows = []
    for gate, checks in report.checks.items():
        failed = [
            f"{check.name}: {check.measured} (expected {check.expected})"
            for check in checks
            if not check.passed
        ]
        rows.append((report.variant, gate, "; ".join(failed) or f"{len(checks)} of {len(checks)} passed"))
    return rows

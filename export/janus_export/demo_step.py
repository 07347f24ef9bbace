"""The export step of the demo: exports the trained model and verifies the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from janus_export.bundle.bundle import load_bundle
from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.reference.recording import RecordingRuntime
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
    guidance: float,
    temperature: float,
    seed: int,
) -> ReportSection:
    """Export to a bundle that runs without torch, compare its results with the model's, build engines."""
    folder = export(checkpoint, output / "bundle", ExportConfig(variants=VARIANTS))
    reports = verify(folder, checkpoint)
    settings = DrawingSettings(prompts, guidance, temperature, seed)
    torch_codes, torch_images = draw_with_codes(checkpoint, settings)
    bundle_codes, bundle_images = draw_with_codes(folder, settings)
    equal = float((torch_codes == bundle_codes).mean())
    engines = build_engines(folder)
    passed = sum(report.passed for report in reports)
    return ReportSection(
        title="To production",
        text=(
            f"The same model for ONNX Runtime and TensorRT: {passed} of {len(reports)} variants of its bundle"
            f" pass all gates. Drawn from the same noise, {equal:.1%} of the codes are torch's."
        ),
        columns=("variant", "what", "result"),
        rows=[*(row for report in reports for row in table(report)), *engines],
        strips={"in torch": torch_images, "from the bundle": bundle_images},
        metrics={
            "bundle_variants_passed": passed / len(reports),
            "bundle_codes_equal": equal,
            "engines_built": sum(label.startswith("engine of") for _, label, _ in engines),
        },
    )


@dataclass(frozen=True)
class DrawingSettings:
    """What is drawn from a checkpoint and from its bundle, to compare the codes."""

    prompts: Sequence[str]
    guidance: float
    temperature: float
    seed: int


def draw_with_codes(path: Path, settings: DrawingSettings) -> tuple[np.ndarray, Sequence[Image.Image]]:
    """Draw one image a prompt from a checkpoint or a bundle; return codes (N, P) and images."""
    janus = Janus.from_pretrained(path, device="cpu")
    recording = RecordingRuntime(janus.runtime)
    images = Janus(recording, janus.processor).draw(
        settings.prompts,
        guidance=settings.guidance,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    return np.stack([call.outputs[0] for call in recording.runs[-1].calls_of("sample_image")], axis=1), images


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

"""``verify``: checks that a bundle computes the same as its model."""

from __future__ import annotations

import json
from pathlib import Path
from traceback import format_exception
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from janus_export.verify import Report

RUNTIMES = {
    "onnx": (("runtime",), ("onnxruntime",)),
    "tensorrt": (("gpu",), ("onnxruntime", "tensorrt", "cuda.bindings")),
    "tensorrt-rtx": (("runtime", "rtx"), ("onnxruntime", "tensorrt_rtx", "cuda.bindings")),
}
"""For each runtime the extras that verifying with it needs, and the modules of them that it imports."""


def verify(
    context: typer.Context,
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A folder that `export` wrote, or a hub id.")
    ],
    against: Annotated[str, typer.Option(help="The checkpoint that was exported.", metavar="MODEL")],
    variant: Annotated[
        list[str] | None, typer.Option(help="Variant to verify; may be repeated. Default: all.")
    ] = None,
    gate: Annotated[list[str] | None, typer.Option(help="Run only these gates; record nothing.")] = None,
    runtime: Annotated[str, typer.Option(help="Runtime to verify: onnx, tensorrt, tensorrt-rtx.")] = "onnx",
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda; for onnx also tensorrt, nv-tensorrt-rtx.")
    ] = "auto",
    layers: Annotated[
        bool | None,
        typer.Option("--layers/--whole", help="Verify layer by layer: always, or never. Default: if needed."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a bundle with its model, from files to whole images; the manifest records the results.

    Example: janus-modular verify bundle --against runs/demo/model
    """
    from rich.console import Console

    from janus_modular.errors import require_extras

    extras, modules = RUNTIMES.get(runtime, RUNTIMES["onnx"])
    with require_extras("'verify'", "export", *extras, modules=modules):
        from janus_export.bundle.bundle import load_bundle
        from janus_export.verify import NotRecordedError
        from janus_export.verify import verify as verify_bundle
        from janus_modular.bundles import find_bundle

    unwritten = None
    with Console(stderr=True).status("verifying") as status:
        try:
            reports = verify_bundle(
                bundle,
                against,
                variants=variant or (),
                runtime=runtime,
                device=device,
                gates=gate or (),
                layers=layers,
                on_progress=lambda name, gate_name: status.update(f"{name}: {gate_name}"),
            )
        except NotRecordedError as error:  # reported below, after the results are printed
            reports, unwritten = error.reports, error
    if as_json:
        typer.echo(json.dumps([report.to_dict() for report in reports], indent=2))
    for report in () if as_json else reports:
        _print(report)
    if context.find_root().params.get("traceback"):
        for report in reports:
            for name, ended in report.errors.items():
                typer.echo(f"{report.variant}, {name}:\n{''.join(format_exception(ended))}", err=True)
    if unwritten:
        raise unwritten
    if not all(report.passed for report in reports):
        another_model = next((report.another_model for report in reports if report.another_model), None)
        if another_model:
            exported_from = load_bundle(find_bundle(bundle) or bundle).manifest["source"]["path"]
            typer.echo(
                f"{against} is not the model that {bundle} was exported from ({exported_from}):"
                f" {another_model}. The failure is not recorded in the bundle; verify it against its own"
                " model.",
                err=True,
            )
        raise typer.Exit(1)


def _print(report: Report) -> None:
    typer.echo(f"{report.variant}: {'passed' if report.passed else 'FAILED'} ({report.how})")
    if report.not_run:
        typer.echo(f"  not run: {', '.join(report.not_run)}")
    if report.nothing_to_check:
        typer.echo(f"  nothing to check: {', '.join(report.nothing_to_check)}")
    for name, checks in report.checks.items():
        typer.echo(f"  {name}: {sum(check.passed for check in checks)} of {len(checks)} passed")
        for check in checks:
            if not check.passed or name not in ("checker", "lint", "sizes"):
                mark = " " if check.passed else "!"
                typer.echo(f"  {mark} {check.name}: {check.measured} (expected {check.expected})")

"""The command ``eval``: questions with known answers, images for benchmarks, reconstruction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from janus_modular.cli.config import Overrides
from janus_modular.cli.options import AllowFailed, Device, Dtype, ModelArgument, Runtime, Variant, finite


def evaluate(
    model: ModelArgument,
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="A YAML file, or a shipped name, such as eval/pope.")
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder of the ledger, the images and results.json.")
    ] = Path("runs/eval"),
    check: Annotated[
        float | None,
        typer.Option(
            "--check-ledger",
            metavar="FRACTION",
            min=0,
            max=1,
            callback=finite,
            help="Draw nothing new: draw a random share of the ledger's images again, and compare codes.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON instead of a table.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    runtime: Runtime = None,
    variant: Variant = None,
    allow_failed: AllowFailed = False,
) -> None:
    """Evaluate a model: answers to questions, images for public benchmarks, or its image tokenizer.

    An interrupted evaluation continues with the same command.

    Example: janus-modular eval runs/demo/model eval/pope path=pope.jsonl images=coco -o runs/pope
    """
    from rich.console import Console

    from janus_modular.config import load, resolve
    from janus_modular.evaluation.ledger import identity_of
    from janus_modular.evaluation.published import published_results
    from janus_modular.evaluation.results import write_results
    from janus_modular.evaluation.run import EvalData, read_data, run_evaluation
    from janus_modular.evaluation.schema import IMAGES_PER_PROMPT, EvalConfig
    from janus_modular.janus import Janus
    from janus_modular.samplers import progress_bar

    config = resolve(load(suite, overrides or ()), EvalConfig)
    if check is not None and (check == 0 or config.evaluate not in IMAGES_PER_PROMPT):
        raise typer.BadParameter(
            f"--check-ledger {check} with evaluate: {config.evaluate}; expected a share above 0, and drawings"
        )
    data = read_data(config) if check is None else EvalData()  # before the model is loaded
    janus = Janus.from_pretrained(
        model, device=device, dtype=dtype, runtime=runtime, variant=variant, allow_failed=allow_failed
    )
    identity = identity_of(janus, model, runtime)
    if check is not None:
        from janus_modular.evaluation.drawing import check_ledger

        number, differing = check_ledger(janus, config, out, identity, check)
        if as_json:
            typer.echo(json.dumps({"images": number, "differing": differing}, ensure_ascii=False))
            raise typer.Exit(1 if differing else 0)
        for key in differing:
            typer.echo(f"{key}: other codes than in the ledger", err=True)
        typer.echo(f"{number} images drawn again, {len(differing)} with other codes")
        raise typer.Exit(1 if differing else 0)
    with progress_bar(not quiet, config.evaluate) as on_progress:
        results = run_evaluation(janus, data, config, out, identity, on_progress)
    record = results.record(config, model, identity)
    write_results(out, record)
    if as_json:
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    Console().print(results.table())
    for result in published_results(config.evaluate):
        typer.echo(f"published: {result.model} {result.value} ({result.unit}; {result.source})")
    typer.echo(str(out / "results.json"))

"""``bench``: how fast a model or a bundle is on this machine. A bundle needs no torch."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from janus_modular.cli.options import AllowFailed, Device, Dtype, ModelArgument, Runtime, Variant


def bench(
    model: ModelArgument,
    tokens: Annotated[int, typer.Option(min=1, help="Timed steps per mode (text, images).")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are reported.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers and images per batch.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: one per core.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    runtime: Runtime = None,
    variant: Variant = None,
    allow_failed: AllowFailed = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model or a bundle: loading, text, images, memory, and the share of the read bandwidth.

    Example: janus-modular bench bundle --tokens 128
    """
    from rich.console import Console

    from janus_export.bench.run import bench as bench_model

    with Console(stderr=True).status("loading") as status:
        facts = bench_model(
            model,
            runtime=runtime,
            variant=variant,
            allow_failed=allow_failed,
            device=device,
            dtype=dtype,
            threads=threads,
            tokens=tokens,
            rounds=rounds,
            batch_size=batch_size,
            on_progress=status.update,
        )
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))


def _lines(facts: dict[str, Any]) -> list[str]:
    """Return the measurements as text for a terminal."""
    ran, machine = facts["ran"], facts["machine"]
    setup = " ".join(str(ran[key]) for key in ("runtime", "variant", "dtype", "device") if ran[key])
    load = "" if machine["load_average"] is None else f", load {machine['load_average']:.1f}"
    rows = [
        (facts["model"], f"{setup}, {ran['threads']} threads; medians of {ran['rounds']} rounds"),
        ("machine", f"{machine['processor']}, {machine['cores']} cores{load}"),
        ("load", f"{facts['load_s']:.2f} s, including the first token and code"),
    ]
    if text := facts["text"]:
        rows += _mode("text", "token", text)
    if drawing := facts["drawing"]:
        parts = f"{drawing['positions']} positions, {drawing['decode_s']:.2f} s to decode"
        whole = f"{drawing['image_s']:.2f} s: {parts}"
        rows += [*_mode("drawing", "position", drawing), ("  an image", whole)]
    if peak := facts["peak_memory_bytes"]:
        rows.append(("peak memory", f"{peak / 1e6:,.0f} MB, mapped files included"))
    if bandwidth := facts["read_bandwidth_bytes_per_s"]:
        rows.append(("read bandwidth", f"{bandwidth / 1e9:.1f} GB/s, measured between the rounds"))
    width = max(len(label) for label, _ in rows)
    return [f"{label:<{width}}  {value}" for label, value in rows]


def _mode(name: str, unit: str, speed: dict[str, Any]) -> list[tuple[str, str]]:
    share = speed["bandwidth_share"]
    reads = (
        "" if share is None else f"; reads {speed['read_bytes'] / 1e6:,.1f} MB, {share:.2f} of the bandwidth"
    )
    return [
        (name, f"{speed['per_s']:,.1f} {unit}s/s, {speed['rows']} rows"),
        (f"  first {unit}", f"{speed['first_s']:.3f} s after a prompt of {speed['prompt']} positions"),
        ("  a step", f"{speed['step_s'] * 1e3:.2f} ms{reads}"),
    ]

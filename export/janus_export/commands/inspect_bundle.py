"""``inspect``: prints the contents of a bundle. Needs neither torch nor ONNX."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from janus_export.bundle.sizes import checkpoint_bytes, variant_size

if TYPE_CHECKING:
    from janus_export.bundle.bundle import Bundle


def inspect(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A folder that `export` wrote, or a hub id.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    hashes: Annotated[
        bool, typer.Option("--hashes", help="Also check the weights' hashes: about a second per gigabyte.")
    ] = False,
) -> None:
    """Check a bundle; print its graphs, shapes, sizes, variants, results of verify, and engines.

    Example: janus-modular inspect bundle
    """
    from janus_export.bundle.bundle import load_bundle

    opened = load_bundle(bundle)
    if hashes:
        opened.verify_weights()
    facts = gather(opened)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{bundle}: exported from {facts['source']} by {facts['written_by']}")
    if hashes:
        typer.echo("hashes: all files match the manifest")
    typer.echo("modes: " + (", ".join(facts["modes"]) or "none"))
    typer.echo("plugins: " + ", ".join(facts["plugins"]))
    typer.echo("axes: " + ", ".join(f"{name} {a['min']}..{a['max']}" for name, a in facts["axes"].items()))
    typer.echo()
    for graph in facts["graphs"]:
        typer.echo(f"{graph['graph']}: {graph['takes']}\n    -> {graph['gives']}")
    _table(
        (
            "variant",
            "weights",
            "total_MB",
            "of_checkpoint",
            "graphs_MB",
            "weights_MB",
            "quantized",
            "skipped",
        ),
        facts["variants"],
    )
    typer.echo(
        f"\nthe checkpoint: {_megabytes(facts['checkpoint_bytes'])}; MB of each graph with its weights:"
    )
    _table(
        ("graph", *opened.variants),
        [
            {
                "graph": name,
                **{
                    variant["variant"]: _million(variant["graph_bytes"][name])
                    for variant in facts["variants"]
                },
            }
            for name in opened.graphs
        ],
    )
    for section in ("parity", "built", "executed"):
        results = facts[section]
        heading = "verified" if section == "parity" else section
        typer.echo(f"\n{heading}: {'' if results else 'nothing yet'}".rstrip())
        if section == "parity" and results:
            _table(("variant", "gate", "result"), proven(results))
            continue
        for name, result in results.items():
            how = describe_build(result, len(facts["graphs"])) if section == "built" else describe_run(result)
            typer.echo(f"  {name}: {how}")


def gather(bundle: Bundle) -> dict[str, Any]:
    """Return the facts of a bundle, as ``--json`` prints them."""
    manifest = bundle.manifest
    sizes = {name: variant_size(bundle, name) for name in bundle.variants}
    checkpoint = checkpoint_bytes(manifest)
    return {
        "written_by": manifest["written_by"],
        "source": manifest["source"]["path"],
        "plugins": _providers(manifest["plugins"]),
        "modes": bundle.modes,
        "checkpoint_bytes": checkpoint,
        "axes": manifest["axes"],
        "graphs": [
            {
                "graph": name,
                "takes": _describe_tensors(graph["inputs"]),
                "gives": _describe_tensors(graph["outputs"]),
            }
            for name, graph in bundle.graphs.items()
        ],
        "variants": [
            {
                "variant": name,
                "weights": _weights(variant),
                "bytes": sizes[name].total,
                "graph_bytes": sizes[name].graphs,
                "total_MB": _million(sizes[name].total),
                "of_checkpoint": f"{sizes[name].total / checkpoint:.0%}" if checkpoint else "unknown",
                "graphs_MB": _million(
                    sum(manifest["bytes"][file] for file in set(variant["files"].values()))
                ),
                "weights_MB": _million(sizes[name].weights),
                "storage": variant.get("storage", variant["dtype"]),
                "quantized": len((variant["quantization"] or {}).get("quantized", ())),
                "skipped": len((variant["quantization"] or {}).get("skipped", ())),
            }
            for name, variant in manifest["variants"].items()
        ],
        **{section: manifest.get(section, {}) for section in ("parity", "built", "executed")},
    }


def describe_build(built: dict[str, Any], graphs: int) -> str:
    """Describe a set of engines on one line; ``graphs`` is the number of graphs in the bundle."""
    engines = built["engines"].values()
    size, seconds = sum(engine["bytes"] for engine in engines), sum(engine["seconds"] for engine in engines)
    builder = f"{built['target']} {built['builder']} for {', '.join(built['arch'])}"
    contents = f"{len(engines)} of {graphs} graphs, {built['capacity']} positions, {size / 1e6:,.1f} MB"
    status = "executed" if built["executed"] else "never executed"
    return f"{builder}: {contents}, built in {seconds:.0f} s, {status}"


def proven(parity: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of `verify`: a row per variant, each followed by a row per gate."""
    rows = []
    for variant, run in parity.items():
        rows.append({"variant": variant, "gate": "all", "result": describe_run(run)})
        rows += [{"variant": "", "gate": gate, "result": result} for gate, result in run["gates"].items()]
        rows += [
            {"variant": "", "gate": gate, "result": words}
            for key, words in (("not_run", "not run"), ("nothing_to_check", "nothing to check"))
            for gate in run.get(key, ())
        ]
    return rows


def describe_run(run: dict[str, Any]) -> str:
    """Describe the result of a verification on one line: outcome, time, and device."""
    return f"{'passed' if run['passed'] else 'FAILED'}, {run['at']}, {run['how']}"


def _providers(plugins: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each distribution (with version) or file that provides components of the bundle."""
    provided: dict[str, list[str]] = {}
    for component in plugins:
        provider = component["file"] or f"{component['dist']} {component['version']}"
        provided.setdefault(provider, []).append(f"{component['slot']}:{component['name']}")
    return [f"{provider} ({', '.join(parts)})" for provider, parts in provided.items()]


def _weights(variant: dict[str, Any]) -> str:
    if not (quantization := variant["quantization"]):
        return str(variant["dtype"])
    stored = variant.get("storage", variant["dtype"])
    other_bits = sorted({*quantization.get("weight_bits", {}).values()} - {quantization["bits"]})
    bits = " and ".join(map(str, [quantization["bits"], *other_bits]))
    return f"{stored} on disk, {bits} bits in blocks of {quantization['block_size']}"


def _million(size: int) -> float:
    return round(size / 1e6, 2)


def _megabytes(size: int | None) -> str:
    return "of unknown size" if size is None else f"{size / 1e6:,.2f} MB"


def _describe_tensors(tensors: Iterable[dict[str, Any]]) -> str:
    """Describe inputs or outputs on one line; cache tensors are only counted."""
    words: dict[str, int] = {}
    for tensor in tensors:
        name, _, number = tensor["name"].rpartition("_")
        word = f"{name}_*" if number.isdigit() else tensor["name"]
        word += f" ({', '.join(map(str, tensor['shape']))})"
        words[word] = words.get(word, 0) + 1
    return "; ".join(word if count == 1 else f"{count} {word}" for word, count in words.items())


def _table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    lines = [columns, *(tuple(str(row[column]) for column in columns) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    typer.echo()
    for line in lines:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())

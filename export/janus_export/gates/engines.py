"""A gate for engines: each graph has an intact engine, built from that graph, for all its lengths."""

from __future__ import annotations

from collections.abc import Iterator

from janus_export.bundle.engines import EngineSet, read_engines
from janus_export.errors import BundleError
from janus_export.reference.target import CheckResult, VerificationTarget
from janus_export.tensorrt_build.profiles import Lengths, profiles


def engines(target: VerificationTarget) -> Iterator[CheckResult]:
    """Check every set of engines of the variant; without engines, there is nothing to check."""
    built = target.bundle.manifest.get("built", {})
    for key, engine_set in read_engines(target.bundle).items():
        if engine_set.variant != target.variant:
            continue
        missing = [graph for graph in target.bundle.graphs if graph not in engine_set.engines]
        yield CheckResult(
            f"{key}: graphs without an engine", not missing, ", ".join(missing) or "none", "none"
        )
        lengths = Lengths(built[key]["options"]["rows"], engine_set.capacity)
        for graph in engine_set.engines:
            problem = _problem(target, engine_set, graph, lengths)
            how = f"built by {engine_set.builder}, {'executed' if engine_set.executed else 'never executed'}"
            yield CheckResult(
                f"{key}: {graph}", not problem, problem or how, "built of this graph, as recorded"
            )


def _problem(target: VerificationTarget, engine_set: EngineSet, graph: str, lengths: Lengths) -> str:
    """Return what is wrong with an engine; "" if nothing is."""
    engine, bundle = engine_set.engines[graph], target.bundle
    if graph not in bundle.graphs:
        return "there is no such graph"
    if engine.source != bundle.manifest["sha256"][target.record["files"][graph]]:
        return "it was built from another graph"
    if engine.profiles != profiles(bundle.manifest, graph, lengths):
        return "its profiles do not cover the axes of its graph"
    try:
        engine_set.path(graph)
    except BundleError as error:
        return str(error).split("\n")[0]
    return ""

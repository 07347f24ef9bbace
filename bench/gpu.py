"""What a GPU shows, in one command of at most ten minutes: tests, bundles, speed, training and memory.

    python bench/gpu.py [--out runs/gpu] [--minutes 10] [--wheels FOLDER] [--only PHASE ...]
    python bench/gpu.py --size tiny --device cpu     # the script itself, where there is no GPU

Each phase is a command in a process of its own. ``results.json`` in the output folder is written again after
each phase, so an interrupted run keeps what was measured; ``results.md`` is a table for docs/performance.md.
A phase that fails, that cannot run here or for which no time is left is listed with its reason. The exit
status is 1 if a phase failed.

A machine with python3 and a GPU driver, and without a package index, needs these wheels; make them on another
machine with the same Python and processor, and copy the folder beside the checkout:

    make wheel && pip download -d wheels -c constraints.txt dist/janus_modular-*.whl onnxruntime-gpu pytest \\
        hypothesis        # add torch where the machine has none; leave out what it has
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"1b": "model/janus_pro_1b", "tiny": "tiny"}
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "janus-modular")
VERSIONS = (
    "import json; from importlib.metadata import distributions; "
    "print(json.dumps([(each.name, each.version) for each in distributions()]))"
)
JANUS = ("-m", "janus_modular")
Metrics = dict[str, float | str]


@dataclass
class Phase:
    """A command, how long it may take, and how metrics are read from what it prints."""

    name: str
    command: Sequence[str]  # arguments of python
    read: Callable[[str], Metrics] = lambda _: {}
    limit: float = 300.0  # seconds
    needs: str = ""  # the phase whose output this one reads


@dataclass
class Result:
    """The outcome of a phase."""

    name: str
    command: str
    outcome: str  # passed, failed, not run
    seconds: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    reason: str = ""


def bench_metrics(output: str) -> Metrics:
    """Return the metrics of ``janus-modular bench --json``."""
    measured = json.loads(output)
    peak_memory = measured["peak_memory_bytes"] / 1e9
    metrics: Metrics = {"loading, s": measured["load_s"], "peak memory, GB": peak_memory}
    for mode, quantity in (("text", "per token, ms"), ("drawing", "per step of an image, ms")):
        if mode in measured:
            metrics[quantity] = measured[mode]["step_s"] * 1000
    if "drawing" in measured:
        metrics["per image, s"] = measured["drawing"]["image_s"]
    return metrics


def verify_metrics(output: str) -> Metrics:
    """Return which variants ``janus-modular verify --json`` found equal to their model."""
    return {f"{report['variant']} verified": str(report["passed"]) for report in json.loads(output)}


def sampling_metrics(output: str) -> Metrics:
    """Return the rows of the table of ``bench/sampling.py``."""
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", output, re.MULTILINE)
    return {
        f"{task}: {label}": float(value)
        for task, *values in rows
        for label, value in zip(("ours, s", "transformers, s", "ratio"), values, strict=True)
    }


def training_metrics(output: str) -> Metrics:
    """Return the metrics of ``bench/training_throughput.py``."""
    measured = json.loads(output)
    metrics: Metrics = {"tokens/s": measured["tokens_per_s"], "per step, s": measured["step_s"]}
    if measured["peak_memory_bytes"]:
        metrics["peak memory, GB"] = measured["peak_memory_bytes"] / 1e9
    return metrics


def pytest_metrics(output: str) -> Metrics:
    """Return the closing line of pytest."""
    return {"tests": last_line(output).strip("= ")}


def phases(size: str, device: str, scratch: Path) -> Iterator[Phase]:
    """Yield the phases, most informative first: what comes last may find no time left."""
    model, bundle, tiny = scratch / "model", scratch / "bundle", scratch / "tiny"
    on_gpu = device != "cpu"
    bench = (
        *JANUS,
        "bench",
        "--json",
        "--rounds",
        "3",
        "--tokens",
        "64" if on_gpu else "4",
        "--device",
        device,
    )
    yield Phase(
        "tests on a GPU",
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/export/test_on_a_gpu.py"),
        pytest_metrics,
    )
    random_weights = ("bench/random_checkpoint.py", CONFIGS[size], str(model), "--precision", "fp16")
    yield Phase("random weights", random_weights)
    for dtype in ("float16", "bfloat16") if on_gpu else ("float32",):
        for rows in (1, 8):
            yield Phase(
                f"torch, {dtype}, batch of {rows}",
                (*bench, "--dtype", dtype, "--batch-size", str(rows), str(model)),
                bench_metrics,
                needs="random weights",
            )
    for dtype in ("bfloat16",) if on_gpu else ("float32",):
        sampling = ("--device", device, "--dtype", dtype, "--rounds", "3" if on_gpu else "1")
        name = f"beside transformers, {dtype}"
        sizes = ("--size", "1b" if size == "1b" else "small")
        yield Phase(name, ("bench/sampling.py", *sizes, *sampling), sampling_metrics)
    for compiled in (False, True) if on_gpu else (False,):
        name = "training, stage 2" + (", compiled" if compiled else "")
        training = ("bench/training_throughput.py", "--size", size, "--device", device, "--steps", "4")
        yield Phase(name, (*training, *(["compile=[backbone]"] if compiled else [])), training_metrics)
    precision = "fp16" if on_gpu else "fp32"
    exporting = (*JANUS, "export", str(model), str(bundle), "--precision", precision, "--quiet")
    yield Phase("export", exporting, needs="random weights")
    for rows in (1, 8):
        yield Phase(
            f"ONNX Runtime, {precision}, batch of {rows}",
            (*bench, "--batch-size", str(rows), str(bundle)),
            bench_metrics,
            needs="export",
        )
    yield Phase("small weights", ("bench/random_checkpoint.py", "tiny", str(tiny), "--precision", "fp16"))
    variants = ("--precision", "fp32", "--precision", "fp16", "--precision", "bf16", "--quiet")
    yield Phase(
        "small export", (*JANUS, "export", str(tiny), f"{tiny}-bundle", *variants), needs="small weights"
    )
    verify = (*JANUS, "verify", f"{tiny}-bundle", "--against", str(tiny), "--device", device, "--json")
    yield Phase("bundles against their model", verify, verify_metrics, needs="small export")


class GpuMemory:
    """The highest use of the memory of the GPU, in MiB, read twice a second by nvidia-smi; 0 without one."""

    def __init__(self) -> None:
        self.peak = 0
        self._end = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> GpuMemory:
        """Start to read."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        query = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
        while not self._end.wait(0.5) and (used := _output(*query)):
            self.peak = max(self.peak, int(used.splitlines()[0]))


def run_phase(phase: Phase, seconds_left: float, environment: Mapping[str, str]) -> Result:
    """Run a phase within its limit and the time that is left; never raise for what it does."""
    result = Result(phase.name, " ".join(("python", *phase.command)), "not run")
    if seconds_left < 5:
        return Result(**{**asdict(result), "reason": "no time was left"})
    limit = min(phase.limit, seconds_left)
    start = time.perf_counter()
    memory = GpuMemory()
    try:
        with memory:
            process = subprocess.run(
                [sys.executable, *phase.command],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
            )
        result.outcome = "passed" if process.returncode == 0 else "failed"
        if process.returncode:
            result.reason = (process.stdout + process.stderr)[-2000:]
        result.metrics = phase.read(process.stdout) if process.stdout else {}
        if result.metrics and memory.peak:
            result.metrics["GPU memory in use, highest seen, GB"] = memory.peak * 2**20 / 1e9
    except subprocess.TimeoutExpired:
        result.outcome, result.reason = "failed", f"stopped after {limit:.0f} s"
    except (ValueError, KeyError, IndexError, TypeError) as error:
        if result.outcome == "passed":  # a command that failed printed something else
            result.outcome, result.reason = "failed", f"its output was not understood: {error!r}"
    result.seconds = time.perf_counter() - start
    return result


def machine(device: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the GPU, its driver, the processor, the commit, and the versions of packages."""
    facts: dict[str, Any] = {"date": date.today().isoformat(), "processor": processor()}
    facts["cores"], facts["python"] = os.cpu_count(), platform.python_version()
    facts["commit"] = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown"
    if device != "cpu":
        query = "--query-gpu=name,driver_version,memory.total,compute_cap"
        facts["gpu"] = _output("nvidia-smi", query, "--format=csv,noheader") or "nvidia-smi did not answer"
    installed = subprocess.run(
        [sys.executable, "-c", VERSIONS], env=environment, capture_output=True, text=True, check=True
    )
    versions = {name.lower(): version for name, version in json.loads(installed.stdout)}
    return {**facts, "versions": {name: versions.get(name, "not installed") for name in PACKAGES}}


def processor() -> str:
    """Return the processor's name, on Linux."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", path.read_text(), re.MULTILINE) if path.exists() else []
    return names[0] if names else platform.machine()


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def markdown(facts: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Return the results as a table of metrics, and a list of what failed or was not run."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [f"{facts.get('gpu', 'CPU')}; {versions}; {facts['date']}, commit {facts['commit']}", ""]
    lines += ["| phase | quantity | value |", "| --- | --- | ---: |"]
    for result in results:
        for name, value in result.metrics.items():
            cell = f"{value:,.4g}" if isinstance(value, float | int) else value
            lines.append(f"| {result.name} | {name} | {cell} |")
    problems = [result for result in results if result.outcome != "passed"]
    lines += ["", *(f"- {r.name}: {r.outcome}: {last_line(r.reason)}" for r in problems)]
    return "\n".join(lines).rstrip() + "\n"


def last_line(output: str) -> str:
    """Return the last line of a command's output, shortened; an error message, as a rule."""
    return (output.strip() or "no output").splitlines()[-1][:300]


def write(folder: Path, facts: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write both files aside and rename them."""
    contents = json.dumps({"machine": facts, "phases": [asdict(result) for result in results]}, indent=2)
    for name, text in (("results.json", contents + "\n"), ("results.md", markdown(facts, results))):
        (folder / f".{name}").write_text(text, "utf-8")
        (folder / f".{name}").replace(folder / name)


@contextmanager
def wheels_installed(wheels: Path | None) -> Iterator[dict[str, str]]:
    """Yield the environment of the phases: with the wheels of a folder, if one is given."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if wheels is None:
        yield environment
        return
    if not (files := sorted(wheels.glob("*.whl"))):
        raise SystemExit(f"{wheels}: found no *.whl; expected those that --help lists")
    with TemporaryDirectory() as site:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site]
        subprocess.run([*pip, *map(str, files)], check=True)
        inherited = filter(None, [environment.get("PYTHONPATH")])
        yield {**environment, "PYTHONPATH": os.pathsep.join([site, *inherited])}


def main() -> int:
    """Run the phases; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that the phases use")
    parser.add_argument("--only", action="append", help="a phase; may be repeated; what it needs runs too")
    parser.add_argument("--size", choices=CONFIGS, default="1b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not _output("nvidia-smi", "-L"):
        parser.error("found no NVIDIA GPU (nvidia-smi -L); without one: --size tiny --device cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    results: list[Result] = []
    with TemporaryDirectory() as scratch, wheels_installed(arguments.wheels) as environment:
        facts = machine(arguments.device, environment)
        for phase in selected(list(phases(arguments.size, arguments.device, Path(scratch))), arguments.only):
            print(f"{phase.name} ...", flush=True)
            if phase.needs and not any(r.name == phase.needs and r.outcome == "passed" for r in results):
                command = " ".join(("python", *phase.command))
                results.append(Result(phase.name, command, "not run", reason=f"needs: {phase.needs}"))
            else:
                results.append(run_phase(phase, end - time.monotonic(), environment))
            print(f"  {results[-1].outcome}, {results[-1].seconds:.0f} s", flush=True)
            write(arguments.out, facts, results)
    print(f"\n{(arguments.out / 'results.md').read_text('utf-8')}\n{arguments.out / 'results.json'}")
    return int(any(result.outcome == "failed" for result in results))


def selected(every: Sequence[Phase], only: Sequence[str] | None) -> list[Phase]:
    """Return the phases of these names and those that they need, in their order; all, without names."""
    if not only:
        return list(every)
    by_name = {phase.name: phase for phase in every}
    wanted = set()
    for name in only:
        if name not in by_name:
            raise SystemExit(f"--only: found '{name}'; expected one of: {', '.join(by_name)}")
        while name:
            wanted.add(name)
            name = by_name[name].needs
    return [phase for phase in every if phase.name in wanted]


if __name__ == "__main__":
    sys.exit(main())

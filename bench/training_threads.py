"""Steps per second of the demo's second stage, by the threads of torch and how they wait for each other.

    python bench/training_threads.py [--steps 60] [--rounds 3]

The settings alternate, each in a process of its own: first on the machine as it is, then beside a busy loop
on each core. The first ten steps of a run are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]

SETTINGS = {
    "two threads, active waiting": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "active"},
    "two threads, passive waiting (`train` and `demo`)": {"OMP_NUM_THREADS": "2"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def training_config(folder: Path, steps: int) -> Path:
    """Write the demo's stage 2 as a training config of its own, from random weights."""
    demo = yaml.safe_load((ROOT / "configs/demo/digits.yaml").read_text("utf-8"))
    stage = demo["stages"]["stage2"] | demo["common"]
    stage |= {
        "model": demo["model"],
        "sources": demo["sources"],
        "trackers": demo["trackers"],
        "log_every": 10,
    }
    stage["schedule"] |= {"steps": steps}
    path = folder / "stage2.yaml"
    path.write_text(yaml.safe_dump(stage), "utf-8")
    return path


def steps_per_second(config: Path, output: Path, environment: dict[str, str]) -> float:
    """Run the config in a process; return its speed after the first steps."""
    command = [sys.executable, "-m", "janus_modular", "train", str(config), f"output={output}", "--quiet"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, check=True, env=os.environ | environment, **quiet)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    return statistics.harmonic_mean([line["steps_per_second"] for line in lines[1:]])


def measure(rounds: int, steps: int, load: int) -> dict[str, float]:
    """Return the median speed of each setting beside ``load`` busy processes."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
    speeds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = training_config(Path(folder), steps)
            for number in range(rounds):
                for name, environment in SETTINGS.items():
                    output = Path(folder) / f"{number}-{len(name)}"
                    speeds[name].append(steps_per_second(config, output, environment))
    finally:
        for process in busy:
            process.kill()
    return {name: statistics.median(values) for name, values in speeds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    idle, loaded = (measure(arguments.rounds, arguments.steps, load) for load in (0, cores))
    print("| setting | steps/s | steps/s beside a busy loop on each core |\n| --- | ---: | ---: |")
    for name in SETTINGS:
        print(f"| {name} | {idle[name]:.2f} | {loaded[name]:.2f} |")


if __name__ == "__main__":
    main()

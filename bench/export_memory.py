"""What an export costs at the published sizes: peak anonymous memory and time, from a checkpoint on disk.

    python bench/export_memory.py 1b 7b [--precision bf16] [--folder /tmp]

A checkpoint of random weights is written first. Then `janus-modular export` runs in a process of its own,
one variant in the checkpoint's own precision, while this one looks at its RssAnon in /proc. Mapped files
are left out: the system may drop them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from random_checkpoint import KINDS, write_janus

from janus_export.process_memory import anonymous_memory

LIMITS = {"1b": (3, 5), "7b": (4, 12)}  # GB of peak anonymous memory, and minutes


def export(checkpoint: Path, bundle: Path, precision: str) -> tuple[int, float]:
    """Export in a process of its own; return its peak anonymous memory in bytes, and seconds."""
    program = [sys.executable, "-m", "janus_modular", "export", str(checkpoint), str(bundle)]
    options = ["--precision", precision, "--quiet"]
    start, peak = time.perf_counter(), 0
    with subprocess.Popen([*program, *options], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid) or 0)
            time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"the export of {checkpoint} failed")
    return peak, time.perf_counter() - start


def main() -> None:
    """Print a table; exit code 1 where a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=list(LIMITS), metavar="SIZE", help="1b, 7b")
    parser.add_argument("--precision", choices=KINDS, default="bf16")
    parser.add_argument("--folder", type=Path, help="for checkpoint and bundle: 9 GB for 1b, 31 GB for 7b")
    arguments = parser.parse_args()
    if strange := set(arguments.sizes) - set(LIMITS):
        parser.error(f"no size {', '.join(strange)}: choose from {', '.join(LIMITS)}")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "onnx"))
    print(f"{versions}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| model | checkpoint, GB | peak anonymous memory, GB | limit | time, s | limit |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    kept = True
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="export-") as folder:
            checkpoint = Path(folder) / "checkpoint"
            written = write_janus(f"model/janus_pro_{size}", [], arguments.precision, checkpoint)
            if (free := shutil.disk_usage(folder).free) < 1.02 * written:
                raise SystemExit(
                    f"{folder} has {free / 1e9:.1f} GB left, the bundle takes {written / 1e9:.1f}"
                )
            peak, seconds = export(checkpoint, Path(folder) / "bundle", arguments.precision)
        most, minutes = LIMITS[size]
        kept &= peak <= most * 1e9 and seconds <= minutes * 60
        print(
            f"| Janus-Pro-{size.upper()}, {arguments.precision} | {written / 1e9:.1f} | {peak / 1e9:.2f}"
            f" | {most} | {seconds:.0f} | {minutes * 60} |",
            flush=True,
        )
    raise SystemExit(0 if kept else 1)


if __name__ == "__main__":
    main()

"""NVIDIA's load generator AIPerf, unmodified, against a server: its counts are those of the engine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / ".cache/aiperf/bin/aiperf"
TOKENIZER = ROOT / "tests/fixtures/reference"
"""By which prompts are made; it is not the server's."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PROGRAM.parents[1] / "installed").exists(),
        reason="needs the environment of AIPerf: make .cache/aiperf/installed",
    ),
]

REQUESTS = 6
COMMON = ["--request-count", str(REQUESTS), "--concurrency", "3", "--random-seed", "1", "--isl", "12"]
COMMON += ["--workers-max", "1", "--record-processors", "1", "--no-gpu-telemetry", "--ui", "none"]


def profile(address: str, folder: Path, endpoint: str, *options: str) -> dict[str, Any]:
    """Run the program; return its report."""
    line = [PROGRAM, "profile", "--model", "tiny", "--url", address, "--endpoint-type", endpoint]
    line += ["--tokenizer", TOKENIZER, "--artifact-dir", folder, *COMMON, *options]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [report] = folder.rglob("profile_export_aiperf.json")
    return json.loads(report.read_text("utf-8"))


def test_chats_with_images_are_streamed_and_counted(start: Any, tmp_path: Path):
    served = start()
    images = ["--image-width-mean", "32", "--image-height-mean", "32", "--image-format", "png"]
    report = profile(
        served.address, tmp_path, "chat", "--streaming", "--osl", "8", "--use-server-token-count", *images
    )
    stats = served.service.engine.stats()
    assert report.get("error_summary") in (None, [])
    assert report["request_count"]["avg"] == REQUESTS == stats.answered
    assert stats.failed == stats.cancelled == 0
    assert report["output_sequence_length"]["avg"] == 8
    assert report["time_to_first_token"]["avg"] > 0


def test_images_are_drawn_and_counted(start: Any, tmp_path: Path):
    served = start()
    report = profile(served.address, tmp_path, "image_generation")
    assert report.get("error_summary") in (None, [])
    assert report["request_count"]["avg"] == REQUESTS == served.service.engine.stats().drawn
    assert report["request_latency"]["avg"] > 0

"""The short version of `make reliability`: a server under load, with faults, kills and full disks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "reliability.py"
FEW = ["--requests", "48", "--clients", "8", "--faults", "12", "--kills", "2", "--seconds", "1000"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of processes")
@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_nothing_is_lost(runtime: str, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n<!-- figures of bench/reliability.py -->\nold\n<!-- end of figures -->\nend\n")
    models = ["--checkpoint", str(tiny_checkpoint), "--bundle", str(tiny_bundle), "--only", runtime]
    # Memory is not compared: it grows while graphs are first used, for as long as this whole load.
    line = [sys.executable, str(BENCH), *models, *FEW, "--no-memory", "--out", str(page)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    before, table, end = page.read_text().partition("| codes drawn again after the kills | 0 |")
    assert table
    assert before.startswith("# Page\n")
    assert end.endswith("<!-- end of figures -->\nend\n")
    assert "old" not in before

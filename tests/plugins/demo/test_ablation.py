"""Two encoders answer better than one shared encoder: a separate file, because the test takes long."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_modular.config import load
from janus_plugins.demo.ablation import run_ablation


@pytest.mark.proof
def test_decoupled_reads_better(tmp_path: Path) -> None:
    rows = run_ablation(load("demo/digits"), tmp_path / "ablation", quiet=True)
    gains = [row["reading_gain"] for row in rows]
    assert min(gains) > 0
    assert sum(gains) / len(gains) >= 0.02

"""Reading a folder while it is replaced, or after an interrupted replacement, is an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from janus_export.bundle.bundle import BundleError, load_bundle
from janus_modular import Janus, JanusError
from janus_modular.errors import CheckpointError
from janus_modular.weights.pretrained import resolve_pretrained


@pytest.mark.parametrize("read", [load_bundle, Janus.from_pretrained])
def test_a_folder_that_was_being_replaced_says_so(tmp_path: Path, read: Callable[[Path], Any]):
    (tmp_path / ".model.janus-old").mkdir()
    with pytest.raises(BundleError, match=r"a replacement is running or was interrupted.*\.model\.janus-old"):
        read(tmp_path / "model")
    (tmp_path / "model").mkdir()
    with pytest.raises(JanusError, match=r"no bundle|checkpoint"):
        read(tmp_path / "model")


def test_so_does_a_checkpoint(tmp_path: Path):
    (tmp_path / ".model.janus-old").mkdir()
    with pytest.raises(CheckpointError, match="a replacement is running or was interrupted"):
        resolve_pretrained(str(tmp_path / "model"))

"""The reference fixture as the complete published checkpoint that it stands for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

REFERENCE = Path(__file__).parents[2] / "fixtures" / "reference"


@pytest.fixture(scope="session")
def reference(reference_weights: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    """All published tensors, by name."""
    return reference_weights("")


@pytest.fixture(scope="session")
def published(reference: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder. Tests that change something in it take `description` and write their own weights."""
    folder = tmp_path_factory.mktemp("published") / "model"
    shutil.copytree(REFERENCE, folder)
    save_file(reference, folder / "model.safetensors")
    return folder


@pytest.fixture
def description(tmp_path: Path) -> Path:
    """A published folder without weights, to be edited."""
    folder = tmp_path / "described"
    shutil.copytree(REFERENCE, folder)
    return folder

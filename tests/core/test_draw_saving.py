"""An image that cannot be written is an error that says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from janus_modular.cli.draw import save
from janus_modular.errors import ImageError


def test_a_folder_without_write_permission_is_named(tmp_path: Path):
    (tmp_path / "file").touch()  # writing below a file fails for every user, root too, and so does removing
    with pytest.raises(ImageError, match=r"file/out\.png could not be written"):
        save(Image.new("RGB", (2, 2)), tmp_path / "file" / "out.png", {})

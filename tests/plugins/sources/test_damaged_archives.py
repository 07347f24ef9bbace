"""Damaged shards and tables are errors that name the file."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from janus_modular import DataError
from janus_plugins.sources.parquet import Parquet, ParquetConfig
from janus_plugins.sources.webdataset import WebDataset, WebDatasetConfig


@cache
def image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for key in ("a", "long/" * 50 + "b"):
            for suffix, content in (("png", image()), ("txt", b"a cat")):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mtime = len(content), 1.5
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def table() -> bytes:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    rows = [{"image": {"bytes": image(), "path": None}, "text": "a cat"}] * 4
    parquet.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=2)
    return buffer.getvalue()


FORMS: dict[str, tuple[Callable[[], bytes], Callable[[str], Any]]] = {
    "tar": (tar, lambda path: WebDataset(WebDatasetConfig(path=path))),
    "parquet": (table, lambda path: Parquet(ParquetConfig(path=path))),
}


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_an_error_of_the_file_or_of_a_sample(
    form: str, tmp_path: Path, mutations: ModuleType, data: st.DataObject
) -> None:
    whole, make = FORMS[form]
    path = tmp_path / f"damaged.{form}"
    path.write_bytes(data.draw(mutations.damaged_bytes(whole())))
    source = mutations.read_or_refused(lambda: make(str(path)), DataError, path.name)
    for index in range(len(source) if source is not None else 0):
        mutations.read_or_refused(
            lambda index=index: source.sample(index, np.random.default_rng(0)), DataError, path.name
        )

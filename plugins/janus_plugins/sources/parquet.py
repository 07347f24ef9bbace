"""Tables: Parquet files, and folders that ``save_to_disk`` of the package datasets wrote.

A row is a record, a column a key of it, in any form of the source ``jsonl``. An image is the bytes of a file,
a struct of ``bytes`` and ``path``, or a path. A row is read by its number, with its row group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from janus_modular import DataError, Registry, Sample, Source, hookimpl
from janus_plugins.records.fields import HARMLESS
from janus_plugins.records.hub import local_path
from janus_plugins.records.images import ImageFolder
from janus_plugins.records.options import RecordOptions
from janus_plugins.records.paths import digest_of_files, expand_paths
from janus_plugins.records.reader import RecordReader, located
from janus_plugins.records.tables import Rows, saved_files

IMAGE = "an image: binary, string, or struct<bytes: binary, path: string>"
IMAGES = f"{IMAGE}; or a list of them"
STRING = "string"
TURNS = "list<struct> with the keys of messages"
CLASS = "string, or integers with names (a ClassLabel of datasets)"

EXPECTED = {
    **dict.fromkeys(("image", "file_name", "images", "input_image", "output_image"), IMAGES),
    **dict.fromkeys(("caption", "text"), f"{STRING}, or a list of them"),
    "captions": f"{STRING}, or a list of them",
    "class": CLASS,
    **dict.fromkeys(("messages", "conversations"), TURNS),
    **dict.fromkeys(("system", "input_prompt"), STRING),
}
"""The types of a column, by the key that it is used as."""


@dataclass
class ParquetConfig(RecordOptions):
    """The files, and their columns."""

    expected: ClassVar[str] = "Parquet files, such as data/train-*.parquet"

    path: str = ""  # Parquet files, with braces and wildcards; a save_to_disk folder; or hf://datasets/OWNER/NAME/FILES
    columns: dict[str, str] = field(
        default_factory=dict
    )  # columns by the key of a record that they are used as, {image: jpg, caption: title}; {}: all
    images: str | None = None  # folder of images that are named by paths; null: that of the first file
    outside: bool = False  # allow images outside the folder (absolute paths, ..)
    ignore: list[str] = field(default_factory=list)  # columns, and keys inside them, without effect


class Parquet:
    """The rows of tables as samples, in the order of the files."""

    def __init__(self, config: ParquetConfig) -> None:
        """Open the files.

        Raises:
            DataError: a file is missing or damaged, or a column is missing or of another type.
            ModuleNotFoundError: pyarrow is not installed.
        """
        self.config = config
        local = local_path(config.path)
        path = Path(local).expanduser()
        self.paths = saved_files(path) if path.is_dir() else expand_paths(local)
        self.rows = Rows(self.paths, config.columns, [*config.ignore, *HARMLESS])
        self._class_names = class_names(self.rows.schema).get(self.rows.columns.get("class", ""), [])
        for key, column in self.rows.columns.items():
            self._check_type(key, column)
        folder = Path(config.images).expanduser() if config.images else self.paths[0].parent
        if not folder.is_dir():
            raise DataError(f"the folder of images '{folder}' does not exist: set `images`.")
        self._reader = RecordReader(ImageFolder(folder, config.outside), config, config.ignore)

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """Return a digest of the names and sizes of the files."""
        return digest_of_files(self.paths)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return the sample of row ``index``; ``rng`` chooses among captions, templates and questions.

        Raises:
            DataError: the row cannot be used; says the file, the row and the reason.
            UnsupervisedError: an answer that is to be learned is empty.
        """
        table, number = self.rows.position(index)
        with located(lambda: f"{table.path}, row {number}"):
            record = self.rows[index]
            if self._class_names and record.get("class") is not None:
                record["class"] = self._class_name(self._class_names, record["class"])
            return self._reader.sample(record, rng)

    def _class_name(self, names: list[str], label: int) -> str:
        if not 0 <= label < len(names):
            raise DataError(f"class: found {label}; expected a number from 0 to {len(names) - 1}.")
        return names[label]

    def _check_type(self, key: str, column: str) -> None:
        column_type = self.rows.schema.field(column).type
        expected = EXPECTED.get(key)
        if expected is None or (key == "class" and self._class_names) or _is_of_type(column_type, expected):
            return
        usage = "" if key == column else f", used as {key}"
        raise DataError(
            f"'{self.paths[0]}', column '{column}'{usage}: found {column_type}; expected {expected}."
            " Choose columns by the option columns: {image: COLUMN, caption: COLUMN}."
        )


def _is_of_type(column_type: Any, expected: str) -> bool:
    """Return True if a type of Arrow is among those that `EXPECTED` describes."""
    from pyarrow import types

    is_list = (
        types.is_list(column_type)
        or types.is_large_list(column_type)
        or types.is_fixed_size_list(column_type)
    )
    if expected == TURNS:
        return is_list and types.is_struct(column_type.value_type)
    if is_list and "list" in expected:
        return _is_of_type(column_type.value_type, expected)
    if types.is_dictionary(column_type):
        return _is_of_type(column_type.value_type, expected)
    if types.is_string(column_type) or types.is_large_string(column_type) or types.is_null(column_type):
        return True
    if expected != IMAGES:
        return False
    if types.is_struct(column_type):
        return {column_type.field(i).name for i in range(column_type.num_fields)} <= {"bytes", "path"}
    return types.is_binary(column_type) or types.is_large_binary(column_type)


def class_names(schema: Any) -> Mapping[str, list[str]]:
    """Return the names of classes by column, where datasets wrote them into a schema."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        columns = {
            name: feature.get("names")
            for name, feature in described.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):  # another writer's
        return {}
    return {name: list(map(str, names)) for name, names in columns.items() if isinstance(names, list)}


@hookimpl
def register_sources(registry: Registry[Source]) -> None:
    """Register ``parquet``."""
    registry.add("parquet", Parquet, ParquetConfig)

"""Rows of Parquet and Arrow files, read by number: Parquet by row groups, Arrow from a memory map."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from janus_modular import DataError

log = logging.getLogger(__name__)

CACHE_BYTES = 256 * 2**20
"""Decoded row groups that a source keeps."""

LARGE_GROUP = 64 * 2**20
"""Bytes of a row group above which a warning says that random reading is slow."""


class Table(Protocol):
    """The rows of a file."""

    path: Path
    schema: Any  # a pyarrow.Schema

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def row(self, number: int) -> dict[str, Any]:
        """Return a row by column; a value is None where the row has none."""
        ...


class RowGroupCache:
    """The row groups that were decoded last."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit
        self._bytes = 0
        self._tables: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple[Path, int]) -> Any:
        """Return a row group, or None."""
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            return self._tables.get(key)

    def put(self, key: tuple[Path, int], table: Any) -> None:
        """Keep a row group; those used least recently are dropped, until the limit holds or one is left."""
        with self._lock:
            if key not in self._tables:
                self._tables[key] = table
                self._bytes += table.nbytes
            while self._bytes > self._limit and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes


class ParquetTable:
    """A Parquet file. It is open only while a row group is read."""

    def __init__(self, path: Path, cache: RowGroupCache) -> None:
        """Read the footer.

        Raises:
            DataError: the file is not a Parquet file.
        """
        from pyarrow import parquet

        self.path = path
        self._cache = cache
        with _reading(path, "Parquet"), parquet.ParquetFile(path) as file:
            self._metadata = file.metadata
            self.schema = file.schema_arrow
        groups = [self._metadata.row_group(i) for i in range(self._metadata.num_row_groups)]
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])  # (groups + 1,)
        self.largest_group = max((group.total_byte_size for group in groups), default=0)
        self.columns: list[str] = list(self.schema.names)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, number: int) -> dict[str, Any]:
        """Return a row of `columns`.

        Raises:
            DataError: the row group cannot be decoded.
        """
        group = int(np.searchsorted(self._starts, number, "right")) - 1
        table = self._cache.get((self.path, group))
        if table is None:
            table = self._read(group)
            self._cache.put((self.path, group), table)
        with _reading(self.path, "Parquet"):
            return table.slice(number - int(self._starts[group]), 1).to_pylist()[0]

    def _read(self, group: int) -> Any:
        from pyarrow import parquet

        with (
            _reading(self.path, "Parquet"),
            parquet.ParquetFile(self.path, metadata=self._metadata) as file,
        ):
            return file.read_row_group(group, columns=self.columns, use_threads=False)


class ArrowTable:
    """A file of Arrow's streaming or file format, memory-mapped: a row is read from the map."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            DataError: the file is not an Arrow file.
        """
        import pyarrow

        self.path = path
        with _reading(path, "Arrow"):
            content = pyarrow.memory_map(str(path))
            is_file = content.read(6) == b"ARROW1"
            content.seek(0)
            open_format = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
            self._table = open_format(content).read_all()
        self.schema = self._table.schema
        self.columns: list[str] = list(self.schema.names)

    def __len__(self) -> int:
        return self._table.num_rows

    def row(self, number: int) -> dict[str, Any]:
        """Return a row of `columns`."""
        with _reading(self.path, "Arrow"):
            return self._table.select(self.columns).slice(number, 1).to_pylist()[0]


class Rows:
    """The rows of several files, with the columns that are used."""

    def __init__(self, paths: Sequence[Path], columns: Mapping[str, str], ignore: Sequence[str]) -> None:
        """Open the files; ``columns`` are those to use by key of a record, {}: all but ``ignore``.

        Raises:
            DataError: a file cannot be read, has no rows, or its columns differ from those of the first.
        """
        cache = RowGroupCache()
        self.tables = [
            ArrowTable(path) if path.suffix == ".arrow" else ParquetTable(path, cache) for path in paths
        ]
        first = self.tables[0]
        names = [name for name in first.schema.names if name not in ignore]
        self.columns = dict(columns or zip(names, names, strict=True))
        for table in self.tables:
            self._check_schema(table, first)
            table.columns = list(self.columns.values())
        self._starts = np.cumsum([0, *map(len, self.tables)])  # (tables + 1,)
        largest = max(getattr(table, "largest_group", 0) for table in self.tables)
        if largest > LARGE_GROUP:
            log.warning(
                "'%s' has row groups of up to %d MB; each sample that is read at random decodes a whole"
                " group. For faster reading, write the file again with fewer rows a group"
                " (row_group_size=100).",
                paths[0],
                largest / 1e6,
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def schema(self) -> Any:
        """Return the schema of the first file."""
        return self.tables[0].schema

    def position(self, number: int) -> tuple[Table, int]:
        """Return the file of a row, and the row's number in it."""
        table = int(np.searchsorted(self._starts, number, "right")) - 1
        return self.tables[table], number - int(self._starts[table])

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a row by key of a record."""
        table, row = self.position(number)
        values = table.row(row)
        return {key: values[column] for key, column in self.columns.items()}

    def _check_schema(self, table: Table, first: Table) -> None:
        for column in self.columns.values():
            if column not in table.schema.names:
                raise DataError(
                    f"'{table.path}' has no column '{column}'; its columns: {', '.join(table.schema.names)}."
                    " Correct the option columns."
                )
            types = [t.schema.field(column).type for t in (table, first)]
            if types[0] != types[1]:
                raise DataError(
                    f"'{table.path}', column '{column}': found {types[0]}; expected {types[1]}, as in"
                    f" {first.path}. Write all files with the same schema."
                )


def saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a folder that ``save_to_disk`` of the package datasets wrote.

    Raises:
        DataError: the folder is of another form.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(
            f"'{folder}' holds the splits {', '.join(splits)}; expected one of them: set `path` to"
            f" {folder / (splits[0] if splits else 'SPLIT')}, and so on."
        )
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        return [folder / Path(item["filename"]).name for item in state["_data_files"]]
    except FileNotFoundError as error:
        raise DataError(
            f"'{folder}' is a folder without state.json; expected one that save_to_disk wrote, or Parquet"
            f" files: {folder}/*.parquet"
        ) from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"'{folder / 'state.json'}' cannot be read: {error}. Save the data again.") from error


@contextmanager
def _reading(path: Path, form: str) -> Iterator[None]:
    """Turn errors of pyarrow into errors that name the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"'{path}' cannot be read as {form}: {error!s:.400}. Expected a complete file: fetch or write it"
            " again."
        ) from error

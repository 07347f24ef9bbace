"""Atomic writes: a file is complete or absent, whenever the process is killed; no lock stays behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from janus_modular.atomic_writes import (
    atomic_replace,
    atomic_replace_folder,
    folder_lock,
    remove_folder,
    restore,
    restore_all,
    temporary_path,
    write_text,
)
from janus_modular.errors import CheckpointError, JanusError
from janus_modular.locking import locked

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")

OLD, NEW = {"a": "old", "sub/b": "old"}, {"a": "new", "sub/c": "new"}


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def replace(folder: Path) -> None:
    with atomic_replace_folder(folder, error=CheckpointError) as temporary:
        fill(temporary, NEW)


def test_a_folder_that_is_replaced_is_the_old_or_the_new_whenever_it_is_killed(
    tmp_path: Path, killed_at: Any
) -> None:
    for number in count():
        folder = tmp_path / str(number) / "folder"
        fill(folder, OLD)
        was_killed = killed_at(number, lambda folder=folder: replace(folder))
        with folder_lock(folder, error=CheckpointError):  # which died with its process
            restore(folder)
        assert contents(folder) in (OLD, NEW)
        assert os.listdir(folder.parent) == ["folder"]
        replace(folder)
        assert contents(folder) == NEW
        if not was_killed:
            break
    assert number > 15  # every operation was tried


def test_the_next_write_needs_no_restoring_before(tmp_path: Path, killed_at: Any) -> None:
    folder = tmp_path / "folder"
    fill(folder, OLD)
    number = 0
    while killed_at(number, lambda: replace(folder)):
        number += 1
    assert contents(folder) == NEW
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_that_is_replaced_is_the_old_or_the_new_whenever_it_is_killed(
    tmp_path: Path, killed_at: Any
) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    for number in count():
        was_killed = killed_at(number, lambda: write_text(file, "new" * 10_000))
        assert file.read_text() in ("old", "new" * 10_000)
        if not was_killed:
            break
    assert number >= 4
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_removed_is_whole_or_gone(tmp_path: Path, killed_at: Any) -> None:
    folder = tmp_path / "folder"
    for number in count():
        fill(folder, OLD)
        was_killed = killed_at(number, lambda: remove_folder(folder))
        assert not folder.exists() or contents(folder) == OLD
        if not was_killed:
            break
    assert os.listdir(tmp_path) == []


def test_what_all_killed_writers_have_left_goes_and_what_is_locked_stays(tmp_path: Path) -> None:
    for name in ("a", "b.c", ".hidden"):
        fill(temporary_path(tmp_path / name, "new"), NEW)
        temporary_path(tmp_path / name, "lock").touch()
    fill(temporary_path(tmp_path / "lost", "old"), OLD)
    fill(tmp_path / ".b.janus-notes", OLD)  # nobody's
    restore_all(tmp_path, error=CheckpointError)
    assert sorted(os.listdir(tmp_path)) == [".b.janus-notes", "lost"]
    fill(temporary_path(tmp_path / "busy", "new"), NEW)
    with (
        folder_lock(tmp_path / "busy", error=CheckpointError),
        pytest.raises(CheckpointError, match=rf"another process is writing .*busy \(process {os.getpid()}\)"),
    ):
        restore_all(tmp_path, error=CheckpointError)
    assert contents(temporary_path(tmp_path / "busy", "new")) == NEW


def test_an_empty_folder_that_was_made_meanwhile_does_not_cost_the_old_content(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    fill(temporary_path(folder, "old"), OLD)
    folder.mkdir()
    restore(folder)
    assert contents(folder) == OLD


@pytest.mark.parametrize("error", [KeyError("mine"), OSError(28, "No space left"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_and_no_debris(tmp_path: Path, error: BaseException) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    fill(folder, OLD)
    file.write_text("old")

    def fail(temporary: Path) -> None:
        fill(temporary, NEW) if temporary.is_dir() else temporary.write_text("new")
        raise error

    for replacing in (atomic_replace_folder(folder, error=CheckpointError), atomic_replace(file)):
        with pytest.raises(type(error)), replacing as temporary:
            fail(temporary)
    assert contents(folder) == OLD
    assert file.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_locks_exclude_each_other_and_leave_nothing(tmp_path: Path) -> None:
    """Eight threads add to a number in a file; each takes the lock anew, and its file goes every time."""
    number = tmp_path / "number"
    number.write_text("0")

    def add() -> None:
        for _ in range(50):
            with locked(tmp_path / ".lock", number, wait=True):
                number.write_text(str(int(number.read_text()) + 1))

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert number.read_text() == "400"
    assert os.listdir(tmp_path) == ["number"]


def test_the_lock_of_a_folder_that_was_replaced_is_not_taken_for_that_of_the_new(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    fill(folder, OLD)
    with locked(folder / ".lock", folder):
        folder.rename(tmp_path / "away")
        fill(folder, NEW)
        (folder / ".lock").write_text("another's")
    assert (folder / ".lock").read_text() == "another's"


@pytest.mark.parametrize(
    "place", [lambda folder: folder / "file" / ".lock", lambda folder: folder / "missing" / ".lock"]
)
def test_a_place_that_takes_no_lock_is_an_error(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(JanusError, match=r"could not be written: .*Make .* writable"),
        locked(place(tmp_path), tmp_path),
    ):
        pass

"""Writes the checkpoints of a run: each process its share of the tensors, in the background if asked.

torch.distributed.checkpoint plans who writes what: of a sharded parameter, each process its part; what all of
them have, one process. The processes write into one temporary folder. When all are done, rank 0 adds the
checksums, which mark the checkpoint as complete, and renames the folder: nothing else publishes a checkpoint.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from janus_modular.atomic_writes import sync, temporary_path
from janus_modular.checkpoints.assembly import ModelAssembly
from janus_modular.checkpoints.native import MODEL_TYPE, stored_tensors, write_description
from janus_modular.config import to_plain
from janus_modular.training.engine import Engine
from janus_modular.training.processes import Processes
from janus_modular.training.run_folder import STATE, drop_old, point_latest, step_name
from janus_modular.training.schema import TrainConfig
from janus_modular.weights.checksums import write_checksums
from janus_modular.weights.chunks import chunk_name, is_chunk_file, sharding_metadata
from janus_modular.weights.writing import replace_checkpoint, write_error, write_json, write_shard


@dataclass(frozen=True)
class LocalChunk:
    """A part of a tensor, or the whole, and where it begins."""

    name: str
    offsets: Sequence[int]
    data: Tensor


@dataclass(frozen=True)
class Share:
    """What a process writes of a checkpoint."""

    files: Mapping[str, Sequence[LocalChunk]]  # by the names of its files
    index: Mapping[str, Any] | None  # of the weights, where they are whole and in several files

    def staged(self) -> Share:
        """Return a copy of all tensors in the host's memory, which training cannot change."""
        copies = {
            file: [LocalChunk(chunk.name, chunk.offsets, chunk.data.to("cpu", copy=True)) for chunk in chunks]
            for file, chunks in self.files.items()
        }
        return Share(copies, self.index)


class _CancelledError(Exception):
    """The write of a process was cancelled: that of another has failed."""


class WriteTask:
    """Writes a share into the temporary folder of the checkpoint ``folder``, in a thread or at once.

    The thread is a daemon: it keeps no process alive that ends for another reason. It hands memory to the
    system and to the hash function, both of which release Python's lock.
    """

    def __init__(self, folder: Path, share: Share, *, background: bool) -> None:
        self.error: Exception | None = None
        self._folder, self._share = folder, share
        self._is_cancelled = False
        self._hashes: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        if background:
            self._thread.start()
        else:
            self._run()

    @property
    def is_running(self) -> bool:
        """Return True until the write has ended, well or not."""
        return self._thread.is_alive()

    def result(self) -> dict[str, str]:
        """Wait for the end, and return the hashes by the names of files, or raise the error."""
        if self._thread.is_alive():
            self._thread.join()
        if self.error is not None:
            raise self.error
        return self._hashes

    def cancel(self) -> None:
        """End the write before its next tensor, and wait for that."""
        self._is_cancelled = True
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._hashes = write_share(self._folder, self._share, self._check_cancelled)
        except _CancelledError:
            pass
        except Exception as error:
            self.error = error

    def _check_cancelled(self) -> None:
        if self._is_cancelled:
            raise _CancelledError


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that is being written."""

    folder: Path
    temporary: ExitStack  # on rank 0, holds the temporary folder; when it closes, the folder is renamed
    task: WriteTask
    index: Mapping[str, Any] | None


class CheckpointWriter:
    """Writes checkpoints of a run, one at a time. All processes call the same methods in the same order."""

    def __init__(
        self, assembly: ModelAssembly, engine: Engine[Any], config: TrainConfig, last: Path | None = None
    ) -> None:
        """Write checkpoints of the engine's state; ``last`` is the one that the run resumed from."""
        self.assembly, self.engine, self.config = assembly, engine, config
        self.last = last  # the newest complete checkpoint
        self._pending: PendingCheckpoint | None = None

    def save(self, record: Mapping[str, Any], *, background: bool = False) -> None:
        """Write ``checkpoints/step-N``.

        ``record`` is what config.json says of the training beside step and config: the data, for example.
        A checkpoint that is still being written is completed first. In the background, this returns as soon
        as the tensors are copied; `poll` publishes the checkpoint.

        Raises:
            TrainingError: the state holds numbers that are not finite.
            CheckpointError: writing failed, in this process or another.
        """
        self.complete()
        engine, processes = self.engine, self.engine.processes
        engine.check_finite()
        folder = Path(self.config.output) / "checkpoints" / step_name(engine.next_step)
        training = {"step": engine.next_step, "config": to_plain(self.config), **record}
        state = engine.state_dict()
        temporary = ExitStack()

        def write_all_but_tensors() -> None:
            path = temporary.enter_context(replace_checkpoint(folder, replaces=MODEL_TYPE))
            write_description(self.assembly, path, name=Path(self.config.output).name, training=training)
            write_json(path / STATE, state["record"])

        try:
            processes.on_first(write_all_but_tensors)
            share = plan_share(stored_tensors(self.assembly.model), state["tensors"], processes)
            share = share.staged() if background else share
            task = WriteTask(folder, share, background=background)
        except BaseException:
            temporary.__exit__(*sys.exc_info())
            raise
        self._pending = PendingCheckpoint(folder, temporary, task, share.index)
        if not background:
            self.complete()

    def poll(self) -> None:
        """Publish the checkpoint that is written in the background, once all processes are done.

        Raises:
            CheckpointError: writing failed in a process; that of the others is cancelled.
        """
        if self._pending is None:
            return
        task = self._pending.task
        states = self.engine.processes.gather((task.is_running, task.error is not None))
        has_failed = any(failed for _, failed in states)
        if has_failed or not any(running for running, _ in states):
            self.complete(wait=not has_failed)

    def complete(self, *, wait: bool = True) -> None:
        """Wait for the checkpoint that is being written, if there is one, and publish it.

        Without ``wait``, writes are cancelled: that of a process has failed.

        Raises:
            CheckpointError: writing failed in a process.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        processes, task = self.engine.processes, pending.task

        def publish(hashes: Sequence[Mapping[str, str]]) -> None:
            temporary = temporary_path(pending.folder, "new")
            if pending.index is not None:
                write_json(temporary / "model.safetensors.index.json", pending.index)
            write_checksums(temporary, {name: value for of_rank in hashes for name, value in of_rank.items()})
            pending.temporary.close()
            point_latest(pending.folder)
            drop_old(Path(self.config.output), self.config.keep)

        try:
            if not wait:
                task.cancel()
            result = task.result if wait or task.error is not None else dict
            hashes = processes.gather(processes.together(result))
            processes.on_first(lambda: publish(hashes))
        except BaseException:
            pending.temporary.__exit__(*sys.exc_info())
            raise
        self.last = pending.folder


def plan_share(weights: Mapping[str, Tensor], state: Mapping[str, Tensor], processes: Processes) -> Share:
    """Return what this process writes. All processes call this with their own chunks of the tensors.

    Where all weights are whole, their files are those of a usual checkpoint, with an index if there are
    several; weights in chunks are joined when they are read (`janus_modular.weights.chunks`).
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({**weights, **state}, is_coordinator=processes.is_first)
    plans, metadata = planner.create_global_plan(processes.gather(planner.create_local_plan()))
    counts = {name: len(value.chunks) for name, value in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]  # all tensors
    are_whole = all(counts[name] == 1 for name in weights)
    files = [_file_names(rank, processes.world, are_whole) for rank in range(processes.world)]
    chunks: dict[str, list[LocalChunk]] = {name: [] for name in files[processes.rank]}
    for item in planner.finish_plan(plans[processes.rank]).items:
        name, data = item.index.fqn, planner.resolve_data(item)
        assert item.tensor_data is not None
        assert isinstance(data, Tensor)
        file = files[processes.rank][name not in weights]
        chunks[file].append(LocalChunk(name, [*item.tensor_data.chunk.offsets], data.detach()))
    if processes.world == 1 or not are_whole:
        return Share(chunks, None)
    owners = {item.index.fqn: rank for rank, plan in enumerate(plans) for item in plan.items}
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    weight_map = {name: files[owners[name]][0] for name in weights}
    return Share(chunks, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _file_names(rank: int, world: int, are_whole: bool) -> tuple[str, str]:
    """Return the names of a process's files of weights and of training state."""
    if world == 1:
        return "model.safetensors", "training.safetensors"
    whole = f"model-{rank + 1:05}-of-{world:05}.safetensors"
    return whole if are_whole else chunk_name("model", rank, world), chunk_name("training", rank, world)


def write_share(folder: Path, share: Share, before_tensor: Callable[[], None]) -> dict[str, str]:
    """Write a process's files into the temporary folder of the checkpoint ``folder``; return their hashes.

    Raises:
        CheckpointError: a file cannot be written.
    """
    temporary, hashes = temporary_path(folder, "new"), {}
    try:
        for file, chunks in share.files.items():
            offsets = {chunk.name: chunk.offsets for chunk in chunks}
            metadata = sharding_metadata(offsets) if is_chunk_file(file) else None
            tensors = [(chunk.name, chunk.data) for chunk in chunks]
            _, hashes[file], _ = write_shard(
                temporary / file, tensors, metadata=metadata, before_tensor=before_tensor
            )
            sync(temporary / file)
    except OSError as error:
        raise write_error(folder, error) from error
    return hashes

"""The processes of a run, as torchrun starts them: their collective operations, and errors on every rank.

Each process (a rank) has the whole model and its share of every step's samples. Gradients are summed over the
ranks before an update, so that a step is the step of a single process, up to the rounding of sums.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from janus_modular.errors import ConfigError, JanusError, TrainingError
from janus_modular.foreign import reason
from janus_modular.training.failing_components import raising_component

T = TypeVar("T")

LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec", "SLURM_STEP_NUM_TASKS": "srun"}
"""Variables in which other launchers pass the number of processes, without torchrun's."""

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others; the slowest may read a checkpoint of many gigabytes meanwhile."""

BUCKET = 2**25
"""Elements of gradients that are summed at once: 128 MiB in float32."""


class OtherRankError(TrainingError):
    """An error of another rank, raised on all ranks at the same point of the run."""


class RankError(TrainingError):
    """An error in the middle of a step, which the other ranks learn of only when this process has ended."""


class LostRankError(RankError):
    """Another process has ended, so that no collective operation is possible any more."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among those of this machine

    @classmethod
    def from_environment(cls) -> Processes:
        """Read torchrun's variables; a single process where there are none.

        Raises:
            TrainingError: another launcher has started several processes, or a variable is no number.
        """
        values = {name: os.environ.get(name, "").strip() for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if values["WORLD_SIZE"] in ("", "1"):
            for name, launcher in LAUNCHERS.items():
                if (count := os.environ.get(name, "").strip()) not in ("", "1"):
                    raise TrainingError(
                        f"{name}={count}: {launcher} started several processes, and each would train the same"
                        " model on the same samples. Start one torchrun on each machine, which starts the"
                        f" processes; if {name} was set for something else, unset it."
                    )
            return cls()
        try:
            rank, world = int(values["RANK"]), int(values["WORLD_SIZE"])
            local_rank = int(values["LOCAL_RANK"] or rank)
            if not 0 <= rank < world:
                raise ValueError
        except ValueError as error:
            listed = ", ".join(f"{name}={value or '(not set)'}" for name, value in values.items())
            raise TrainingError(
                f"found {listed}; expected RANK from 0 to WORLD_SIZE - 1, as torchrun sets them:"
                " torchrun --nproc-per-node 8 -m janus_modular train CONFIG"
            ) from error
        return cls(rank, world, local_rank)

    @property
    def is_first(self) -> bool:
        """True on rank 0, which alone prints, logs and writes."""
        return self.rank == 0

    @contextmanager
    def started(self, device: torch.device) -> Iterator[None]:
        """Connect the processes; on CUDA, gradients go over NCCL, and all else over gloo.

        Each run has a prefix of its own in the store through which processes exchange addresses: torch uses
        the same keys for every default group, so that in a second run of the same processes, one could read
        the address that another had in the first, and all would hang.

        Raises:
            TrainingError: the others cannot be reached.
        """
        if self.world == 1 or dist.is_initialized():  # by the command that runs several stages
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            store = PrefixStore(f"run-{next(_run_numbers)}", _rendezvous_store())
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.world, timeout=TIMEOUT
            )
        except Exception as error:  # of several classes
            raise TrainingError(
                f"rank {self.rank} does not reach the other {self.world - 1} processes: {reason(error)}."
                " Check torchrun's --rdzv-endpoint, and that the machines reach each other"
            ) from error
        try:
            yield
        finally:
            dist.destroy_process_group()

    def device(self, chosen: torch.device, name: str) -> torch.device:
        """Return the device of this process: of several GPUs, the one of its number on the machine.

        Raises:
            ConfigError: the config's device, called ``name``, is one GPU for all, or there are too few.
        """
        if self.world == 1 or chosen.type != "cuda":
            return chosen
        if ":" in name:
            raise ConfigError(
                f"device: found {name} with {self.world} processes; expected auto or cuda: each process takes"
                " the GPU of its own number"
            )
        if self.local_rank >= (count := torch.cuda.device_count()):
            raise ConfigError(
                f"this machine has {count} GPUs, and a process number {self.local_rank}, counted from 0:"
                f" expected --nproc-per-node {count} at most"
            )
        return torch.device("cuda", self.local_rank)

    def check_batch(self, batch: int) -> None:
        """Check that each process gets as many samples of a step.

        Raises:
            ConfigError: the batch is no multiple of the number of processes.
        """
        if batch % self.world:
            below = max(batch // self.world, 1) * self.world
            raise ConfigError(
                f"batch: {batch} samples a step cannot be divided among {self.world} processes; expected a"
                f" multiple, {below} say. (A run that is resumed keeps its batch: choose another number of"
                " processes.)"
            )

    def gather(self, value: T) -> list[T]:
        """Return the value of each rank, in order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:  # of a connection that was closed
            raise LostRankError(_ended(self.rank)) from error
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Run ``action`` on all ranks; if it fails on one, raise an error on all of them.

        Raises:
            OtherRankError: the action failed on another rank; with that rank's message.
        """
        if self.world == 1:
            return action()
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        messages = self.gather(None if failure is None else _message(failure))
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise OtherRankError(f"rank {rank}: {message}")
        return result

    def on_first(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 alone, and return its result on all ranks; it must be picklable."""
        value: Any = self.together(lambda: action() if self.is_first else None)
        return self.gather(value)[0]

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace the gradient of each parameter by the sum over the ranks, in place.

        A rank whose samples did not reach a parameter adds nothing; where none did, the gradient stays None.
        """
        if self.world == 1:
            return
        try:
            used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
            dist.all_reduce(used, dist.ReduceOp.MAX)
            reached = [p for p, count in zip(parameters, used.tolist(), strict=True) if count]
            for bucket in _buckets(reached):
                flat = torch.cat(
                    [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
                )
                dist.all_reduce(flat)
                for parameter, total in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                    parameter.grad = total.view_as(parameter).clone()
        except RuntimeError as error:
            raise LostRankError(_ended(self.rank)) from error

    def rank_error(self, error: Exception, step: int) -> RankError:
        """Return the error of one rank in the middle of a step, or that another rank is lost."""
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # in a collective of sharded components
            return LostRankError(_ended(self.rank))
        return RankError(f"rank {self.rank}, step {step}: {describe_error(error)}")

    def sum_tensor(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum over the ranks, in place."""
        if self.world > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError as error:
                raise LostRankError(_ended(self.rank)) from error

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set on any rank."""
        return any(self.gather(flag))

    def sum_means(self, means: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """Return the sums over the ranks of metrics that are (sum, weight), by name."""
        if self.world == 1:
            return dict(means)
        total: dict[str, tuple[float, float]] = {}
        for of_rank in self.gather(dict(means)):
            for name, (value, weight) in of_rank.items():
                before = total.get(name, (0.0, 0.0))
                total[name] = (before[0] + value, before[1] + weight)
        return total

    def check_equal(self, name: str, value: Any) -> None:
        """Check that a value is the same on all ranks.

        Raises:
            TrainingError: it differs.
        """
        values = self.gather(value)
        for rank, of_rank in enumerate(values):
            if of_rank != values[0]:
                raise TrainingError(
                    f"{name} differs: {values[0]!r:.200} on rank 0, {of_rank!r:.200} on rank {rank}; expected"
                    " the same on all ranks. Start all of them with the same command, versions and files"
                )


_run_numbers = itertools.count()
"""The numbers of this process's runs, which are the same in all processes that a launcher started."""


@cache
def _rendezvous_store() -> Store:
    """Return the store at torchrun's MASTER_ADDR and MASTER_PORT, which stays open for further runs."""
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    return store


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield runs of parameters of one dtype and device, of up to `BUCKET` elements, or a single one."""
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        fits = not bucket or (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if bucket and (not fits or size + parameter.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, JanusError) else f"{type(error).__name__}: {reason(error)}"


def _ended(rank: int) -> str:
    return f"another process of the run has ended, and rank {rank} with it; its own message says why"


def describe_error(error: Exception) -> str:
    """Return the cause of an error in a step on a line, with what helps against it."""
    message = str(error).partition("\n")[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in message:
        return (
            f"out of memory ({message or type(error).__name__}). Raise accumulate, which computes the same in"
            " smaller micro-batches, or lower length."
        )
    component = raising_component(error)
    suffix = f" (in {component})" if component else ""
    return (
        f"{type(error).__name__}: {message or 'no message'}{suffix}. To see where it was raised: --traceback"
    )


def check_single_process() -> None:
    """Check that this is the only process: each of several would do the same work in the same folder.

    Raises:
        TrainingError: a launcher has started several processes.
    """
    if (world := Processes.from_environment().world) > 1:
        raise TrainingError(
            f"WORLD_SIZE={world}: a launcher started several processes, and this command takes one. Start it"
            " without torchrun or the like; if WORLD_SIZE was set for something else, unset it."
        )

"""Whether a part can be sharded: the same numbers from two processes that each hold half of its weights.

The two are started once, on gloo, and serve every component. A component goes to them as multiprocessing
sends things, so its class has to be importable; nothing of it touches a file.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from janus_modular.errors import CheckError
from janus_modular.plugins.loading import FILE_MODULE, load_file
from janus_modular.registry import MODEL_SLOTS
from janus_modular.testing.calls import Calling, calls_of, tensors, weighing
from janus_modular.testing.check import NotApplicable, check_for, ensure
from janus_modular.testing.comparing import ensure_same

WAIT = 300.0
"""Seconds until an answer that does not come is a failure: a collective that one rank never reaches hangs."""


@check_for(*MODEL_SLOTS, slow=True)
def check_sharding(component: Any, example: Tensor, *, slot: str) -> None:
    """FSDP2 shards it over two processes, and forward and backward are the same."""
    if not any(weight.requires_grad for weight in component.parameters()):
        raise NotApplicable("it has no parameters")
    if not torch.distributed.is_available():
        raise NotApplicable("this torch has no torch.distributed")
    if type(component).__module__ == "__main__":
        raise NotApplicable("its class is in __main__, where other processes do not find it")
    try:
        message = pickle.dumps((plugin_files(), pickle.dumps((component, example, slot))))
    except Exception as error:
        raise CheckError(f"it cannot be sent to another process: {error}") from error
    fault = _pair().ask(message)
    ensure(not fault, fault)


def plugin_files() -> list[Path]:
    """Return the local plugin files that this process has loaded: others have to load them, too."""
    loaded = {name: module for name, module in sys.modules.items() if name.startswith(FILE_MODULE)}
    return [Path(str(module.__file__)) for module in loaded.values()]


class GlooPair:
    """Two processes in one gloo group, that try what they are sent."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        spawn = multiprocessing.get_context("spawn")
        store = str(Path(self._folder.name, "store"))
        self._pipes, self._processes = [], []
        for rank in range(2):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, store, list(sys.path), there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def ask(self, message: bytes) -> str:
        """Try a component on both; return what is wrong, or nothing."""
        for pipe in self._pipes:
            pipe.send_bytes(message)
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answers.append(pipe.recv() if pipe.poll(WAIT) else f"process {rank} did not answer")
            except EOFError:
                answers.append(f"process {rank} ended with code {self._processes[rank].exitcode}")
        if any("process " in answer for answer in answers):
            close_pair()  # they may be out of step: the next component gets new ones
        return next(filter(None, answers), "")

    def close(self) -> None:
        """End both."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.terminate()
            process.join()
        self._folder.cleanup()


_the_pair: GlooPair | None = None


def _pair() -> GlooPair:
    global _the_pair
    if _the_pair is None:
        _the_pair = GlooPair()
    return _the_pair


def close_pair() -> None:
    """End the two processes, if they run; the next question starts new ones."""
    global _the_pair
    if _the_pair is not None:
        _the_pair.close()
        _the_pair = None


def _serve(rank: int, store: str, path: list[str], pipe: Connection) -> None:
    """Answer until the pipe closes."""
    sys.path[:] = path
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=WAIT)
    )
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            files, parcel = pickle.loads(message)
            for file in files:
                load_file(file)
            _try(*pickle.loads(parcel))
            pipe.send("")
        except CheckError as error:
            pipe.send(str(error))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            pipe.send(f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")


def _try(component: nn.Module, example: Tensor, slot: str) -> None:
    """Shard a copy, and compare it with the whole, call by call.

    Raises:
        CheckError: they differ.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    component.eval()
    for call in calls_of(component, example, slot):
        whole, sharded = (Calling(copy.deepcopy(component), call) for _ in range(2))
        fully_shard(sharded)
        outputs = [module(*call.inputs) for module in (whole, sharded)]
        ensure_same(outputs[1], outputs[0], f"{call.name}, sharded")
        for output in outputs:
            floats = [x for x in tensors(output) if x.requires_grad]
            if floats:
                torch.stack([(weighing(x) * x).sum() for x in floats]).sum().backward()
        for (name, ours), (_, theirs) in zip(
            whole.named_parameters(), sharded.named_parameters(), strict=True
        ):
            found = theirs.grad.full_tensor() if isinstance(theirs.grad, DTensor) else theirs.grad
            ensure(
                (ours.grad is None) == (found is None),
                f"{call.name}: {name} has {'a' if found is not None else 'no'} gradient, sharded, and"
                f" {'a' if ours.grad is not None else 'no'} gradient as a whole: forward has to read it from"
                " the module that owns it",
            )
            if ours.grad is not None and found is not None:
                ensure_same(found, ours.grad, f"{call.name}: the gradient of {name}, sharded")

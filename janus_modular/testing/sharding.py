"""The sharding check: two processes, each with half of a component's weights, compute the same as one.

The processes are started once, with gloo, and serve every component. Components are sent to them by
multiprocessing, so their classes have to be importable; nothing is written to a file.
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
from janus_modular.testing.calls import CallModule, calls_of, fixed_weights, tensors
from janus_modular.testing.check import NotApplicable, check_for, ensure
from janus_modular.testing.comparing import ensure_close

TIMEOUT = 300.0
"""Seconds until a missing answer is a failure: a collective that one rank does not reach hangs."""


@check_for(*MODEL_SLOTS, slow=True)
def check_sharding(component: Any, example: Tensor, *, slot: str) -> None:
    """Sharded over two processes by FSDP2, forward and backward give the same results."""
    if not any(weight.requires_grad for weight in component.parameters()):
        raise NotApplicable("it has no parameters")
    if not torch.distributed.is_available():
        raise NotApplicable("this torch has no torch.distributed")
    if type(component).__module__ == "__main__":
        raise NotApplicable("its class is in __main__, which other processes cannot import")
    try:
        content = pickle.dumps((component, example, slot))
        message = pickle.dumps((plugin_files(content), content))
    except Exception as error:
        raise CheckError(f"it cannot be sent to another process: {error}") from error
    error_text = _pair().check(message)
    ensure(not error_text, error_text)


def plugin_files(content: bytes) -> list[Path]:
    """Return the local plugin files whose classes a pickle names, for the other processes to load."""
    loaded = {name: module for name, module in sys.modules.items() if name.startswith(FILE_MODULE)}
    return [Path(str(module.__file__)) for name, module in loaded.items() if name.encode() in content]


class GlooPair:
    """Two processes of a gloo group, which check the components that they are sent."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        spawn = multiprocessing.get_context("spawn")
        store = str(Path(self._folder.name, "store"))
        self._pipes, self._processes = [], []
        for rank in range(2):
            pipe, child_pipe = spawn.Pipe()
            process = spawn.Process(
                target=_serve, args=(rank, store, list(sys.path), child_pipe), daemon=True
            )
            process.start()
            child_pipe.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def check(self, message: bytes) -> str:
        """Check a component in both processes; return the error, or ""."""
        for pipe in self._pipes:
            pipe.send_bytes(message)
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answers.append(pipe.recv() if pipe.poll(TIMEOUT) else f"process {rank} did not answer")
            except EOFError:
                answers.append(f"process {rank} ended with code {self._processes[rank].exitcode}")
        if any("process " in answer for answer in answers):
            close_pair()  # the processes may be out of step: the next component gets new ones
        return next(filter(None, answers), "")

    def close(self) -> None:
        """End both processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.terminate()
            process.join()
        self._folder.cleanup()


_shared_pair: GlooPair | None = None


def _pair() -> GlooPair:
    global _shared_pair
    if _shared_pair is None:
        _shared_pair = GlooPair()
    return _shared_pair


def close_pair() -> None:
    """End the two processes if they run; the next check starts new ones."""
    global _shared_pair
    if _shared_pair is not None:
        _shared_pair.close()
        _shared_pair = None


def _serve(rank: int, store: str, path: list[str], pipe: Connection) -> None:
    """Check components until the pipe closes."""
    sys.path[:] = path
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            files, arguments = pickle.loads(message)
            for file in files:
                load_file(file)
            _check(*pickle.loads(arguments))
            pipe.send("")
        except CheckError as error:
            pipe.send(str(error))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            pipe.send(f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})")


def _check(component: nn.Module, example: Tensor, slot: str) -> None:
    """Compare a sharded copy of a component with an unsharded one, call by call.

    Raises:
        CheckError: results or gradients differ.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    component.eval()
    for call in calls_of(component, example, slot):
        whole, sharded = (CallModule(copy.deepcopy(component), call) for _ in range(2))
        fully_shard(sharded)
        outputs = [module(*call.inputs) for module in (whole, sharded)]
        ensure_close(outputs[1], outputs[0], f"{call.name}, sharded")
        for output in outputs:
            floats = [x for x in tensors(output) if x.requires_grad]
            if floats:
                torch.stack([(fixed_weights(x) * x).sum() for x in floats]).sum().backward()
        for (name, weight), (_, shard) in zip(
            whole.named_parameters(), sharded.named_parameters(), strict=True
        ):
            gradient = shard.grad.full_tensor() if isinstance(shard.grad, DTensor) else shard.grad
            ensure(
                (weight.grad is None) == (gradient is None),
                f"{call.name}: {name} has {'a' if gradient is not None else 'no'} gradient when sharded, and"
                f" {'a' if weight.grad is not None else 'no'} gradient otherwise: forward has to read it from"
                " the module that owns it",
            )
            if weight.grad is not None and gradient is not None:
                ensure_close(gradient, weight.grad, f"{call.name}: the gradient of {name}, sharded")

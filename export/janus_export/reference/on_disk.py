"""A torch model without weights in memory: each is read from its file whenever it is used, then released.

A model of any size thus runs in the memory of its largest weight. Every forward pass reads all weights again,
which is slow: use it only for comparisons.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from janus_export.onnx_export.weights import Source, native_names
from janus_modular.checkpoints.opening import LazyCheckpoint
from janus_modular.model.model import JanusModel


class OnDisk(torch.Tensor):
    """A weight that is read when it is used; all computation with it is in float32."""

    fetch: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, fetch: Callable[[], Tensor]) -> OnDisk:
        """Represent the tensor that ``fetch`` returns, in the precision in which it is stored."""
        computed_dtype = torch.float32 if dtype.is_floating_point else dtype
        tensor: OnDisk = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=computed_dtype)
        tensor.fetch = fetch
        return tensor

    def read(self) -> Tensor:
        """Return the weight itself; a copy where it is stored in another precision."""
        return self.fetch().detach().to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # its stub lacks func
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Read what an operator is about to use."""
        args, kwargs = tree_map_only(OnDisk, OnDisk.read, (args, kwargs or {}))
        return func(*args, **kwargs)


def leave_on_disk(opened: LazyCheckpoint) -> JanusModel:
    """Make a checkpoint's model on the meta device read each weight when it is used.

    Raises:
        ExportError: the checkpoint lacks a weight, or has it in another shape.
    """
    model = opened.model
    source = Source(model, opened.tensors, str(opened.folder))
    weights = {
        stored: OnDisk(
            source.shapes[stored], source.dtypes[stored], partial(opened.tensors.__getitem__, name)
        )
        for stored, name in source.under.items()
    }
    for name, stored in native_names(model).items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        held = owner._parameters if attribute in owner._parameters else owner._buffers
        held[attribute] = weights[stored]  # type: ignore[assignment]  # not a Parameter: nothing is trained
    return model.eval()


def float32_bytes(opened: LazyCheckpoint) -> int:
    """Return how many bytes the weights of a checkpoint take in float32, tied ones once."""
    weights = {id(weight): weight for weight in opened.model.state_dict(keep_vars=True).values()}
    return sum(4 * weight.numel() for weight in weights.values())


def free_bytes() -> int | None:
    """Return the bytes of memory that are available; None if the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts what the file cache would give up, too
        lines = dict(line.split(":") for line in meminfo.read_text("ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None

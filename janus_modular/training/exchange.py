"""What the processes of a run exchange inside the losses of a step: examples, with gradients, and sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def gather_examples(x: Tensor) -> Tensor:
    """Return the rows (n, ...) of all processes as (world * n, ...), in the order of a single process.

    Gradients flow back to the processes that the rows are from: each gets the sum over all processes, as the
    loss of a step is the sum of their shares. All processes call this, each with n rows.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    result: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]  # torch's is untyped
    return result


def gathered_rows(n: int) -> Tensor:
    """Return where the ``n`` rows of this process are in what `gather_examples` returns (n,)."""
    if not (dist.is_available() and dist.is_initialized()):
        return torch.arange(n)
    return torch.arange(n) * dist.get_world_size() + dist.get_rank()  # `Mixture.sample_refs` deals them so


def sum_over_processes(x: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, without gradients."""
    total = x.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())
        ]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)  # row i of rank r is row i * world + r

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        [gradient] = gradients
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank() :: dist.get_world_size()]

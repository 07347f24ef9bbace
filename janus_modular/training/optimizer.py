"""AdamW over the trainable parameters of a module, and the schedule of its learning rate."""

from __future__ import annotations

from math import cos, pi

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from janus_modular.training.schema import OptimizerConfig, ScheduleConfig


def by_decay(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable parameters of ``module`` that weight decay applies to, and the others.

    The papers use weight decay in one stage only (Janus, table 1: 0.1 in stage 3) and do not say for which
    parameters. We follow common practice: matrices and kernels decay; biases, norms, embedding tables and
    position embeddings that are bare parameters do not.
    """
    owners = {
        id(parameter): owner for owner in module.modules() for parameter in owner.parameters(recurse=False)
    }
    embeddings = {
        id(owner.weight) for owner in module.modules() if isinstance(owner, nn.Embedding)
    }  # includes output weights that are tied to an embedding
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_embedding = id(parameter) in embeddings or "pos" in name.rpartition(".")[2]
        is_norm = "norm" in type(owners[id(parameter)]).__name__.lower()
        (not_decayed if parameter.ndim < 2 or is_embedding or is_norm else decayed).append(parameter)
    return decayed, not_decayed


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of ``module``, with weight decay as `by_decay` says."""
    decayed, not_decayed = by_decay(module)
    groups = [
        {"params": [p for p in parameters if isinstance(p, DTensor) is sharded], "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (not_decayed, 0.0))
        for sharded in (False, True)  # which no fused update mixes
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in decayed + not_decayed)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, fused=fused
    )


def lr_factor(schedule: ScheduleConfig, step: int) -> float:
    """Return the factor of the learning rate at ``step`` (from 0): linear warmup, then constant or cosine."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.final + (1 - schedule.final) * (1 + cos(pi * min(1.0, progress))) / 2

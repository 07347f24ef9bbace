"""AdamW as the papers use it, and the learning rate's course."""

from __future__ import annotations

from math import cos, pi

import torch
from torch import nn

from janus_modular.training.schema import OptimizerConfig, ScheduleConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over what of ``module`` learns, decayed weights in its first group.

    The papers decay in one stage only (Janus, table 1: 0.1 in stage 3) and do not say what; we follow
    common practice: matrices and kernels decay; biases, norms, embedding tables and the position
    embeddings that are bare parameters do not.
    """
    owners = {
        id(parameter): owner for owner in module.modules() for parameter in owner.parameters(recurse=False)
    }
    embeddings = {
        id(owner.weight) for owner in module.modules() if isinstance(owner, nn.Embedding)
    }  # tied logits are embeddings too
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_embedding = id(parameter) in embeddings or "pos" in name.rpartition(".")[2]
        is_norm = "norm" in type(owners[id(parameter)]).__name__.lower()
        (kept if parameter.ndim < 2 or is_embedding or is_norm else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in decayed + kept)  # one kernel for all of them
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, fused=fused
    )


def rate(schedule: ScheduleConfig, step: int) -> float:
    """Return the share of the learning rate at ``step`` (from 0): a straight rise, then the course."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.final + (1 - schedule.final) * (1 + cos(pi * min(1.0, done))) / 2

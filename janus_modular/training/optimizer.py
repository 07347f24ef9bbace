"""The optimizers of the trainable parameters of a module, and the schedule of their learning rates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from math import cos, pi
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from janus_modular.errors import ConfigError
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


class OptimizerList:
    """Optimizers of different parameters, which are used as a single optimizer."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """Return the state of each parameter that an update has changed."""
        return dict(chain.from_iterable(optimizer.state.items() for optimizer in self.optimizers))

    def state_names(self) -> dict[Any, set[str]]:
        """Return the names of what an optimizer keeps of each of its parameters."""
        return {
            parameter: STATE_NAMES[type(optimizer)]
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def load_state(self, state: Mapping[Any, dict[str, Any]]) -> None:
        """Restore the state of each parameter; the settings of the groups stay."""
        for optimizer in self.optimizers:
            groups = optimizer.state_dict()["param_groups"]
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            indexed = {index: state[parameter] for index, parameter in enumerate(own) if parameter in state}
            optimizer.load_state_dict({"state": indexed, "param_groups": groups})

    def step(self) -> None:
        """Update all parameters that have a gradient."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


STATE_NAMES: dict[type[torch.optim.Optimizer], set[str]] = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Muon: {"momentum_buffer"},
}
"""What each optimizer keeps of a parameter."""


def build_optimizers(
    module: nn.Module, config: OptimizerConfig, own: Mapping[str, OptimizerConfig]
) -> OptimizerList:
    """Return the optimizers of a module, some of whose submodules have their ``own``, by path.

    Raises:
        ConfigError: as `build_optimizer` does.
    """
    apart = {path: module.get_submodule(path) for path in own}
    left_out = {id(p) for submodule in apart.values() for p in submodule.parameters()}
    optimizers = build_optimizer(module, config, left_out=left_out).optimizers
    for path, submodule in apart.items():
        optimizers += build_optimizer(submodule, own[path], label=path).optimizers
    return OptimizerList(optimizers)


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, *, left_out: Collection[int] = (), label: str = ""
) -> OptimizerList:
    """Return the optimizers of the trainable parameters of ``module``, with weight decay as `by_decay` says.

    AdamW, and Muon (torch's own) for the matrices of groups that ask for it: parameters with two dimensions
    to which weight decay applies. Muon's update is scaled to the root mean square of AdamW's (Liu et al.
    2025, section 2.2), so that learning rates mean the same. Each group has a ``base_lr``, which the schedule
    scales, and the ``path`` of the config's group, or else the ``label``. Parameters whose ids are in
    ``left_out`` have other optimizers.

    Raises:
        ConfigError: a group of the config has no trainable parameter (for Muon: no matrix), or two fit a
            parameter as well.
    """
    decayed, not_decayed = by_decay(module)
    path_of = _paths(module, config.groups or {})
    groups: dict[tuple[str, bool, bool, bool], dict[str, Any]] = {}
    for parameters, decays in ((decayed, True), (not_decayed, False)):
        for parameter in [p for p in parameters if id(p) not in left_out]:
            path, is_sharded = path_of.get(id(parameter), ""), isinstance(parameter, DTensor)
            values = (config.groups or {}).get(path, {})
            weight_decay = values.get("weight_decay", config.weight_decay) if decays else 0.0
            in_muon = values.get("name") == "muon" and decays and parameter.ndim == 2
            group = groups.setdefault(  # no fused update mixes sharded and whole parameters
                (path, decays, is_sharded, in_muon),
                {
                    "params": [],
                    "weight_decay": weight_decay,
                    "base_lr": values.get("lr", config.lr),
                    "path": path or label,
                },
            )
            group["params"].append(parameter)
    fused = all(p.device.type in ("cpu", "cuda") for p in decayed + not_decayed)
    of_muon = [group for (*_, in_muon), group in groups.items() if in_muon]
    of_adamw = [group for (*_, in_muon), group in groups.items() if not in_muon]
    for path, values in (config.groups or {}).items():
        if values.get("name") == "muon" and path not in [group["path"] for group in of_muon]:
            raise ConfigError(
                f"optimizer.groups: '{path}' has no matrix for Muon; expected a trained weight with two"
                " dimensions that is no embedding. Leave out its name: AdamW is for all else."
            )
    optimizers: list[torch.optim.Optimizer] = []
    if of_adamw:
        optimizers.append(torch.optim.AdamW(of_adamw, lr=config.lr, betas=config.betas, fused=fused))
    if of_muon:
        optimizers.append(torch.optim.Muon(of_muon, lr=config.lr, adjust_lr_fn="match_rms_adamw"))
    return OptimizerList(optimizers)


def _paths(module: nn.Module, groups: Mapping[str, Any]) -> dict[int, str]:
    """Return the path of the group that each trainable parameter belongs to: the longest that fits."""
    path_of: dict[int, str] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        levels = name.split(".")
        fitting = [
            path
            for path in groups
            if (pattern := path.split("."))
            and len(pattern) <= len(levels)
            and all(map(fnmatchcase, levels, pattern))
        ]
        longest = max((path.count(".") for path in fitting), default=0)
        best = [path for path in fitting if path.count(".") == longest]
        if len(best) > 1:
            raise ConfigError(
                f"optimizer.groups: '{best[0]}' and '{best[1]}' both fit {name}; expected one path that fits"
                " best: make one of them longer."
            )
        if best:
            path_of[id(parameter)] = best[0]
    for path in groups:
        if path not in path_of.values():
            raise ConfigError(
                f"optimizer.groups: '{path}' fits no trained parameter; expected the path of a module that"
                " learn trains, which no longer path covers."
            )
    return path_of


def lr_factor(schedule: ScheduleConfig, step: int) -> float:
    """Return the factor of the learning rate at ``step`` (from 0): linear warmup, then the schedule.

    wsd (warmup, stable, decay; Hu et al. 2024, section 4) stays constant up to its last ``decay`` steps.
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "wsd":
        remaining = (schedule.steps - step) / max(schedule.decay, 1)
        return schedule.final + (1 - schedule.final) * min(1.0, max(0.0, remaining))
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.final + (1 - schedule.final) * (1 + cos(pi * min(1.0, progress))) / 2

"""One step of training, whatever is trained: forward, backward, clip, update, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import cos, isfinite, pi
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from janus_modular.errors import TrainingError
from janus_modular.training.schema import OptimizerConfig, ScheduleConfig

W = TypeVar("W")  # what a step works on: a batch, or several


@dataclass
class Loss:
    """What a piece of a step's work costs; the step follows the sum over its pieces."""

    value: Tensor  # scalar
    means: Mapping[str, tuple[Tensor, Tensor | float]] = field(
        default_factory=dict
    )  # name: (sum, over how many)
    counts: Mapping[str, float] = field(default_factory=dict)  # name: how many of it were in this piece


Objective = Callable[[W], Iterable[Loss]]
"""Yields the loss of each piece of a step's work; one is done with before the next is asked for."""


@dataclass
class Metrics:
    """What steps measured: means by name as (sum, weight), and totals. Add them to go over several steps."""

    steps: int = 0
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, other: Metrics) -> None:
        """Take in what other steps measured."""
        self.steps += other.steps
        for name, (total, weight) in other.means.items():
            have = self.means.get(name, (0.0, 0.0))
            self.means[name] = (have[0] + total, have[1] + weight)
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def values(self) -> dict[str, float]:
        """Return each mean, and each count a step."""
        means = {name: total / weight for name, (total, weight) in self.means.items() if weight}
        return means | {name: count / self.steps for name, count in self.counts.items()}


def scalar_objective(losses: Callable[[W], Mapping[str, Tensor]]) -> Objective[W]:
    """Make an objective of a function that returns named scalar losses; their sum is followed."""

    def objective(work: W) -> Iterator[Loss]:
        named = losses(work)
        means = {f"loss/{name}": (value.detach(), 1.0) for name, value in named.items()}
        yield Loss(torch.stack(list(named.values())).sum(), means)

    return objective


class Engine(Generic[W]):
    """Holds a module, its optimizer and the number of the next step; ``step`` is all it does."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective[W],
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Train what of ``module`` has ``requires_grad``, computing in ``autocast`` where it is given.

        Raises:
            TrainingError: nothing learns.
        """
        self.learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.learning.values())
        self.statistics = {
            f"{path}.{name}".lstrip("."): buffer
            for path, part in module.named_modules()
            if part.training
            for name, buffer in part.named_buffers(recurse=False)
        }
        if not self.parameters:
            raise TrainingError("nothing would learn: every parameter is frozen.")
        self.objective = objective
        self.config = optimizer
        self.schedule = schedule
        self.optimizer = build_optimizer(module, optimizer)
        self.device = self.parameters[0].device
        self.autocast = autocast
        self.next_step = 0
        self.sound = True  # False while weights are being changed: neither of this step nor of the next

    def step(self, work: W) -> Metrics:
        """Update the weights once, and return what was measured.

        Raises:
            TrainingError: the loss or the gradient is not finite; the state is as it was.
        """
        with self._unchanged_on_error():
            metrics = self._measure(work)
        self.sound = False
        self.optimizer.step()
        self.next_step += 1
        self.sound = True
        return metrics

    def _measure(self, work: W) -> Metrics:
        """Compute gradients, and what is measured on the way; nothing that is not finite gets past here."""
        lr = self.config.lr * rate(self.schedule, self.next_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, list[Any]] = {}  # name: [sum, weight], still on the device
        counts: dict[str, float] = {}
        losses = iter(self.objective(work))
        while (loss := self._forward(losses)) is not None:
            loss.value.backward()
            for name, pair in {"loss": (loss.value.detach(), 0.0), **loss.means}.items():
                have = sums.setdefault(name, [0.0, 0.0])
                have[0], have[1] = have[0] + pair[0], have[1] + pair[1]
            for name, count in loss.counts.items():
                counts[name] = counts.get(name, 0) + count
        sums["loss"][1] = 1.0
        limit = float("inf") if self.config.clip is None else self.config.clip
        sums["grad_norm"] = [nn.utils.clip_grad_norm_(self.parameters, limit), 1.0]
        flat = torch.stack([torch.as_tensor(x, device=self.device) for pair in sums.values() for x in pair])
        host = flat.double().tolist()  # the one wait for the device in a step
        means = {name: (host[2 * i], host[2 * i + 1]) for i, name in enumerate(sums)}
        self._check(means)
        return Metrics(1, means | {"lr": (lr, 1.0)}, counts)

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Put back what a forward pass changes (running statistics, random states) where it fails."""
        before = [buffer.clone() for buffer in self.statistics.values()]
        chance = self._random_state()
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for buffer, value in zip(self.statistics.values(), before, strict=True):
                    buffer.copy_(value)
            self._set_random_state(chance)
            self.optimizer.zero_grad(set_to_none=True)
            raise

    def _forward(self, losses: Iterator[Loss]) -> Loss | None:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return next(losses, None)

    def _check(self, means: Mapping[str, tuple[float, float]]) -> None:
        bad = [name for name, (total, _) in means.items() if not isfinite(total)]
        if not bad:
            return
        where = ", ".join(name.replace("loss/", "loss ").replace("source/", "source ") for name in bad)
        raise TrainingError(
            f"step {self.next_step}: not finite: {where}. The weights are as before this step. Lower"
            " optimizer.lr, lengthen schedule.warmup, or look for broken samples in that source."
        )

    def check_finite(self) -> None:
        """Refuse a state that is worth nothing; for before it is saved, since it reads all of it once.

        No step needs this: AdamW makes finite weights of finite gradients, but for a rate beyond all measure.

        Raises:
            TrainingError: names up to five tensors that hold a number that is not finite.
        """
        if bad := self.not_finite():
            raise TrainingError(
                f"after step {self.next_step - 1}, not finite: {', '.join(bad[:5])}"
                f"{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}. No checkpoint is made of that. Lower"
                " optimizer.lr."
            )

    def not_finite(self) -> list[str]:
        """Name what of the state holds a number that is not finite: all of it is read once."""
        state = self.optimizer.state
        tensors = {
            **self.learning,
            **self.statistics,
            **{
                f"optimizer {key} of {name}": value
                for name, parameter in self.learning.items()
                for key, value in state.get(parameter, {}).items()
            },
        }
        floats = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
        if not floats:
            return []
        ranges = [torch.stack(torch.aminmax(t.detach())).to(self.device).float() for t in floats.values()]
        finite = torch.stack(ranges).isfinite().all(dim=1).tolist()  # the one wait for the device
        return [name for name, fine in zip(floats, finite, strict=True) if not fine]

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the weights and the work."""
        state = {"next_step": self.next_step, "optimizer": self.optimizer.state_dict()}
        return state | self._random_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, with the optimizer's settings of now.

        Raises:
            ValueError: it is of other parameters, or its parts are of different steps.
        """
        step, optimizer = state["next_step"], state["optimizer"]
        self._check_optimizer(step, optimizer)
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(optimizer)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self._set_random_state(state)
        self.next_step = step

    def _check_optimizer(self, step: Any, state: Mapping[str, Any]) -> None:
        if type(step) is not int or step < 0:
            raise ValueError(f"next_step is {step!r}, expected a number of steps")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        places = [place for group in state["param_groups"] for place in group["params"]]
        if sorted(places) != list(range(len(parameters))):
            raise ValueError(f"its optimizer is of {len(set(places))} parameters, expected {len(parameters)}")
        if step and not state["state"]:
            raise ValueError(f"its optimizer is empty, expected that of {step} steps")
        for place, moments in state["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                moment, parameter = moments[name], parameters[place]
                found, expected = tuple(moment.shape), tuple(parameter.shape)
                if found != expected:
                    raise ValueError(f"{name} {place} of its optimizer is {found}, expected {expected}")
                if (moment.dtype, moment.layout) != (parameter.dtype, parameter.layout):
                    raise ValueError(
                        f"{name} {place} of its optimizer is {moment.dtype}, {moment.layout}; expected"
                        f" {parameter.dtype}, {parameter.layout}"
                    )
            if moments["exp_avg_sq"].numel() and moments["exp_avg_sq"].min() < 0:
                raise ValueError(f"exp_avg_sq {place} of its optimizer has numbers below 0")
            if not 0 < float(moments["step"]) <= step:  # less, where a parameter had no gradient
                raise ValueError(
                    f"its optimizer is at step {float(moments['step']):g}, expected {step} at most"
                )

    def _random_state(self) -> dict[str, Tensor]:
        state = {"rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_random_state(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "rng_cuda" in state:
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)


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

"""One training step of any module: forward, backward, clipping, update, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from janus_modular.errors import TrainingError, list_briefly
from janus_modular.training.ema import WeightAverages
from janus_modular.training.engine_state import (
    random_state,
    restore_state,
    set_random_state,
    state_record,
    state_tensors,
)
from janus_modular.training.optimizer import build_optimizers, lr_factor
from janus_modular.training.parallel import local_tensor
from janus_modular.training.processes import Processes
from janus_modular.training.schema import OptimizerConfig, ScheduleConfig
from janus_modular.weights.loading import non_finite

BatchT = TypeVar("BatchT")  # what one step is computed from


class NonFiniteLossError(TrainingError):
    """A loss or a gradient that is NaN or infinite, on all processes of a run."""


@dataclass
class Loss:
    """The loss of one micro-batch; a step minimises the sum over its micro-batches."""

    value: Tensor  # scalar
    means: Mapping[str, tuple[Tensor | float, Tensor | float]] = field(
        default_factory=dict
    )  # metric name: (sum, number of summands)
    counts: Mapping[str, float] = field(default_factory=dict)  # metric name: total in this micro-batch


StepLosses = Callable[[BatchT], Iterable[Loss]]
"""Yields the loss of each micro-batch of a step; its backward pass runs before the next loss is computed."""


@dataclass
class Metrics:
    """Metrics of one or several steps: means by name as (sum, weight), and totals."""

    steps: int = 0
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of further steps."""
        self.steps += metrics.steps
        for name, (added_sum, added_weight) in metrics.means.items():
            total, weight = self.means.get(name, (0.0, 0.0))
            self.means[name] = (total + added_sum, weight + added_weight)
        for name, count in metrics.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def values(self) -> dict[str, float]:
        """Return each mean, and each total divided by the number of steps."""
        means = {name: total / weight for name, (total, weight) in self.means.items() if weight}
        return means | {name: count / self.steps for name, count in self.counts.items()}


def scalar_losses(losses: Callable[[BatchT], Mapping[str, Tensor]]) -> StepLosses[BatchT]:
    """Make the losses of a step of a function that returns named scalar losses; their sum is minimised."""

    def step_losses(batch: BatchT) -> Iterator[Loss]:
        named = losses(batch)
        means = {f"loss/{name}": (value.detach(), 1.0) for name, value in named.items()}
        yield Loss(torch.stack(list(named.values())).sum(), means)

    return step_losses


def _state_of(module: nn.Module, path: str | None) -> dict[str, Tensor]:
    """Return the parameters and buffers of a submodule by their names in the module, in the same memory."""
    state = {} if path is None else module.get_submodule(path).state_dict()
    return {f"{path}.{name}": tensor for name, tensor in state.items()}


class Engine(Generic[BatchT]):
    """A module, its optimizer and the number of the next step; ``step`` performs one update."""

    def __init__(
        self,
        module: nn.Module,
        losses: StepLosses[BatchT],
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        autocast: torch.dtype | None = None,
        processes: Processes | None = None,
        ema: float | None = None,
        auxiliary: str | None = None,
        optimizers: Mapping[str, OptimizerConfig] | None = None,
    ) -> None:
        """Train the parameters of ``module`` that require a gradient, computing in the dtype ``autocast``.

        With ``ema``, a decay, averages of the weights are kept. ``auxiliary`` is the path of a submodule
        that is no part of what is trained in the end: all of it is in the state, and no averages of it are.

        ``optimizers`` are those of submodules, by path, that have one of their own.

        With several ``processes``, each computes the losses of its share of a step's samples, and gradients
        and metrics are summed over all of them.

        Raises:
            TrainingError: no parameter requires a gradient.
        """
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.trainable.values())
        self.running_statistics = {
            f"{path}.{name}".lstrip("."): buffer
            for path, submodule in module.named_modules()
            if submodule.training
            for name, buffer in submodule.named_buffers(recurse=False)
        }
        if not self.parameters:
            raise TrainingError("nothing would be trained: every parameter is frozen.")
        self.losses = losses
        self.module = module
        self.config = optimizer
        self.schedule = schedule
        own = optimizers or {}
        self.optimizer = build_optimizers(module, optimizer, own)
        self.clipped_apart = {
            path: ([p for p in module.get_submodule(path).parameters() if p.requires_grad], config.clip)
            for path, config in own.items()
        }
        self.auxiliary = _state_of(module, auxiliary)
        lasting = {name: p for name, p in self.trainable.items() if name not in self.auxiliary}
        self.averages = None if ema is None else WeightAverages(lasting, ema)
        self.device = self.parameters[0].device
        self.autocast = autocast
        self.processes = processes or Processes()
        self.next_step = self.first_step = 0  # the first of this process
        self.consistent = True  # False during an update: the weights are of neither this step nor the next

    def step(self, batch: BatchT) -> Metrics:
        """Update the weights once; return the metrics of the step.

        Raises:
            TrainingError: the loss or the gradient is not finite; the state is left unchanged.
        """
        with self._unchanged_on_error():
            metrics = self._compute_gradients(batch)
        self.consistent = False
        self.optimizer.step()
        if self.averages:
            self.averages.update()
        self.next_step += 1
        self.consistent = True
        return metrics

    def _compute_gradients(self, batch: BatchT) -> Metrics:
        """Compute the gradients of all micro-batches; raise an error where any result is not finite."""
        factor = lr_factor(self.schedule, self.next_step)
        rates = {"lr": (self.config.lr * factor, 1.0)}
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
            if group["path"]:
                rates[f"lr/{group['path']}"] = (group["lr"], 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, list[Any]] = {}  # name: [sum, weight], still on the device
        counts: dict[str, float] = {}
        with self._named_on_error():
            losses = iter(self.losses(batch))
            while (loss := self._forward(losses)) is not None:
                if loss.value.requires_grad:  # not where a micro-batch reaches frozen modules alone
                    loss.value.backward()
                for name, pair in {"loss": (loss.value.detach(), 0.0), **loss.means}.items():
                    total = sums.setdefault(name, [0.0, 0.0])
                    total[0], total[1] = total[0] + pair[0], total[1] + pair[1]
                for name, count in loss.counts.items():
                    counts[name] = counts.get(name, 0) + count
        self.processes.sum_gradients([p for p in self.parameters if not isinstance(p, DTensor)])
        for path, (parameters, clip) in self.clipped_apart.items():
            own_norm = nn.utils.clip_grad_norm_(parameters, float("inf") if clip is None else clip)
            sums[f"grad_norm/{path}"] = [own_norm / self.processes.world, 1.0 / self.processes.world]
        norm = self._clip_gradients()
        flat = torch.stack(
            [torch.as_tensor(x, device=self.device) for pair in (*sums.values(), (norm, 1.0)) for x in pair]
        )
        *host, norm_value, _ = flat.double().tolist()  # the only synchronisation with the device in a step
        means = self.processes.sum_means(
            {name: (host[2 * i], host[2 * i + 1]) for i, name in enumerate(sums)}
        )
        means |= {"loss": (means["loss"][0], 1.0), "grad_norm": (norm_value, 1.0)}
        self._check_means(means)
        return Metrics(1, means | rates, counts)

    def _clip_gradients(self) -> Tensor:
        """Scale the gradients so that their norm keeps the limit, submodules with own optimizers left out."""
        limit = float("inf") if self.config.clip is None else self.config.clip
        apart = {id(p) for parameters, _ in self.clipped_apart.values() for p in parameters}
        together = [p for p in self.parameters if id(p) not in apart]
        sharded = [p for p in together if isinstance(p, DTensor) and p.grad is not None]
        if not sharded:
            return nn.utils.clip_grad_norm_(together, limit)
        whole = [p for p in together if not isinstance(p, DTensor) and p.grad is not None]
        parts = nn.utils.get_total_norm([local_tensor(cast(Tensor, p.grad)) for p in sharded]).square()
        self.processes.sum_tensor(parts)
        rest = (
            nn.utils.get_total_norm([cast(Tensor, p.grad) for p in whole]) if whole else parts.new_zeros(())
        )
        norm = (parts + rest.square()).sqrt()
        for group in (sharded, whole):
            nn.utils.clip_grads_with_norm_(group, limit, norm)
        return norm

    @contextmanager
    def _named_on_error(self) -> Iterator[None]:
        """Turn an error of one of several processes, which the others do not have, into a `RankError`."""
        try:
            yield
        except Exception as error:
            if self.processes.world == 1:
                raise
            raise self.processes.rank_error(error, self.next_step) from error

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Restore what a forward pass changes (running statistics, random states) where it fails."""
        saved = [buffer.clone() for buffer in self.running_statistics.values()]
        random_before = random_state(self)
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for buffer, value in zip(self.running_statistics.values(), saved, strict=True):
                    buffer.copy_(value)
            set_random_state(self, random_before)
            self.optimizer.zero_grad(set_to_none=True)
            raise

    def _forward(self, losses: Iterator[Loss]) -> Loss | None:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return next(losses, None)

    def _check_means(self, means: Mapping[str, tuple[float, float]]) -> None:
        non_finite = [name for name, (total, _) in means.items() if not isfinite(total)]
        if not non_finite:
            return
        names = ", ".join(name.replace("loss/", "loss ").replace("source/", "source ") for name in non_finite)
        if self.next_step == self.first_step:  # no learning rate of this process can be the cause
            start = "the checkpoint that was resumed" if self.first_step else "what the run starts from"
            advice = (
                f"No update came before it, so that the weights of {start} may be ruined: use earlier ones,"
            )
        else:
            advice = "Lower optimizer.lr, lengthen schedule.warmup,"
        raise NonFiniteLossError(
            f"step {self.next_step}: not finite: {names}. The weights are as before this step. {advice} or"
            " look for broken samples in that source."
        )

    def check_updated(self) -> None:
        """Check that some step has changed a parameter, before the state is saved.

        A single step need not: its samples may have no loss that reaches a trainable parameter.

        Raises:
            TrainingError: no step had a gradient.
        """
        if self.next_step and not self.optimizer.state:
            raise TrainingError(
                f"after step {self.next_step - 1}: no loss has reached a trainable parameter, so that nothing"
                " was learned; expected at least one step with a gradient. No checkpoint was written. Train"
                " other modules, or add samples whose losses reach these."
            )

    def untrained(self) -> list[str]:
        """Return the names of trainable parameters that no step had a gradient for, but auxiliary ones."""
        state, lasting = self.optimizer.state, self.trainable.keys() - self.auxiliary.keys()
        return [name for name, p in self.trainable.items() if p not in state and name in lasting]

    def check_finite(self) -> None:
        """Check that all of the state is finite, before it is saved: every tensor is read once.

        Steps do without this check: with finite gradients, AdamW's weights stay finite, unless the learning
        rate is enormous.

        Raises:
            TrainingError: names up to five tensors that hold a number that is not finite.
        """
        of_ranks = self.processes.gather(self.non_finite_tensors())
        if names := list(dict.fromkeys(name for names in of_ranks for name in names)):
            raise TrainingError(
                f"after step {self.next_step - 1}, not finite: {list_briefly(names)}. No checkpoint was"
                " written. Lower optimizer.lr."
            )

    def non_finite_tensors(self) -> list[str]:
        """Return the names of the state's tensors that hold, in this process, a number that is not finite."""
        state = self.optimizer.state
        tensors = {
            **self.trainable,
            **self.running_statistics,
            **self.auxiliary,
            **{f"ema of {name}": x for name, x in (self.averages.averages if self.averages else {}).items()},
            **{
                f"optimizer {key} of {name}": value
                for name, parameter in self.trainable.items()
                for key, value in state.get(parameter, {}).items()
            },
        }
        local = {name: local_tensor(tensor).to(self.device) for name, tensor in tensors.items()}
        return non_finite(local)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the weights: a record, and this process's tensors."""
        return {"record": state_record(self), "tensors": state_tensors(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``, but keep the optimizer settings of the current config.

        Raises:
            ValueError: the state has other parameters, or its tensors are of different steps.
        """
        restore_state(self, state["record"], state["tensors"])

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
from janus_modular.training.optimizer import build_optimizer, by_decay, lr_factor
from janus_modular.training.parallel import full_tensor, local_tensor, sharded_like
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


Objective = Callable[[BatchT], Iterable[Loss]]
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


def scalar_objective(losses: Callable[[BatchT], Mapping[str, Tensor]]) -> Objective[BatchT]:
    """Make an objective of a function that returns named scalar losses; their sum is minimised."""

    def objective(batch: BatchT) -> Iterator[Loss]:
        named = losses(batch)
        means = {f"loss/{name}": (value.detach(), 1.0) for name, value in named.items()}
        yield Loss(torch.stack(list(named.values())).sum(), means)

    return objective


class Engine(Generic[BatchT]):
    """A module, its optimizer and the number of the next step; ``step`` performs one update."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective[BatchT],
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        autocast: torch.dtype | None = None,
        processes: Processes | None = None,
        ema: float | None = None,
    ) -> None:
        """Train the parameters of ``module`` that require a gradient, computing in the dtype ``autocast``.

        With ``ema``, a decay, averages of the weights are kept.

        With several ``processes``, each computes the losses of its share of a step's samples, and gradients
        and metrics are summed over all of them.

        Raises:
            TrainingError: no parameter requires a gradient.
        """
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.trainable.values())
        self.ordered = [parameter for group in by_decay(module) for parameter in group]  # as states are saved
        self.running_statistics = {
            f"{path}.{name}".lstrip("."): buffer
            for path, submodule in module.named_modules()
            if submodule.training
            for name, buffer in submodule.named_buffers(recurse=False)
        }
        if not self.parameters:
            raise TrainingError("nothing would be trained: every parameter is frozen.")
        self.objective = objective
        self.config = optimizer
        self.schedule = schedule
        self.optimizer = build_optimizer(module, optimizer)
        self.averages = None if ema is None else WeightAverages(self.trainable, ema)
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
            losses = iter(self.objective(batch))
            while (loss := self._forward(losses)) is not None:
                if loss.value.requires_grad:  # not where a micro-batch reaches frozen modules alone
                    loss.value.backward()
                for name, pair in {"loss": (loss.value.detach(), 0.0), **loss.means}.items():
                    total = sums.setdefault(name, [0.0, 0.0])
                    total[0], total[1] = total[0] + pair[0], total[1] + pair[1]
                for name, count in loss.counts.items():
                    counts[name] = counts.get(name, 0) + count
        self.processes.sum_gradients([p for p in self.parameters if not isinstance(p, DTensor)])
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
        """Scale the gradients so that their norm over all parameters keeps the limit; return the norm."""
        limit = float("inf") if self.config.clip is None else self.config.clip
        sharded = [p for p in self.parameters if isinstance(p, DTensor) and p.grad is not None]
        if not sharded:
            return nn.utils.clip_grad_norm_(self.parameters, limit)
        whole = [p for p in self.parameters if not isinstance(p, DTensor) and p.grad is not None]
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
        random_state = self._random_state()
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for buffer, value in zip(self.running_statistics.values(), saved, strict=True):
                    buffer.copy_(value)
            self._set_random_state(random_state)
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
        """Return the names of trainable parameters that no step had a gradient for."""
        state = self.optimizer.state
        return [name for name, parameter in self.trainable.items() if parameter not in state]

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
        """Return what a resumed run needs beside the weights: step, optimizer, random states of all ranks."""
        state: dict[str, Any] = {"next_step": self.next_step, "optimizer": self._optimizer_state()}
        if self.averages:
            state["ema"] = self.averages.state_dict(keep=self.processes.is_first)
        first, *rest = self.processes.gather(self._random_state())
        return state | first | ({"ranks": rest} if rest else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``, but keep the optimizer settings of the current config.

        Raises:
            ValueError: the state has other parameters, or its tensors are of different steps.
        """
        step, optimizer = state["next_step"], state["optimizer"]
        self._check_optimizer(step, optimizer)
        moments = {
            self.ordered[index]: {
                key: sharded_like(value, self.ordered[index]) for key, value in values.items()
            }
            for index, values in optimizer["state"].items()
        }
        self.optimizer.load_state(moments)
        if self.averages and "ema" in state:  # else the run had none, and they start from its weights
            self.averages.load_state_dict(state["ema"])
        random_states = [state, *state.get("ranks", ())]
        if self.processes.rank < len(random_states):  # else it keeps its own: the run had fewer processes
            self._set_random_state(random_states[self.processes.rank])
        self.next_step = self.first_step = step

    def _check_optimizer(self, step: Any, state: Mapping[str, Any]) -> None:
        if type(step) is not int or step < 0:
            raise ValueError(f"next_step is {step!r}, expected a number of steps")
        parameters = self.ordered
        indices = [index for group in state["param_groups"] for index in group["params"]]
        if sorted(indices) != list(range(len(parameters))):
            raise ValueError(
                f"the optimizer state has {len(set(indices))} parameters, expected {len(parameters)}"
            )
        if step and not state["state"]:
            raise ValueError(f"the optimizer state is empty, expected that of step {step}")
        state_names = self.optimizer.state_names()
        for index, moments in state["state"].items():
            if set(moments) != (expected_names := state_names[parameters[index]]):
                raise ValueError(
                    f"the optimizer state has {', '.join(sorted(moments))} of parameter {index}, expected"
                    f" {', '.join(sorted(expected_names))}: a resumed run cannot change between AdamW and"
                    " Muon"
                )
            for name in expected_names - {"step"}:
                moment, parameter = moments[name], parameters[index]
                shape, expected = tuple(moment.shape), tuple(parameter.shape)
                if shape != expected:
                    raise ValueError(f"{name} {index} of the optimizer state is {shape}, expected {expected}")
                if (moment.dtype, moment.layout) != (parameter.dtype, parameter.layout):
                    raise ValueError(
                        f"{name} {index} of the optimizer state is {moment.dtype}, {moment.layout}; expected"
                        f" {parameter.dtype}, {parameter.layout}"
                    )
            if "exp_avg_sq" not in moments:
                continue
            if moments["exp_avg_sq"].numel() and moments["exp_avg_sq"].min() < 0:
                raise ValueError(f"exp_avg_sq {index} of the optimizer state has numbers below 0")
            if not 0 < float(moments["step"]) <= step:  # below step where a parameter had no gradient
                raise ValueError(
                    f"the optimizer state is at step {float(moments['step']):g}, expected {step} at most"
                )

    def _optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state in torch's form, with whole tensors and parameters as in ``ordered``.

        It does not depend on how parameters are sharded. All processes call this; rank 0 gets the tensors.
        """
        keep = self.processes.is_first
        indices = {id(parameter): index for index, parameter in enumerate(self.ordered)}
        moments = {
            index: {key: full_tensor(value, keep=keep) for key, value in self.optimizer.state[p].items()}
            for index, p in enumerate(self.ordered)
            if p in self.optimizer.state
        }
        groups = [
            {**group, "params": [indices[id(p)] for p in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        return {"state": moments, "param_groups": groups}

    def _random_state(self) -> dict[str, Tensor]:
        state = {"rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_random_state(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "rng_cuda" in state:
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)

"""The training state of an engine: tensors, sharded as its parameters are, and a record of plain numbers.

Tensors have names such as ``training/optimizer/exp_avg/backbone.norm.weight``, and averages of the weights
``training/ema/backbone.norm.weight``. What an objective itself trains is saved whole, with its buffers, as
``training/auxiliary/objective.scale``. Random states are those of a process each,
``training/random/00003/cpu``; nothing else depends on the number of processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from janus_modular.training.ema import EMA
from janus_modular.training.parallel import local_tensor

if TYPE_CHECKING:
    from janus_modular.training.engine import Engine

PREFIX = "training/"
"""How the names of a state's tensors begin, so that no weight has such a name."""

OPTIMIZER = f"{PREFIX}optimizer/"
AUXILIARY = f"{PREFIX}auxiliary/"
RANDOM = f"{PREFIX}random/"


def state_tensors(engine: Engine[Any]) -> dict[str, Tensor]:
    """Return the tensors of the state by name; random states are those of this process alone."""
    tensors = {
        f"{OPTIMIZER}{key}/{name}": value
        for name, values in _moments(engine).items()
        for key, value in values.items()
        if value.ndim
    }
    averages = {f"{EMA}{name}": average for name, average in _averages(engine).items()}
    auxiliary = {f"{AUXILIARY}{name}": tensor for name, tensor in engine.auxiliary.items()}
    return tensors | averages | auxiliary | random_state(engine)


def state_record(engine: Engine[Any]) -> dict[str, Any]:
    """Return what else a resumed run needs, as JSON takes it: numbers of steps, and what the state is of."""
    scalars = {
        f"{OPTIMIZER}{key}/{name}": value.item()
        for name, values in _moments(engine).items()
        for key, value in values.items()
        if not value.ndim
    }
    return {
        "next_step": engine.next_step,
        "world": engine.processes.world,
        "parameters": [*engine.trainable],
        "updated": [*_moments(engine)],
        "ema": engine.averages is not None,
        "scalars": scalars,
    }


def empty_tensors(
    engine: Engine[Any], saved: Mapping[str, tuple[torch.Size, torch.dtype]]
) -> dict[str, Tensor]:
    """Return tensors to load a saved state into; ``saved`` has the shapes and dtypes of all its tensors.

    Those of a parameter's shape are sharded as it is. Left out are random states of other processes, and
    averages if the engine keeps none; its own averages are loaded in place.

    Raises:
        ValueError: the state has tensors that the engine has not.
    """
    averages = _averages(engine)
    own_random = f"{RANDOM}{engine.processes.rank:05}/"
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in saved.items():
        if name.startswith(EMA):
            average = averages.get(name.removeprefix(EMA))
            if average is not None and (average.shape, average.dtype) == (shape, dtype):
                tensors[name] = average
            elif averages:
                tensors[name] = torch.empty(shape, dtype=dtype)
        elif name.startswith(OPTIMIZER):
            parameter = engine.trainable.get(_parameter_of(name))
            if parameter is not None and parameter.shape == shape:
                tensors[name] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            else:
                tensors[name] = torch.empty(shape, dtype=dtype)
        elif name.startswith((own_random, AUXILIARY)):
            tensors[name] = torch.empty(shape, dtype=dtype)
        elif not name.startswith(RANDOM):
            raise ValueError(f"it has {name.removeprefix(PREFIX)}, which this run does not train with")
    return tensors


def restore_state(engine: Engine[Any], record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Restore a state, but keep the optimizer settings of the current config.

    A process that the saved run did not have keeps its own random state. Averages that the saved run did not
    keep start from its weights.

    Raises:
        ValueError: the state is of other parameters, or its tensors are of different steps.
    """
    step = record["next_step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"next_step is {step!r}, expected a number of steps")
    if record["parameters"] != [*engine.trainable]:
        raise ValueError(
            f"the optimizer state is of {len(record['parameters'])} parameters, expected the"
            f" {len(engine.trainable)} that learn names"
        )
    moments: dict[str, dict[str, Tensor]] = defaultdict(dict)
    values = {**tensors, **{name: torch.tensor(float(x)) for name, x in record["scalars"].items()}}
    for name, value in values.items():
        if name.startswith(OPTIMIZER):
            moments[_parameter_of(name)][name.removeprefix(OPTIMIZER).partition("/")[0]] = value
    _check_moments(engine, step, moments, record["updated"])
    averages = {name.removeprefix(EMA): value for name, value in tensors.items() if name.startswith(EMA)}
    if engine.averages and (record["ema"] or averages):
        engine.averages.load_state_dict(averages)
    _restore_auxiliary(engine, tensors)
    engine.optimizer.load_state({engine.trainable[name]: values for name, values in moments.items()})
    set_random_state(engine, tensors)
    engine.next_step = engine.first_step = step


def _restore_auxiliary(engine: Engine[Any], tensors: Mapping[str, Tensor]) -> None:
    """Copy the saved parameters and buffers of the auxiliary module into it."""
    saved = {name.removeprefix(AUXILIARY): x for name, x in tensors.items() if name.startswith(AUXILIARY)}
    own, stored = (
        {(name, tuple(x.shape), str(x.dtype)) for name, x in state.items()}
        for state in (engine.auxiliary, saved)
    )
    if different := sorted(own ^ stored):
        raise ValueError(f"the parameters of the objective differ, first {different[0][0]}")
    for name, tensor in engine.auxiliary.items():
        tensor.copy_(saved[name])


def random_state(engine: Engine[Any]) -> dict[str, Tensor]:
    """Return the states of this process's random number generators."""
    own = f"{RANDOM}{engine.processes.rank:05}/"
    state = {f"{own}cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        state[f"{own}cuda"] = torch.cuda.get_rng_state(engine.device)
    return state


def set_random_state(engine: Engine[Any], tensors: Mapping[str, Tensor]) -> None:
    """Set the random number generators to the states of this process, if there are any."""
    own = f"{RANDOM}{engine.processes.rank:05}/"
    if (state := tensors.get(f"{own}cpu")) is not None:
        torch.set_rng_state(state)
    if engine.device.type == "cuda" and (state := tensors.get(f"{own}cuda")) is not None:
        torch.cuda.set_rng_state(state, engine.device)


def _parameter_of(name: str) -> str:
    """Return the parameter's name of ``training/optimizer/KEY/NAME``."""
    return name.removeprefix(OPTIMIZER).partition("/")[2]


def _averages(engine: Engine[Any]) -> dict[str, Tensor]:
    return engine.averages.averages if engine.averages else {}


def _moments(engine: Engine[Any]) -> dict[str, dict[str, Tensor]]:
    state = engine.optimizer.state  # of AdamW or Muon
    return {name: state[parameter] for name, parameter in engine.trainable.items() if parameter in state}


def _check_moments(
    engine: Engine[Any], step: int, moments: Mapping[str, Mapping[str, Tensor]], updated: Sequence[str]
) -> None:
    """Check the optimizer state of a step by the parameters' names; ``updated`` are those that have one."""
    if step and not moments:
        raise ValueError(f"the optimizer state is empty, expected that of step {step}")
    if different := sorted({*updated} ^ moments.keys()):
        raise ValueError(
            f"the optimizer state is not of the parameters that were updated: {different[0]} differs"
        )
    state_names = engine.optimizer.state_names()
    for name, values in moments.items():
        if name not in engine.trainable:
            raise ValueError(f"the optimizer state is of {name}, which is not trained")
        parameter = engine.trainable[name]
        if values.keys() != (expected_names := state_names[parameter]):
            raise ValueError(
                f"the optimizer state has {', '.join(sorted(values))} of {name}, expected"
                f" {', '.join(sorted(expected_names))}: a resumed run cannot change between AdamW and Muon"
            )
        for key in sorted(expected_names - {"step"}):
            _check_moment(f"{key} of {name}", values[key], parameter)
        if "exp_avg_sq" in values:
            squares = local_tensor(values["exp_avg_sq"])
            if squares.numel() and squares.min() < 0:
                raise ValueError(f"exp_avg_sq of {name} has numbers below 0")
        if "step" in values and not 0 < float(values["step"]) <= step:  # below where it had no gradient
            raise ValueError(
                f"the optimizer state of {name} is at step {float(values['step']):g}, expected {step} at most"
            )


def _check_moment(label: str, moment: Tensor, parameter: Tensor) -> None:
    shape, expected = tuple(moment.shape), tuple(parameter.shape)
    if shape != expected:
        raise ValueError(f"{label} is {shape}, expected {expected}")
    if moment.dtype != parameter.dtype:
        raise ValueError(f"{label} is {moment.dtype}, expected {parameter.dtype}")
    if isinstance(parameter, DTensor) != isinstance(moment, DTensor):
        raise ValueError(f"{label} is not sharded as its parameter is")

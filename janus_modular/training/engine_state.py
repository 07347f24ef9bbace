"""The training state of an engine: tensors, sharded as its parameters are, and a record of plain numbers.

Tensors have names such as ``training/optimizer/exp_avg/backbone.norm.weight``. Random states are those of a
process each, ``training/random/00003/cpu``; nothing else depends on the number of processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from janus_modular.training.parallel import local_tensor

if TYPE_CHECKING:
    from janus_modular.training.engine import Engine

PREFIX = "training/"
"""How the names of a state's tensors begin, so that no weight has such a name."""

OPTIMIZER = f"{PREFIX}optimizer/"
RANDOM = f"{PREFIX}random/"


def state_tensors(engine: Engine[Any]) -> dict[str, Tensor]:
    """Return the tensors of the state by name; random states are those of this process alone."""
    tensors = {
        f"{OPTIMIZER}{key}/{name}": value
        for name, values in _moments(engine).items()
        for key, value in values.items()
        if value.ndim
    }
    return tensors | _further(engine) | random_state(engine)


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
        "scalars": scalars,
    }


def empty_tensors(
    engine: Engine[Any], saved: Mapping[str, tuple[torch.Size, torch.dtype]]
) -> dict[str, Tensor]:
    """Return tensors to load a saved state into; ``saved`` has the shapes and dtypes of all its tensors.

    Those of a parameter's shape are sharded as it is, and random states of other processes are left out.

    Raises:
        ValueError: the state has tensors that the engine has not, or the reverse.
    """
    further = _further(engine)
    own_random = f"{RANDOM}{engine.processes.rank:05}/"
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in saved.items():
        if name in further:
            tensors[name] = further[name]
        elif name.startswith(OPTIMIZER):
            parameter = engine.trainable.get(_parameter_of(name))
            if parameter is not None and parameter.shape == shape:
                tensors[name] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            else:
                tensors[name] = torch.empty(shape, dtype=dtype)
        elif name.startswith(own_random):
            tensors[name] = torch.empty(shape, dtype=dtype)
        elif not name.startswith(RANDOM):
            raise ValueError(f"it has {name.removeprefix(PREFIX)}, which this run does not train with")
    if missing := sorted(further.keys() - tensors.keys()):
        raise ValueError(f"it lacks {missing[0].removeprefix(PREFIX)}, which this run trains with")
    return tensors


def restore_state(engine: Engine[Any], record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Restore a state, but keep the optimizer settings of the current config.

    A process that the saved run did not have keeps its own random state.

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
    _check_moments(engine, step, moments)
    own = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    position = {id(parameter): index for index, parameter in enumerate(own)}
    state = {position[id(engine.trainable[name])]: values for name, values in moments.items()}
    groups = engine.optimizer.state_dict()["param_groups"]  # of the current config
    engine.optimizer.load_state_dict({"state": state, "param_groups": groups})
    for name, member in _further(engine).items():
        if tensors[name] is not member:
            member.copy_(tensors[name])
    set_random_state(engine, tensors)
    engine.next_step = engine.first_step = step


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


def _further(engine: Engine[Any]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{group}/{name}": tensor
        for group, members in engine.further_state.items()
        for name, tensor in members.items()
    }


def _moments(engine: Engine[Any]) -> dict[str, dict[str, Tensor]]:
    state = engine.optimizer.state
    return {name: state[parameter] for name, parameter in engine.trainable.items() if parameter in state}


def _check_moments(engine: Engine[Any], step: int, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    if step and not moments:
        raise ValueError(f"the optimizer state is empty, expected that of step {step}")
    for name, values in moments.items():
        if name not in engine.trainable:
            raise ValueError(f"the optimizer state is of {name}, which is not trained")
        parameter = engine.trainable[name]
        for key in ("exp_avg", "exp_avg_sq"):
            shape, expected = tuple(values[key].shape), tuple(parameter.shape)
            if shape != expected:
                raise ValueError(f"{key} of {name} is {shape}, expected {expected}")
            if values[key].dtype != parameter.dtype:
                raise ValueError(f"{key} of {name} is {values[key].dtype}, expected {parameter.dtype}")
            if isinstance(parameter, DTensor) != isinstance(values[key], DTensor):
                raise ValueError(f"{key} of {name} is not sharded as its parameter is")
        squares = local_tensor(values["exp_avg_sq"])
        if squares.numel() and squares.min() < 0:
            raise ValueError(f"exp_avg_sq of {name} has numbers below 0")
        if not 0 < float(values["step"]) <= step:  # below step where a parameter had no gradient
            raise ValueError(
                f"the optimizer state of {name} is at step {float(values['step']):g}, expected {step} at most"
            )

"""What every part of a model promises, whatever its slot."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from janus_modular.config import resolve, to_yaml
from janus_modular.errors import CheckError
from janus_modular.registry import MODEL_SLOTS
from janus_modular.testing.calls import calls_of, grown, learning_from, tensors
from janus_modular.testing.check import NotApplicable, check_for, ensure
from janus_modular.testing.comparing import ensure_identical, ensure_same
from janus_modular.testing.tracing import traced

NO_KERNEL = ("not implemented for", "not support")
"""How torch says that this processor has no such operator in half precision."""


@check_for(*MODEL_SLOTS)
def check_config_round_trip(component: Any, example: Any) -> None:
    """Its config is a dataclass that comes back from YAML as it was."""
    config = getattr(component, "config", None)
    ensure(
        is_dataclass(config) and not isinstance(config, type),
        f"self.config is {config!r}: keep the dataclass that it was built from, for checkpoints to write",
    )
    written = to_yaml(config)
    again = resolve(yaml.safe_load(written) or {}, type(config))
    ensure(again == config, f"{config} came back from YAML as {again}")


@check_for(*MODEL_SLOTS)
@torch.no_grad()
def check_rows_do_not_mix(component: Any, example: Tensor, *, slot: str) -> None:
    """A batch is its rows: each comes out as it does alone."""
    component.eval()
    ensure(len(example) > 1, f"the example has {len(example)} rows: give at least 2, that they may mix")
    for call in calls_of(component, example, slot):
        if not call.by_row:
            continue
        together = call(component)
        for row in range(call.rows):
            wanted = [x[row : row + 1] for x in tensors(together)]
            ensure_same(call.row(row)(component), wanted, f"{call.name}, row {row} alone and in company")


@check_for(*MODEL_SLOTS)
@torch.no_grad()
def check_deterministic(component: Any, example: Tensor, *, slot: str) -> None:
    """Asked twice it answers the same, and changes neither its inputs nor, in eval mode, itself."""
    component.eval()
    for call in calls_of(component, example, slot):
        inputs, state = copy.deepcopy(call.inputs), copy.deepcopy(component.state_dict())
        ensure_identical(call(component), call(component), f"{call.name}, twice")
        ensure_identical(call.inputs, inputs, f"{call.name} writes into its arguments: before and after")
        ensure_identical(component.state_dict(), state, f"{call.name} in eval mode changes its state")


@check_for(*MODEL_SLOTS)
def check_gradients(component: Any, example: Tensor, *, slot: str) -> None:
    """The gradient reaches every parameter that should learn, and none that is frozen."""
    frozen = component.frozen_submodules if slot == "generation" else ()
    apart = tuple(f"{name}." for name in frozen)
    learning = {
        name: weight
        for name, weight in component.named_parameters()
        if weight.requires_grad and not name.startswith(apart or ("\0",))
    }
    if not learning:
        raise NotApplicable("it has no parameters that learn")
    component.train()
    loss = learning_from(component, example, slot)
    ensure(loss.requires_grad, "no gradient comes back: is something computed under no_grad, or detached?")
    loss.backward()
    unreached = [name for name, weight in learning.items() if weight.grad is None]
    ensure(not unreached, f"no gradient reaches {some(unreached)} of {len(learning)} parameters")
    infinite = [name for name, weight in learning.items() if not weight.grad.isfinite().all()]
    ensure(not infinite, f"the gradient of {some(infinite)} is not finite")
    reached = [name for name, weight in component.named_parameters() if weight.grad is not None]
    astray = sorted(set(reached) - set(learning))
    ensure(not astray, f"a gradient reaches {some(astray)}, which is frozen or trained apart")


@check_for(*MODEL_SLOTS)
def check_frozen(component: Any, example: Tensor, *, slot: str) -> None:
    """Frozen, it passes the gradient on to what comes before it and keeps none."""
    component.train().requires_grad_(False)
    if not example.is_floating_point() or slot == "image_tokenizers":
        raise NotApplicable("nothing that learns comes before it")
    call = calls_of(component, example, slot)[0]
    x, *others = call.inputs
    x = x.clone().requires_grad_()
    output = call.run(component, x, *others)
    if not output.requires_grad:
        raise NotApplicable("its output does not depend on its input smoothly")
    output.sum().backward()
    ensure(x.grad is not None, "no gradient reaches its input, so nothing before it would learn")
    kept = [name for name, weight in component.named_parameters() if weight.grad is not None]
    ensure(not kept, f"a gradient stays in {some(kept)}, which is frozen")


@check_for(*MODEL_SLOTS)
@torch.no_grad()
def check_meta_device(component: Any, example: Tensor, *, slot: str) -> None:
    """On the meta device it computes shapes without data: what memory is counted by."""
    component.eval()
    calls = calls_of(component, example, slot)
    wanted = [[(x.shape, x.dtype) for x in tensors(call(component))] for call in calls]
    component.to("meta")
    for call, shapes in zip(calls, wanted, strict=True):
        found = tensors(call.mapped(lambda x: x.to("meta"))(component))
        elsewhere = {x.device.type for x in found} - {"meta"}
        ensure(not elsewhere, f"{call.name} of a component on the meta device answers on {elsewhere}")
        ensure([(x.shape, x.dtype) for x in found] == shapes, f"{call.name}: other shapes than on the CPU")


@check_for(*MODEL_SLOTS)
@torch.no_grad()
def check_half_precision(component: Any, example: Tensor, *, slot: str) -> None:
    """In bfloat16 and float16 it computes in that type, and stays finite."""
    component.eval()
    calls = calls_of(component, example, slot)
    lacking = []
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(component).to(dtype)
        for call in calls:
            try:
                found = call.mapped(partial(in_dtype, dtype=dtype))(half)
            except RuntimeError as error:
                if not any(words in str(error) for words in NO_KERNEL):
                    raise
                lacking.append(f"{call.name} in {dtype}: {str(error).splitlines()[0]}")
                continue
            floats = [x for x in tensors(found) if x.is_floating_point()]
            ensure(all(x.isfinite().all() for x in floats), f"{call.name} in {dtype} is not finite")
            kinds = {x.dtype for x in floats} - {dtype}
            ensure(not kinds or call.name in ("targets", "losses"), f"{call.name} in {dtype} gives {kinds}")
    if lacking:
        raise NotApplicable("; ".join(lacking))


@check_for(*MODEL_SLOTS)
@torch.no_grad()
def check_state_dict(component: Any, example: Tensor, *, slot: str) -> None:
    """Its weights, written as safetensors and read into another of its kind, make that one the same."""
    from safetensors.torch import load_model, save_model

    if not component.state_dict():
        raise NotApplicable("it has no weights")
    component.eval()
    if outside := plain_tensors(component):
        raise CheckError(
            f"tensors that are neither parameter nor buffer: {some(outside)}. No checkpoint has them, and"
            " they stay behind when the module moves to another device: use nn.Parameter or register_buffer"
        )
    calls = calls_of(component, example, slot)
    other = copy.deepcopy(component)
    for weight in other.state_dict().values():
        weight.zero_()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        save_model(component, str(file))
        load_model(other, file)
    for call in calls:
        ensure_identical(call(other), call(component), f"{call.name} after a round trip of the weights")


@check_for(*MODEL_SLOTS)
def check_exports(component: Any, example: Any, *, slot: str) -> None:
    """torch.export takes it for batches of any size, and the exported program computes the same."""
    component.eval().requires_grad_(False)
    with torch.no_grad():
        calls, larger = (calls_of(component, one, slot) for one in (example, grown(example, slot)))
        for call, other in zip(calls, larger, strict=True):
            if not call.is_exported:
                continue
            wanted = other(component)
            program = traced(component, call, other)
            ensure_same(program.module()(*other.inputs), wanted, f"{call.name}, exported, for a larger batch")


def plain_tensors(component: nn.Module) -> list[str]:
    """Return the names of attributes that hold other tensors than parameters and buffers, in lists too."""
    owned = {id(x) for x in (*component.parameters(), *component.buffers())}
    return [
        f"{name}.{attribute}" if name else attribute
        for name, module in component.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in ("_parameters", "_buffers", "_modules")
        and any(isinstance(leaf, Tensor) and id(leaf) not in owned for leaf in pytree.tree_leaves(value))
    ]


def in_dtype(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return floating-point numbers in another type, ids as they are."""
    return x.to(dtype) if x.is_floating_point() else x


def some(names: list[str], count: int = 3) -> str:
    """Name the first few of many."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest

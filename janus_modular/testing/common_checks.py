"""The checks of every component of a model, whatever its slot."""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from janus_modular.config import resolve, to_yaml
from janus_modular.errors import CheckError, list_briefly
from janus_modular.registry import MODEL_SLOTS
from janus_modular.testing.calls import calls_of, enlarged, tensors, trace_call, training_loss
from janus_modular.testing.check import NotApplicable, check_for, ensure
from janus_modular.testing.comparing import ensure_close, ensure_equal

NO_KERNEL = ("not implemented for", "not support")
"""Texts of torch's errors about operators that the CPU lacks in half precision."""


@check_for(*MODEL_SLOTS)
def check_config_round_trip(component: Any, example: Any) -> None:
    """The config is a dataclass that is the same after a round trip through YAML."""
    config = getattr(component, "config", None)
    ensure(
        is_dataclass(config) and not isinstance(config, type),
        f"self.config is {config!r}; expected the config dataclass, which checkpoints store",
    )
    restored = resolve(yaml.safe_load(to_yaml(config)) or {}, type(config))
    ensure(restored == config, f"{config} is {restored} after a round trip through YAML")


@check_for(*MODEL_SLOTS)
@torch.no_grad()
def check_batch_invariance(component: Any, example: Tensor, *, slot: str) -> None:
    """The result of a row does not depend on the other rows of its batch."""
    component.eval()
    ensure(len(example) > 1, f"the example has {len(example)} rows; expected at least 2")
    for call in calls_of(component, example, slot):
        if not call.by_row:
            continue
        batched = call(component)
        for row in range(call.rows):
            expected = [x[row : row + 1] for x in tensors(batched)]
            ensure_close(call.row(row)(component), expected, f"{call.name}, row {row} alone and in a batch")


@check_for(*MODEL_SLOTS)
@torch.no_grad()
def check_deterministic(component: Any, example: Tensor, *, slot: str) -> None:
    """Two calls give the same result; in eval mode, neither inputs nor state change."""
    component.eval()
    for call in calls_of(component, example, slot):
        inputs, state = copy.deepcopy(call.inputs), copy.deepcopy(component.state_dict())
        ensure_equal(call(component), call(component), f"{call.name}, called twice")
        ensure_equal(call.inputs, inputs, f"{call.name} changes its inputs")
        ensure_equal(component.state_dict(), state, f"{call.name} changes the state in eval mode")


@check_for(*MODEL_SLOTS)
def check_gradients(component: Any, example: Tensor, *, slot: str) -> None:
    """Every trainable parameter gets a gradient, and no frozen parameter does."""
    frozen = component.frozen_submodules if slot == "generation" else ()
    frozen_prefixes = tuple(f"{name}." for name in frozen)
    trainable = {
        name: weight
        for name, weight in component.named_parameters()
        if weight.requires_grad and not name.startswith(frozen_prefixes or ("\0",))
    }
    if not trainable:
        raise NotApplicable("it has no trainable parameters")
    component.train()
    loss = training_loss(component, example, slot)
    ensure(loss.requires_grad, "its loss has no gradient: is something computed under no_grad, or detached?")
    loss.backward()
    unreached = [name for name, weight in trainable.items() if weight.grad is None]
    ensure(not unreached, f"no gradient reaches {list_briefly(unreached, 3)} of {len(trainable)} parameters")
    infinite = [name for name, weight in trainable.items() if not weight.grad.isfinite().all()]
    ensure(not infinite, f"the gradient of {list_briefly(infinite, 3)} is not finite")
    reached = [name for name, weight in component.named_parameters() if weight.grad is not None]
    unexpected = sorted(set(reached) - set(trainable))
    ensure(not unexpected, f"a gradient reaches {list_briefly(unexpected, 3)}, which must stay frozen")


@check_for(*MODEL_SLOTS)
def check_frozen(component: Any, example: Tensor, *, slot: str) -> None:
    """With frozen parameters, the component still passes the gradient on to its input."""
    component.train().requires_grad_(False)
    if not example.is_floating_point() or slot == "image_tokenizers":
        raise NotApplicable("its input needs no gradient")
    call = calls_of(component, example, slot)[0]
    x, *rest = call.inputs
    x = x.clone().requires_grad_()
    output = call.run(component, x, *rest)
    if not output.requires_grad:
        raise NotApplicable("its output is not a differentiable function of its input")
    output.sum().backward()
    ensure(x.grad is not None, "no gradient reaches its input, so that nothing before it would train")
    leaked = [name for name, weight in component.named_parameters() if weight.grad is not None]
    ensure(not leaked, f"{list_briefly(leaked, 3)} has a gradient, though it is frozen")


@check_for(*MODEL_SLOTS)
@torch.no_grad()
def check_meta_device(component: Any, example: Tensor, *, slot: str) -> None:
    """On the meta device, outputs have the same shapes, from which memory is estimated."""
    component.eval()
    calls = calls_of(component, example, slot)
    expected = [[(x.shape, x.dtype) for x in tensors(call(component))] for call in calls]
    component.to("meta")
    for call, shapes in zip(calls, expected, strict=True):
        outputs = tensors(call.mapped(lambda x: x.to("meta"))(component))
        devices = {x.device.type for x in outputs} - {"meta"}
        ensure(not devices, f"{call.name} of a component on the meta device returns tensors on {devices}")
        ensure(
            [(x.shape, x.dtype) for x in outputs] == shapes,
            f"{call.name}: other shapes on the meta device than on the CPU",
        )


@check_for(*MODEL_SLOTS)
@torch.no_grad()
def check_half_precision(component: Any, example: Tensor, *, slot: str) -> None:
    """In bfloat16 and float16, outputs have that dtype, or the declared dtype, and are finite."""
    component.eval()
    calls = calls_of(component, example, slot)
    unsupported = []
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(component).to(dtype)
        for call in calls:
            try:
                outputs = call.in_dtype(dtype)(half)
            except RuntimeError as error:
                if not any(text in str(error) for text in NO_KERNEL):
                    raise
                unsupported.append(f"{call.name} in {dtype}: {str(error).splitlines()[0]}")
                continue
            floats = [x for x in tensors(outputs) if x.is_floating_point()]
            ensure(all(x.isfinite().all() for x in floats), f"{call.name} in {dtype} is not finite")
            if call.name in ("targets", "losses", "alignment"):
                continue
            declared = call.output_dtypes or ("model",) * len(tensors(outputs))
            expected = [dtype if name == "model" else getattr(torch, name) for name in declared]
            dtypes = [x.dtype for x in tensors(outputs)]
            wrong = [
                f"{actual}, expected {due}"
                for actual, due in zip(dtypes, expected, strict=False)
                if actual != due and (call.output_dtypes or actual.is_floating_point)
            ]
            ensure(not wrong, f"{call.name} in {dtype} returns {'; '.join(wrong)}")
    if unsupported:
        raise NotApplicable("; ".join(unsupported))


@check_for(*MODEL_SLOTS)
@torch.no_grad()
def check_state_dict(component: Any, example: Tensor, *, slot: str) -> None:
    """A copy that loads its weights from safetensors computes the same."""
    from safetensors.torch import load_model, save_model

    if not component.state_dict():
        raise NotApplicable("it has no weights")
    component.eval()
    if names := unregistered_tensors(component):
        raise CheckError(
            f"tensors that are neither parameter nor buffer: {list_briefly(names, 3)}. They are not in"
            " checkpoints and do not move with the module to another device: use nn.Parameter or"
            " register_buffer"
        )
    calls = calls_of(component, example, slot)
    restored = copy.deepcopy(component)
    for weight in restored.state_dict().values():
        weight.zero_()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        save_model(component, str(file))
        load_model(restored, file)
    for call in calls:
        ensure_equal(call(restored), call(component), f"{call.name} after a round trip of the weights")


@check_for(*MODEL_SLOTS)
def check_exports(component: Any, example: Any, *, slot: str) -> None:
    """torch.export traces the component for any batch size, and the exported program computes the same."""
    component.eval().requires_grad_(False)
    with torch.no_grad():
        examples = (example, enlarged(example, slot))
        for call, larger in zip(*(calls_of(component, x, slot) for x in examples), strict=True):
            if not call.is_exported:
                continue
            expected = larger(component)
            program = trace_call(component, call, larger)
            # A trace omits `contiguous` where the traced tensor is contiguous; with more than one thread,
            # oneDNN's convolutions may return another memory order than the traced one, which `view` refuses.
            with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
                output = program.module()(*larger.inputs)
            ensure_close(output, expected, f"{call.name}, exported, larger batch")


def unregistered_tensors(component: nn.Module) -> list[str]:
    """Return the names of attributes that hold tensors, alone or in lists, which are not registered."""
    owned = {id(x) for x in (*component.parameters(), *component.buffers())}
    return [
        f"{name}.{attribute}" if name else attribute
        for name, module in component.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in ("_parameters", "_buffers", "_modules")
        and any(isinstance(leaf, Tensor) and id(leaf) not in owned for leaf in pytree.tree_leaves(value))
    ]

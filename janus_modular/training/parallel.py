"""How components lie on the processes of a run, and how their activations are kept.

By default a component is whole in each process. With ``fsdp``, the blocks of a component (its decoder layers,
for example) are sharded over all processes by PyTorch's FSDP2: each block is gathered when it runs. What lies
outside of the blocks (embeddings, heads) stays whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from janus_modular.errors import ConfigError, TrainingError
from janus_modular.model.model import JanusModel
from janus_modular.suggest import did_you_mean
from janus_modular.weights.loading import own_copy


def shard_components(
    model: JanusModel,
    policies: Mapping[str, str],
    *,
    device: torch.device,
    world: int,
    dtype: torch.dtype | None,
) -> None:
    """Shard the blocks of the components whose policy is ``fsdp``, in place.

    Blocks are gathered in ``dtype``, and gradients are summed in float32. Each process passes the whole
    weights, or a model on the meta device, whose weights are loaded afterwards (`PartLoader`).

    Raises:
        ConfigError: there is no such component, or it has no blocks.
        TrainingError: a parameter of a block was not sharded.
    """
    check_components(model, policies, ())
    sharded = [name for name, policy in policies.items() if policy == "fsdp"]
    if world == 1 or not sharded:
        return
    mesh = init_device_mesh(device.type, (world,))
    precision = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=None if dtype is None else torch.float32,
        cast_forward_inputs=False,  # as under autocast, which keeps the residual stream in float32
    )
    for name in sharded:
        component = model.get_submodule(name)
        blocks = blocks_of(name, component, "parallel")
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=precision)
        inside = {parameter for block in blocks for parameter in block.parameters()}
        fully_shard(component, mesh=mesh, ignored_params={*component.parameters()} - inside)
        for module in (component, *blocks):  # gradients are sums, as the loss is of the whole step
            cast(FSDPModule, module).set_gradient_divide_factor(1.0)
            cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)
        if whole := [key for key, parameter in _parameters(blocks) if not isinstance(parameter, DTensor)]:
            raise TrainingError(
                f"parallel: {name} was to be sharded, and {len(whole)} parameters of its blocks are not:"
                f" {', '.join(whole[:3])}. Leave it out of parallel, and report this."
            )


def checkpoint_activations(model: JanusModel, components: Sequence[str]) -> None:
    """Make the blocks of components keep their inputs alone, and compute again what backward needs.

    Raises:
        ConfigError: there is no such component, or it has no blocks.
    """
    check_components(model, {}, components)
    for name in components:
        for block in blocks_of(name, model.get_submodule(name), "activation_checkpointing"):
            forward: Callable[..., Any] = block.forward
            block.forward = partial(checkpoint, forward, use_reentrant=False)


def check_components(
    model: JanusModel,
    policies: Mapping[str, str],
    recomputed: Sequence[str],
    compiled: Sequence[str] = (),
) -> None:
    """Check the components that the settings of components name; weights are not needed.

    Raises:
        ConfigError: there is no such component, it has no blocks, or it is not called as a module.
    """
    known = model.components()
    named = {"parallel": policies, "activation_checkpointing": recomputed, "compile": compiled}
    for key, names in named.items():
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(
                    f"{key}: found '{name}', which is no component; expected {', '.join(known)}."
                    f" {hint}".rstrip()
                )
            if name in [f"generation.{path}" for path in model.generation.frozen_submodules]:
                raise ConfigError(
                    f"{key}: found {name}; expected a component that is trained: the image tokenizer is not"
                    " called as a module, and has no gradients. Leave it out."
                )
            if policies.get(name) != "ddp":
                blocks_of(name, known[name], key)


def blocks_of(name: str, component: nn.Module, key: str) -> list[nn.Module]:
    """Return the blocks of a component: what its lists of modules hold, or else its sequences of modules.

    Lists within blocks are not divided, and modules without parameters are no blocks.

    Raises:
        ConfigError: it has neither.
    """
    blocks: list[nn.Module] = []
    for of_type in (nn.ModuleList, nn.Sequential):
        paths = [path for path, module in component.named_modules() if isinstance(module, of_type)]
        outer = [path for path in paths if not any(path.startswith(f"{outside}.") for outside in paths)]
        children = [child for path in outer for child in component.get_submodule(path).children()]
        blocks = blocks or [child for child in children if next(child.parameters(), None) is not None]
    if not blocks:
        raise ConfigError(
            f"{key}: {name} ({type(component).__name__}) has no list of blocks (nn.ModuleList or"
            " nn.Sequential); expected one, like the layers of a transformer. Leave it out."
        )
    return blocks


class PartLoader:
    """Copies stored tensors into the parameters of a model on the meta device, sharded ones in part.

    Its ``digest`` is of some numbers of each tensor as a whole, to compare processes at the start.
    """

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def __call__(
        self, target: Tensor, tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None
    ) -> Tensor:
        """Return this process's part of a tensor on the device, or the whole if its target is not sharded."""
        self.sample(tensor)
        if not isinstance(target, DTensor):
            return own_copy(target, tensor, device, dtype)
        local = own_copy(target, local_part(tensor, target), device, dtype)
        return DTensor.from_local(
            local,
            target.device_mesh,
            target.placements,
            run_check=False,
            shape=target.shape,
            stride=target.stride(),
        )

    def sample(self, tensor: Tensor) -> None:
        """Add some numbers of a whole tensor to the digest."""
        flat = tensor.detach().flatten()
        self.digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())


def renew_shards(model: nn.Module) -> None:
    """Have FSDP2 take the parameters that were loaded in place of those of a model on the meta device."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.to(next(module.parameters()).device)  # changes nothing else


def local_part(whole: Tensor, like: DTensor) -> Tensor:
    """Return this process's part of a whole tensor that is to be sharded as ``like`` is.

    The parts are those of `torch.chunk`, as ``Shard`` defines; the last processes may have none.
    """
    for mesh_dim, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            parts = whole.chunk(like.device_mesh.size(mesh_dim), placement.dim)
            rank = like.device_mesh.get_local_rank(mesh_dim)
            whole = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _parameters(blocks: Sequence[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for block in blocks for name, parameter in block.named_parameters()]

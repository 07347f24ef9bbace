"""Builds modules on the meta device, and loads tensors into them one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from janus_modular.errors import CheckpointError
from janus_modular.foreign import printable

Copy = Callable[[Tensor, Tensor, torch.device | str, torch.dtype | None], Tensor]
"""``copy(target, tensor, device, dtype)`` returns what takes the place of a target on the meta device."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters are on the meta device, and whose buffers are real.

    Buffers that no checkpoint holds (rotary tables, embedding scales, position ids) then have the values
    that their module computes, which ``torch.device("meta")`` would lose.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # on meta: a tied weight, which must stay one object
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # may return one
    try:
        yield
    finally:
        handle.remove()


@dataclass
class LoadResult:
    """The names of the weights that were loaded into a module, and of those that were not."""

    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)  # "name: found (2, 3), expected (3, 3)"

    def check(self, subject: str, components: Sequence[str] = ()) -> None:
        """Raise CheckpointError if any weight does not fit; names are listed by component."""
        lines = [
            *_listed("missing", self.missing, components),
            *_listed("unexpected", self.unexpected, components),
            *_listed("of another shape or kind", self.mismatched, components),
        ]
        if lines:
            raise CheckpointError(f"{printable(subject)} does not fit:\n" + "\n".join(lines))


def own_copy(target: Tensor, tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    """Return a copy of a tensor, even of a mapped file, which may change while the model is trained."""
    return tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def load_weights(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    copy: Copy = own_copy,
) -> LoadResult:
    """Copy named tensors, one at a time, into a module's parameters and persistent buffers.

    Parameters on the meta device are created by ``copy`` on ``device``, in ``dtype`` (None: as stored); real
    ones keep their own. A tied weight may come under any of its names. ``device="meta"`` only compares names
    and shapes.
    """
    result = LoadResult()
    state: dict[str, Tensor] = {
        name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)
    }
    owners = _owners(module)
    loaded: dict[int, Tensor] = {}  # by id of the target
    for name, tensor in tensors:
        target = state.get(name)
        if target is None:
            result.unexpected.append(name)
        elif target.is_floating_point() != tensor.is_floating_point():
            result.mismatched.append(f"{name}: found {tensor.dtype}, expected {target.dtype}")
            loaded[id(target)] = tensor
        elif target.shape != tensor.shape:
            result.mismatched.append(f"{name}: found {tuple(tensor.shape)}, expected {tuple(target.shape)}")
            loaded[id(target)] = tensor
        elif id(target) in loaded:
            result.loaded += 1
            tied = loaded[id(target)]
            if not (tied.is_meta or torch.equal(tied.to(tensor), tensor)):
                result.mismatched.append(f"{name}: differs from the weight that the config ties it to")
        else:
            result.loaded += 1
            loaded[id(target)] = _copy(target, tensor, owners[id(target)], device, dtype, copy)
    missing = {id(value): name for name, value in reversed(state.items()) if id(value) not in loaded}
    result.missing = sorted(missing.values())
    return result


def _copy(
    target: Tensor,
    tensor: Tensor,
    owners: list[tuple[nn.Module, str]],
    device: torch.device | str,
    dtype: torch.dtype | None,
    copy: Copy,
) -> Tensor:
    """Copy a tensor into its target, or put a copy in place of a target on the meta device."""
    if str(device) == "meta":
        return tensor
    if not target.is_meta:
        with torch.no_grad():
            return target.copy_(tensor)
    created = copy(target, tensor, device, dtype if tensor.is_floating_point() else None)
    if isinstance(target, nn.Parameter):
        created = nn.Parameter(created, requires_grad=target.requires_grad)
    for module, name in owners:
        setattr(module, name, created)
    return created


def belongs_to(name: str, module: nn.Module) -> bool:
    """Return True if a weight's name begins with a submodule of ``module`` (``decoder.``).

    A component must not ignore such a weight, even if it has no parameter of this name: the file is then that
    of a component which computes something else.
    """
    first, dot, _ = name.partition(".")
    return bool(dot) and first in dict(module.named_children())


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors (all on one device) that hold NaN or infinity."""
    floats = {name: t.detach() for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floats:
        return []
    wide = (x if x.element_size() > 1 else x.float() for x in floats.values())  # torch sorts no float8
    ranges = [torch.stack(torch.aminmax(x)).float() for x in wide]
    finite = torch.stack(ranges).isfinite().all(dim=1).tolist()  # the only synchronisation
    return [name for name, is_finite in zip(floats, finite, strict=True) if not is_finite]


def move_buffers(module: nn.Module, *, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Move the buffers of a loaded module to its device; cast persistent ones to its dtype."""
    persistent = {id(value) for value in module.state_dict(keep_vars=True).values()}
    for submodule in module.modules():
        for name, buffer in submodule._buffers.items():
            if buffer is not None:
                casts = id(buffer) in persistent and buffer.is_floating_point()
                submodule._buffers[name] = buffer.to(device, dtype if casts else None)


def _owners(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the submodules that hold each tensor, by its id: several where it is tied."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for submodule in module.modules():
        for name, value in (*submodule._parameters.items(), *submodule._buffers.items()):
            owners[id(value)].append((submodule, name))
    return owners


def _listed(label: str, names: Sequence[str], components: Sequence[str], most: int = 8) -> Iterator[str]:
    """Yield the lines of a message: the first ``most`` names of each component."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        containing = [component for component in components if name.startswith(f"{component}.")]
        groups[max(containing, key=len, default="")].append(name)
    for component, group in groups.items():
        more = [f"... and {len(group) - most} more"] if len(group) > most else []
        yield f"  {len(group)} {label}{f' in {component}' if component else ''}:"
        yield from (f"    {printable(name)}" for name in [*group[:most], *more])

"""Building modules without memory, and putting tensors into them one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from janus_modular.errors import CheckpointError
from janus_modular.foreign import printable


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters take no memory, and whose buffers are real.

    Buffers that no checkpoint holds (rotary tables, embedding scales, position ids) so come out as their
    module computes them; under ``torch.device("meta")`` they would be garbage afterwards.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # on meta: another's, tied; it must stay the same object
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # may return one
    try:
        yield
    finally:
        handle.remove()


@dataclass
class LoadResult:
    """What became of the names that were offered to a module."""

    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)  # "name: found (2, 3), expected (3, 3)"

    def check(self, what: str, components: Sequence[str] = ()) -> None:
        """Raise CheckpointError if anything is wrong; names are listed by component."""
        faults = [
            *_listed("missing", self.missing, components),
            *_listed("unexpected", self.unexpected, components),
            *_listed("of another shape or kind", self.mismatched, components),
        ]
        if faults:
            raise CheckpointError(f"{printable(what)} does not fit:\n" + "\n".join(faults))


def load_weights(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadResult:
    """Put named tensors into a module's parameters and persistent buffers, copying each once.

    Parameters on the meta device are made on ``device``, in ``dtype`` (None: as they come); real ones
    keep their own. A tied weight may come under any of its names. ``device="meta"`` compares names and
    shapes alone.
    """
    outcome = LoadResult()
    state: dict[str, Tensor] = {
        name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)
    }
    homes = _homes(module)
    filled: dict[int, Tensor] = {}
    for name, tensor in tensors:
        target = state.get(name)
        if target is None:
            outcome.unexpected.append(name)
        elif target.is_floating_point() != tensor.is_floating_point():
            outcome.mismatched.append(f"{name}: found {tensor.dtype}, expected {target.dtype}")
            filled[id(target)] = tensor
        elif target.shape != tensor.shape:
            outcome.mismatched.append(f"{name}: found {tuple(tensor.shape)}, expected {tuple(target.shape)}")
            filled[id(target)] = tensor
        elif id(target) in filled:
            outcome.loaded += 1
            twin = filled[id(target)]
            if not (twin.is_meta or torch.equal(twin.to(tensor), tensor)):
                outcome.mismatched.append(f"{name}: differs from the weight that the config ties it to")
        else:
            outcome.loaded += 1
            filled[id(target)] = _put(target, tensor, homes[id(target)], device, dtype)
    missing = {id(value): name for name, value in reversed(state.items()) if id(value) not in filled}
    outcome.missing = sorted(missing.values())
    return outcome


def _put(
    target: Tensor,
    tensor: Tensor,
    homes: list[tuple[nn.Module, str]],
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> Tensor:
    if str(device) == "meta":
        return tensor  # names and shapes were what was asked for
    if not target.is_meta:
        with torch.no_grad():
            return target.copy_(tensor)
    kind = dtype if tensor.is_floating_point() else None
    # A copy, though a mapped file would do: nobody's training then depends on a file that may change.
    made = tensor.to(device, kind, copy=True, memory_format=torch.contiguous_format)
    if isinstance(target, nn.Parameter):
        made = nn.Parameter(made, requires_grad=target.requires_grad)
    for module, name in homes:
        setattr(module, name, made)
    return made


def belongs_to(name: str, module: nn.Module) -> bool:
    """Say whether a weight's name is inside one of a module's parts (``decoder.``), known there or not.

    One that is not known there belongs to another function than the module's, and must not be passed over.
    """
    first, dot, _ = name.partition(".")
    return bool(dot) and first in dict(module.named_children())


def move_buffers(module: nn.Module, *, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Bring the buffers of a filled module to its device; persistent ones to its dtype too."""
    kept = {id(value) for value in module.state_dict(keep_vars=True).values()}
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                kind = dtype if id(buffer) in kept and buffer.is_floating_point() else None
                part._buffers[name] = buffer.to(device, kind)


def _homes(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Find where each tensor is held: several places where it is tied."""
    homes: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for part in module.modules():
        for name, value in (*part._parameters.items(), *part._buffers.items()):
            homes[id(value)].append((part, name))
    return homes


def _listed(what: str, names: Sequence[str], components: Sequence[str], most: int = 8) -> Iterator[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        inside = [part for part in components if name.startswith(f"{part}.")]
        groups[max(inside, key=len, default="")].append(name)
    for part, found in groups.items():
        more = [f"... and {len(found) - most} more"] if len(found) > most else []
        yield f"  {len(found)} {what}{f' in {part}' if part else ''}:"
        yield from (f"    {printable(name)}" for name in [*found[:most], *more])

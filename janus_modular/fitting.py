"""Whether what a plugin built has the shape of its slot: the attributes and methods of its interface."""

from __future__ import annotations

from inspect import get_annotations
from typing import Any, get_args, get_type_hints

from torch import nn

from janus_modular.registry import Hooks
from janus_modular.suggest import did_you_mean


def misfit(component: Any, slot: str) -> str:
    """Say what ``component`` lacks of its slot's interface in ``interfaces.py``; nothing where it fits."""
    if not isinstance(component, nn.Module):
        return f"it is built as {component!r}; expected a torch.nn.Module."
    hints = get_type_hints(getattr(Hooks, f"register_{slot}"))
    interface = get_args(hints["registry"])[0]
    members = [name for name in (*get_annotations(interface), *vars(interface)) if not name.startswith("_")]
    has = [name for name in dir(component) if not hasattr(nn.Module, name)]
    lacks = [f"{name} {did_you_mean(name, has)}".rstrip() for name in members if not _has(component, name)]
    return f"it lacks {', '.join(lacks)} (see {interface.__name__} in interfaces.py)." if lacks else ""


def _has(component: nn.Module, name: str) -> bool:
    if name == "forward":  # torch's own raises NotImplementedError
        return type(component).forward is not nn.Module.forward
    return hasattr(component, name)

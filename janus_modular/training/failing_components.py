"""After a step that failed: which component of the model raised an error, or returned what is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from janus_modular.config import component_specs, module_path
from janus_modular.model.model import JanusModel


def raising_component(error: BaseException) -> str | None:
    """Return the component in which an error was raised: ``generation.head (mlp)``; None if in none.

    It is that of the last module of a model among the traceback's frames.
    """
    labels: dict[int, str] = {}  # by the id of each module
    component, frame = None, error.__traceback__
    while frame is not None:
        values = frame.tb_frame.f_locals
        if not labels and (model := next((v for v in values.values() if isinstance(v, JanusModel)), None)):
            labels = {id(module): label for module, label in _labelled(model)}
        component = labels.get(id(values.get("self")), component)
        frame = frame.tb_next
    return component


@contextmanager
def recording_non_finite(model: JanusModel, causes: list[str]) -> Iterator[None]:
    """Append the components whose outputs are not finite to ``causes``, in the order in which they return.

    A component that gets NaN is not the cause, and not recorded. Each is recorded once.
    """
    names = {module_path(path): spec.name for path, spec in component_specs(model.config)}

    def hook(label: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            is_cause = any(not bool(tensor.isfinite().all()) for tensor in _tensors(output)) and not any(
                bool(tensor.isnan().any()) for tensor in _tensors((args, kwargs))
            )
            if is_cause and label not in causes:
                causes.append(label)

        return record

    with ExitStack() as stack:
        for path, module in model.components().items():
            handle = module.register_forward_hook(hook(f"{path} ({names[path]})"), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of numbers with a fraction in a value, also in dataclasses."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from _tensors(getattr(leaf, field.name))


def _labelled(model: JanusModel) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules of a model's components, each with the component that it is inside of."""
    names = {module_path(path): spec.name for path, spec in component_specs(model.config)}
    for path, module in model.named_modules():
        owners = [owner for owner in names if path == owner or path.startswith(f"{owner}.")]
        if owners:
            owner = max(owners, key=len)
            yield module, f"{owner} ({names[owner]})"

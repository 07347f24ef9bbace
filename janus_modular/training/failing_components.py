"""After a step that failed: which component of the model raised an error, or returned what is not finite."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from janus_modular.config import component_specs, module_path
from janus_modular.model.model import JanusModel


def raising_component(error: BaseException) -> str | None:
    """Return the component in which an error was raised: ``generation.head (mlp)``; None if in none.

    It is that of the last module of a model among the traceback's frames.
    """
    labels: dict[int, str] = {}  # by the id of each module
    found, frame = None, error.__traceback__
    while frame is not None:
        values = frame.tb_frame.f_locals
        if not labels and (model := next((v for v in values.values() if isinstance(v, JanusModel)), None)):
            labels = {id(module): label for module, label in _labelled(model)}
        found = labels.get(id(values.get("self")), found)
        frame = frame.tb_next
    return found


def _labelled(model: JanusModel) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules of a model's components, each with the component that it is inside of."""
    names = {module_path(path): spec.name for path, spec in component_specs(model.config)}
    for path, module in model.named_modules():
        owners = [owner for owner in names if path == owner or path.startswith(f"{owner}.")]
        if owners:
            owner = max(owners, key=len)
            yield module, f"{owner} ({names[owner]})"

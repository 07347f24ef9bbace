"""Why a module cannot become a graph: which one it is, what it does, and what would help."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from traceback import walk_tb

from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from janus_export.errors import ExportError
from janus_export.onnx_export.kv_cache import CACHES
from janus_modular import JanusError

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
HOW_TO = "docs/how-to/write-a-component.md"

TALKATIVE = ("torch.onnx", "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
"""Loggers that tell of what fails, at length; what matters of it is in the error."""


@contextmanager
def explained(graph: str, root: nn.Module) -> Iterator[None]:
    """Turn whatever goes wrong inside into an ExportError that says where in ``root``, and why.

    ``root`` is the model, or a part of a graph that holds it as ``model``.
    """
    try:
        with _quiet():
            yield
    except ExportError:
        raise
    except Exception as error:
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)  # type: ignore[arg-type]  # what is raised here is an Exception
        where, operator = _place(causes, root)
        raise ExportError(
            f"the graph '{graph}' cannot be exported: {where} {_reason(causes[-1], operator)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's own account off the terminal: it prints whole graphs."""
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _place(causes: list[Exception], root: nn.Module) -> tuple[str, str | None]:
    """Find the innermost module at work, in words, and the operator where one was being translated."""
    model = getattr(root, "model", root)
    names = {module: name for name, module in model.named_modules()}
    for error in reversed(causes):
        for frame, _ in reversed(list(walk_tb(error.__traceback__))):
            node, module = (frame.f_locals.get(name) for name in ("node", "self"))
            if isinstance(node, fx.Node) and (stack := node.meta.get("nn_module_stack")):
                path, module_type = list(stack.values())[-1]
                module_type = module_type if isinstance(module_type, str) else module_type.__name__
                name = path if model is root else path.removeprefix("model").removeprefix(".")
                return _named(name, module_type.rpartition(".")[2]), str(node.target)
            if isinstance(module, nn.Module) and module in names:
                return _named(names[module], type(module).__name__), None
    return "the model", None


def _named(path: str, module_type: str) -> str:
    return f"{path} ({module_type})" if path else module_type


def _reason(error: Exception, operator: str | None) -> str:
    """Return what a module did that no graph can do, and how to fix it."""
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    if operator is not None and type(error).__name__ == "DispatchError":
        return (
            f"uses the operator {operator}, which torch does not translate to ONNX. Write it in other"
            f" operators, or let the component say how in `onnx_translations`: {HOW_TO}"
        )
    if operator is not None:
        return f"uses the operator {operator}, whose translation to ONNX failed: {message}"
    if isinstance(error, AttributeError) and isinstance(error.obj, CACHES):
        return (
            f"asks its cache for '{error.name}', but the cache of a graph holds keys and values alone. Layers"
            " that keep a state of another kind (state space, linear attention, convolution) cannot become"
            " part of it: choose a backbone all of whose layers attend, such as llama or qwen3."
        )
    if isinstance(error, JanusError):
        return f"says: {error}"
    if fixed := re.match(r"Constraints violated \((.*?)\)", message):
        return f"fixes the length of {fixed[1]}, which differs from run to run: read it off the input's shape"
    if isinstance(error, DATA_DEPENDENT):
        return (
            f"lets the values of tensors decide what is computed, or how large it is ({message}); a graph"
            " does the same for all. Select with torch.where and masks, or take another way where"
            f" torch.compiler.is_exporting(): {HOW_TO}"
        )
    return (
        f"cannot be traced by torch ({type(error).__name__}: {message}). Choose another component, or let"
        f" this one take another way where torch.compiler.is_exporting(): {HOW_TO}"
    )

"""Explains why a module cannot be exported: which module, the cause, and a fix."""

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
"""Loggers that print long reports of failures; the error contains the relevant part."""


@contextmanager
def explained(graph: str, root: nn.Module) -> Iterator[None]:
    """Turn any exception inside into an ExportError that names the module in ``root`` and the cause.

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
        where, operator = _location(causes, root)
        raise ExportError(
            f"the graph '{graph}' cannot be exported: {where} {_reason(causes[-1], operator)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's own report, which prints whole graphs."""
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _location(causes: list[Exception], root: nn.Module) -> tuple[str, str | None]:
    """Return a description of the innermost running module, and the operator if one was being translated."""
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
    """Return what a module does that cannot be exported, and how to fix it."""
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    if operator is not None and type(error).__name__ == "DispatchError":
        return (
            f"uses the operator {operator}, which torch does not translate to ONNX. Use other"
            f" operators, or let the component translate it in `onnx_translations`: {HOW_TO}"
        )
    if operator is not None:
        return f"uses the operator {operator}, whose translation to ONNX failed: {message}"
    if isinstance(error, AttributeError) and isinstance(error.obj, CACHES):
        return (
            f"uses '{error.name}' of its cache, but an exported cache contains only keys and values, and the"
            " tensors that a backbone declares (janus_modular.DeclaresCache). Layers of transformers with"
            " another kind of state (state space, linear attention, convolution) cannot be exported: choose a"
            " backbone with attention layers only, such as llama or qwen3."
        )
    if isinstance(error, JanusError):
        return f"raises: {error}"
    if fixed := re.match(r"Constraints violated \((.*?)\)", message):
        return (
            f"fixes the length of {fixed[1]}, which is dynamic: read it from the input's shape (x.shape[0];"
            " len(x) is a fixed number)"
        )
    if isinstance(error, DATA_DEPENDENT):
        return (
            f"has control flow or shapes that depend on values of tensors ({message}), which a graph cannot"
            " express. Select with torch.where and masks, or use another code path if"
            f" torch.compiler.is_exporting(): {HOW_TO}"
        )
    return (
        f"cannot be traced by torch ({type(error).__name__}: {message}). Choose another component, or use"
        f" another code path in it if torch.compiler.is_exporting(): {HOW_TO}"
    )

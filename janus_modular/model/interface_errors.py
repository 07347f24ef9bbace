"""Checks a component of a model against its slot's interface: its members, and their signatures."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from inspect import Parameter, get_annotations, isfunction, signature
from typing import Any, get_args, get_type_hints

from torch import nn

from janus_modular.capabilities import DeclaresCache, DeclaresPositions, EncodesImages
from janus_modular.graph_specs import (
    AXES,
    CORE_GRAPHS,
    DTYPES,
    GraphRole,
    GraphSpec,
    TensorSpec,
    factor_and_axis,
)
from janus_modular.positions import POSITION_AXES
from janus_modular.registry import MODEL_SLOTS, Hooks
from janus_modular.renamed import RENAMED
from janus_modular.sequence import EncodedSpec
from janus_modular.suggest import did_you_mean

CACHE_DTYPES = ("model", "float32")
"""Dtypes of the tensors of a cache."""


def interface_errors(component: Any, slot: str) -> str:
    """Return how a component differs from its slot's interface; "" where it implements it."""
    if slot not in MODEL_SLOTS:
        return ""
    if not isinstance(component, nn.Module):
        return f"it is built as {component!r}; expected a torch.nn.Module."
    interface = get_args(get_type_hints(getattr(Hooks, f"register_{slot}"))["registry"])[0]
    members = [name for name in (*get_annotations(interface), *vars(interface)) if not name.startswith("_")]
    present = [name for name in dir(component) if not hasattr(nn.Module, name)]
    missing = [name for name in members if not _has(component, name)]
    if missing:
        message = f"it lacks {', '.join(missing)} (see {interface.__name__} in interfaces.py)."
        hints = [_renaming(name, present) or did_you_mean(name, present) for name in missing]
        return " ".join([message, *filter(None, hints)])
    methods = [(name, method) for name, method in vars(interface).items() if isfunction(method)]
    errors = [_signature_error(component, name, method) for name, method in methods if name in members]
    if any(errors):
        return f"{' '.join(filter(None, errors))} (see {interface.__name__} in interfaces.py)."
    if slot == "backbones":
        return _cache_errors(component) or _axes_errors(component)
    return _path_errors(component) if slot == "generation" else ""


def _renaming(missing: str, members: list[str]) -> str:
    """Return a hint if a component has the missing member under its name of the previous version."""
    old = next((name for name in members if missing in RENAMED.get(name, ())), None)
    return f"Its '{old}' is called '{missing}' now." if old else ""


def _path_errors(path: Any) -> str:
    """Return what is wrong with what a generation path declares for samplers and export."""
    return _wrong_sizes(path.sizes) or _wrong_form(path) or _wrong_graphs(path.graphs())


def _wrong_form(path: Any) -> str:
    """Return what is wrong with the form of encoded images; "" where there is none, or it is right."""
    if not isinstance(path, EncodesImages) or isinstance(path.encoded, EncodedSpec):
        return ""
    return f"its encoded is {path.encoded!r}; expected a janus_modular.EncodedSpec."


def _cache_errors(backbone: Any) -> str:
    """Return what is wrong with the cache that a backbone declares; "" where sessions can carry it."""
    if not isinstance(backbone, DeclaresCache):
        return ""
    tensors = backbone.cache_tensors
    if not isinstance(tensors, list | tuple) or not all(isinstance(spec, TensorSpec) for spec in tensors):
        return f"its cache_tensors are {tensors!r:.200}; expected a list of janus_modular.TensorSpec."
    if not tensors:
        return "its cache_tensors are empty; expected what a step needs of earlier positions."
    names = [spec.name for spec in tensors]
    if len(set(names)) < len(names):
        return f"its cache_tensors are called {', '.join(names)}; expected different names."
    for spec in tensors:
        axes = [size for size in spec.shape if isinstance(size, str)]
        if axes not in (["rows"], ["rows", "capacity"]) or spec.shape[0] != "rows":
            return (
                f"'{spec.name}' of its cache_tensors has the shape {spec.shape}; expected 'rows' first,"
                " sizes, and 'capacity' where it has an entry for each position."
            )
        if spec.dtype not in CACHE_DTYPES:
            expected = " or ".join(CACHE_DTYPES)
            return f"'{spec.name}' of its cache_tensors is of {spec.dtype!r}; expected {expected}."
    return ""


def _axes_errors(backbone: Any) -> str:
    """Return what is wrong with the axes of position ids that a backbone declares."""
    if not isinstance(backbone, DeclaresPositions):
        return ""
    axes = list(backbone.position_axes)
    if not axes or len(set(axes)) < len(axes) or not set(axes) <= set(POSITION_AXES):
        return f"its position_axes are {axes}; expected some of {', '.join(POSITION_AXES)}, each once."
    return ""


def _wrong_sizes(sizes: Any) -> str:
    """Return what is wrong with the sizes of a generation path; "" where a manifest can hold them."""
    if not isinstance(sizes, Mapping) or not all(isinstance(name, str) for name in sizes):
        return f"its sizes are {sizes!r}; expected a mapping from names to values."
    wrong = {name: size for name, size in sizes.items() if not _is_json(size)}
    return (
        f"its sizes hold {wrong}; expected what JSON can hold: finite numbers, strings, and lists of them."
        if wrong
        else ""
    )


def _wrong_graphs(graphs: Any) -> str:
    """Return what is wrong with the graphs of a generation path; "" where export can compile them."""
    if not isinstance(graphs, list | tuple) or not all(isinstance(graph, GraphSpec) for graph in graphs):
        return f"its graphs() returns {graphs!r}; expected a list of janus_modular.GraphSpec."
    for name, count in Counter(graph.name for graph in graphs).items():
        if count > 1:
            return f"its graphs() has {count} graphs called '{name}'; expected different names."
        if name in CORE_GRAPHS or not re.fullmatch("[a-z][a-z0-9_]*", name):
            return (
                f"its graphs() has a graph called '{name}'; expected lower-case letters, digits and"
                f" underscores, and none of {', '.join(CORE_GRAPHS)}."
            )
    for graph in graphs:
        if graph.role not in get_args(GraphRole):
            roles = ", ".join(get_args(GraphRole))
            return f"its graph '{graph.name}' has the role {graph.role!r}; expected one of {roles}."
        for spec in (*graph.inputs, *graph.outputs):
            label = f"'{spec.name}' of its graph '{graph.name}'"
            if spec.dtype not in DTYPES:
                return f"{label} has the dtype {spec.dtype!r}; expected one of {', '.join(DTYPES)}."
            if not all(_is_dimension(size) for size in spec.shape):
                return (
                    f"{label} has the shape {spec.shape}; expected sizes from 1, axes ({', '.join(AXES)}), or"
                    " multiples of axes ('2*rows')."
                )
        for spec in graph.outputs:
            if spec.name == "x" and (spec.dtype != "model" or len(spec.shape) != 2):
                return (
                    f"the output 'x' of its graph '{graph.name}' is {spec.dtype} {spec.shape}; expected model"
                    " ('rows', hidden size), the backbone's next input. Give another output another name."
                )
    return ""


def _is_dimension(size: int | str) -> bool:
    if isinstance(size, int):
        return size >= 1
    try:
        factor, axis = factor_and_axis(size)
    except ValueError:
        return False
    return factor >= 1 and axis in AXES


def _is_json(value: Any) -> bool:
    """Return True if a value is read from JSON as it was written; a tuple comes back as a list."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def _signature_error(component: nn.Module, name: str, method: Callable[..., Any]) -> str:
    """Return how a component's method differs from its interface's signature; "" where it can be called."""
    parameters = list(signature(method).parameters.values())[1:]  # without self
    keywords = {p.name: None for p in parameters if p.kind is Parameter.KEYWORD_ONLY}
    expected = f"expected {name}({', '.join(p.name for p in parameters)})"
    try:
        actual = signature(getattr(component, name))
    except TypeError:
        return f"its {name} is no method; {expected}"
    except ValueError:  # written in C, without a signature
        return ""
    try:
        actual.bind(*(p.name for p in parameters if p.name not in keywords), **keywords)
    except TypeError:
        return f"its {name} takes ({', '.join(actual.parameters)}); {expected}"
    return ""


def _has(component: nn.Module, name: str) -> bool:
    if name == "forward":  # torch's own raises NotImplementedError
        return type(component).forward is not nn.Module.forward
    return hasattr(component, name)

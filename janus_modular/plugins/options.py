"""Lists the options of a component's config dataclass, each with the comment beside its field."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import MISSING, Field, fields
from typing import Any


def options_of(config: type[Any]) -> list[dict[str, str]]:
    """Return name, type, default and comment of every option, own options before inherited ones."""
    comments: dict[str, str] = {}
    for cls in config.__mro__[:-1]:
        comments = {**comments_of(cls), **comments}
    own = set(inspect.get_annotations(config))
    return [
        {
            "name": field.name,
            "type": field.type
            if isinstance(field.type, str)
            else getattr(field.type, "__name__", str(field.type)),
            "default": _default(field),
            "comment": comments.get(field.name, ""),
        }
        for field in sorted(fields(config), key=lambda field: field.name not in own)
        if field.init
    ]


def _default(field: Field[Any]) -> str:
    if slot := field.metadata.get("slot"):
        return f"a component of {slot}"
    if field.default is not MISSING:
        return repr(field.default)
    return "required" if field.default_factory is MISSING else repr(field.default_factory())


def comments_of(cls: type[Any]) -> dict[str, str]:
    """Return the comments on a class' fields, read from its source; {} if there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    lines: dict[int, str] = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    comments = {}
    for node in getattr(body, "body", []):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.end_lineno or node.lineno
            comments[node.target.id] = " ".join(lines[n] for n in range(node.lineno, last + 1) if n in lines)
    return comments

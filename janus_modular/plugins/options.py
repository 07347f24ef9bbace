"""What a component's config dataclass says for people: each option with the comment beside it."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import MISSING, Field, fields
from typing import Any


def options_of(config: type[Any]) -> list[dict[str, str]]:
    """Return name, type, default and comment of every option, its own before the inherited ones."""
    comments: dict[str, str] = {}
    for cls in config.__mro__[:-1]:
        comments = {**comments_of(cls), **comments}
    own = set(inspect.get_annotations(config))
    return [
        {
            "name": one.name,
            "type": one.type if isinstance(one.type, str) else getattr(one.type, "__name__", str(one.type)),
            "default": _default(one),
            "comment": comments.get(one.name, ""),
        }
        for one in sorted(fields(config), key=lambda one: one.name not in own)
        if one.init
    ]


def _default(one: Field[Any]) -> str:
    if slot := one.metadata.get("slot"):
        return f"a component of {slot}"
    if one.default is not MISSING:
        return repr(one.default)
    return "must be given" if one.default_factory is MISSING else repr(one.default_factory())


def comments_of(cls: type[Any]) -> dict[str, str]:
    """Read the comments on a class' fields from its source; none where there is no source."""
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
    found = {}
    for node in getattr(body, "body", []):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.end_lineno or node.lineno
            found[node.target.id] = " ".join(lines[n] for n in range(node.lineno, last + 1) if n in lines)
    return found

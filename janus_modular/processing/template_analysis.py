"""What can be read from a chat template's source: the variables that it takes, and what it looks for.

Kept apart, as ``chat_programs``, so that jinja2 is imported only where a chat template is used.
"""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import Environment, meta, nodes

SEARCHING = (
    "split", "rsplit", "partition", "rpartition", "startswith", "endswith", "removeprefix", "removesuffix",
    "replace", "find", "rfind", "index", "rindex", "count",
)  # fmt: skip
"""Methods of a text, and filters, whose first argument is looked for in it."""


def facts_of(environment: Environment, source: str) -> dict[str, list[str]]:
    """Return the ``variables`` that a template reads, and the strings ``searched`` for in texts."""
    tree = environment.parse(source)
    variables = meta.find_undeclared_variables(tree) - set(environment.globals)
    optional = {
        each.node.name
        for each in (*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter))
        if each.name in ("defined", "undefined", "default", "d") and isinstance(each.node, nodes.Name)
    }
    variables -= {each.name for each in tree.find_all(nodes.Name) if each.ctx == "store"} - optional
    return {"variables": sorted(variables), "searched": searched_strings(tree)}


def searched_strings(tree: nodes.Template) -> list[str]:
    """Return the strings that a template looks for in texts, as in ``'</think>' in content``.

    A template that holds such a string in a variable is followed one assignment far.
    """
    assigned = {
        each.target.name: each.node.value
        for each in tree.find_all(nodes.Assign)
        if isinstance(each.target, nodes.Name) and isinstance(each.node, nodes.Const)
    }
    values = (
        assigned.get(each.name) if isinstance(each, nodes.Name) else getattr(each, "value", None)
        for each in _search_terms(tree)
    )
    return sorted({value for value in values if isinstance(value, str) and len(value.strip()) > 2})


def _search_terms(tree: nodes.Template) -> Iterator[nodes.Expr]:
    """Yield the expressions that stand where a string to look for does."""
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in SEARCHING and call.args:
            yield from call.args[0].items if isinstance(call.args[0], nodes.Tuple) else call.args[:1]
    for used in tree.find_all(nodes.Filter):
        if used.name in SEARCHING and used.args:
            yield used.args[0]
    for comparison in tree.find_all(nodes.Compare):
        if any(operand.op.endswith("in") for operand in comparison.ops):
            yield comparison.expr

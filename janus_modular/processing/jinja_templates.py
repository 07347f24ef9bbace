"""Chat templates in jinja: compiling them in a sandbox, and reading what their source depends on.

A module of its own, so that jinja2 is imported only where a chat template is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import Environment, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from janus_modular.errors import ConfigError

SEARCHING = (
    "split", "rsplit", "partition", "rpartition", "startswith", "endswith", "removeprefix", "removesuffix",
    "replace", "find", "rfind", "index", "rindex", "count",
)  # fmt: skip
"""Methods of strings, and filters, that search a string for their first argument."""


class GenerationBlock(Extension):
    """The block ``{% generation %}...{% endgeneration %}`` around an answer, rendered without its tags."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Keep the body and drop the tags; what is supervised is found without them, in every template."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template.

    Raises:
        ConfigError: the source is no valid jinja template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the tokenizer's chat template is not valid jinja: line {error.lineno}: {error.message}. "
            "Fix it, or choose another processor.template."
        ) from error


def analyse_template(environment: Environment, source: str) -> dict[str, list[str]]:
    """Return the ``variables`` of a template, and the ``search_strings`` that it looks for in texts."""
    tree = environment.parse(source)
    variables = meta.find_undeclared_variables(tree) - set(environment.globals)
    optional = {
        node.node.name
        for node in (*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter))
        if node.name in ("defined", "undefined", "default", "d") and isinstance(node.node, nodes.Name)
    }
    variables -= {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"} - optional
    return {"variables": sorted(variables), "search_strings": find_search_strings(tree)}


def find_search_strings(tree: nodes.Template) -> list[str]:
    """Return the strings that a template searches texts for, as in ``'</think>' in content``.

    A variable that holds such a string is followed through one assignment.
    """
    assigned = {
        node.target.name: node.node.value
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and isinstance(node.node, nodes.Const)
    }
    values = (
        assigned.get(node.name) if isinstance(node, nodes.Name) else getattr(node, "value", None)
        for node in _search_terms(tree)
    )
    return sorted({value for value in values if isinstance(value, str) and len(value.strip()) > 2})


def _search_terms(tree: nodes.Template) -> Iterator[nodes.Expr]:
    """Yield the expressions at the places of search strings."""
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in SEARCHING and call.args:
            yield from call.args[0].items if isinstance(call.args[0], nodes.Tuple) else call.args[:1]
    for used in tree.find_all(nodes.Filter):
        if used.name in SEARCHING and used.args:
            yield used.args[0]
    for comparison in tree.find_all(nodes.Compare):
        if any(operand.op.endswith("in") for operand in comparison.ops):
            yield comparison.expr


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Return plain JSON; jinja's own filter escapes characters for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **options)

"""Compiling chat templates: jinja in a sandbox, with the helpers that they are written against.

Kept apart so that jinja2 is imported only where a chat template is used.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from janus_modular.errors import ConfigError


class GenerationBlock(Extension):
    """``{% generation %}...{% endgeneration %}`` around an answer: its content is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Keep the body, drop the tags: what is learned is found by marks, for every template alike."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template.

    Raises:
        ConfigError: it is no jinja template.
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
            "Mend it, or choose another processor.template."
        ) from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """As plain JSON; jinja's own filter escapes what HTML would trip over."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **options)

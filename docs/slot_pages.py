"""Writes a reference page for each slot while the site is built: its interface, and every built-in component.

All of it is in the code already: docstrings, the options' comments, what pyproject announces. mkdocs loads
this file as hooks (mkdocs.yml).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from janus_modular import interfaces, protocols
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.plugins.options import comments_of, options_of
from janus_modular.registry import SLOTS, Hooks, slot_label

FOLDER = "reference/slots"
REFERS: dict[str, tuple[str, ...]] = {
    "understanding_encoders": (
        "interfaces.PixelSpec",
        "protocols.ReadsPretrained",
        "protocols.LoadsPretrained",
    ),
    "generation": ("model.sampling.sample_with_noise",),
    "text_samplers": ("protocols.TextSamplerSettings", "protocols.Session", "sequence.Sequence"),
    "image_samplers": (
        *("protocols.ImageSamplerSettings", "protocols.Session", "sequence.Sequence"),
        "sequence.unconditional",
    ),
    "backbones": ("interfaces.Cache", "interfaces.RowCache", "protocols.LoadsPretrained"),
    "sources": (
        *(f"sequence.{name}" for name in ("Sample", "Message", "Text", "ImageInput", "ImageTarget")),
        "protocols.Fingerprinted",
    ),
    "formats": (
        "protocols.ReadsPretrained",
        "protocols.LoadsPretrained",
    ),
}
"""By slot: what its interface speaks of, in the modules of janus_modular."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to those that were found in the folder."""
    plugins = default_plugins()
    for slot in SLOTS:
        files.append(File.generated(config, f"{FOLDER}/{slot}.md", content=page(slot, plugins)))
    return files


def page(slot: str, plugins: Plugins) -> str:
    """Write a slot's page."""
    return "\n\n".join(_paragraphs(slot, plugins)) + "\n"


def _paragraphs(slot: str, plugins: Plugins) -> Iterator[str]:
    hook = getattr(Hooks, f"register_{slot}")
    label = slot_label(slot)
    yield f"# {label[0].upper()}{label[1:]}"
    yield f"{inspect.getdoc(hook)} See [its hook](../hooks.md#register_{slot}registry)."
    yield "## Its interface"
    [name] = re.findall(r"Registry\[(\w+)", inspect.get_annotations(hook)["registry"])
    module = interfaces if hasattr(interfaces, name) else protocols
    yield from _reference("It", module, name)
    if refers := REFERS.get(slot):
        yield "## What it refers to"
        for where in refers:
            module_name, _, name = where.rpartition(".")
            yield from _reference(f"`{name}`", import_module(f"janus_modular.{module_name}"), name)
    yield "## Built in"
    for name in plugins.names(slot):
        entry = plugins.entry(slot, name)
        yield f"### `{name}`"
        yield _prose(inspect.getdoc(sys.modules[entry.config.__module__]) or "")
        yield _prose(inspect.getdoc(entry.factory if inspect.isclass(entry.factory) else entry.config) or "")
        options = [(one["name"], one["default"], one["comment"]) for one in options_of(entry.config)]
        yield _table(("option", "default", ""), options)


def _reference(called: str, module: ModuleType, name: str) -> Iterator[str]:
    """Have mkdocstrings write of a class or a function; of a class' fields, a table of their comments."""
    one = getattr(module, name)
    if says := inspect.get_annotations(one) if inspect.isclass(one) else {}:
        comments = comments_of(one)
        yield f"{called} says:"
        yield _table(("", "type", ""), [(key, kind, comments.get(key, "")) for key, kind in says.items()])
    yield f"::: {module.__name__}.{name}"


def _prose(docstring: str) -> str:
    """Turn a docstring into Markdown: lines of YAML or of a table into code, sections into bold words."""
    text = re.sub(r"^(\w+):\n((?: {4}.*\n?)+)", r"**\1**\n\n\2", docstring, flags=re.MULTILINE)
    return re.sub(r"^(\w[\w-]*: \{.*)$", r"    \1", text, flags=re.MULTILINE)


def _table(heads: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> str:
    lines = [f"| `{name}` | `{_cell(value)}` | {_cell(comment)} |" for name, value, comment in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "| --- | --- | --- |", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

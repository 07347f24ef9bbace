"""Generates a reference page for each slot when the site is built: interface and built-in components.

The text comes from docstrings, comments of options, and entry points. mkdocs loads this file as hooks.
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
RELATED: dict[str, tuple[str, ...]] = {
    "understanding_encoders": (
        "interfaces.PixelSpec",
        "protocols.ReadsPretrained",
        "protocols.LoadsPretrained",
    ),
    "generation": (
        *("protocols.EncodesImages", "sequence.EncodedSpec", "protocols.HasLogProbabilities"),
        "model.sampling.sample_with_noise",
    ),
    "text_samplers": ("protocols.TextSamplerSettings", "protocols.Session", "sequence.Sequence"),
    "image_samplers": (
        *("protocols.ImageSamplerSettings", "protocols.Session", "sequence.Sequence"),
        *("sequence.unconditional", "protocols.EncodedImages"),
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
"""By slot: further classes and functions that its page documents, by module of janus_modular."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the files of the documentation folder."""
    plugins = default_plugins()
    for slot in SLOTS:
        files.append(File.generated(config, f"{FOLDER}/{slot}.md", content=page(slot, plugins)))
    return files


def page(slot: str, plugins: Plugins) -> str:
    """Return the page of a slot in Markdown."""
    return "\n\n".join(_paragraphs(slot, plugins)) + "\n"


def _paragraphs(slot: str, plugins: Plugins) -> Iterator[str]:
    hook = getattr(Hooks, f"register_{slot}")
    label = slot_label(slot)
    yield f"# {label[0].upper()}{label[1:]}"
    yield f"{inspect.getdoc(hook)} See [its hook](../hooks.md#register_{slot}registry)."
    yield "## Interface"
    [name] = re.findall(r"Registry\[(\w+)", inspect.get_annotations(hook)["registry"])
    module = interfaces if hasattr(interfaces, name) else protocols
    yield from _reference(module, name)
    if related := RELATED.get(slot):
        yield "## Related classes and functions"
        for path in related:
            module_name, _, name = path.rpartition(".")
            yield from _reference(import_module(f"janus_modular.{module_name}"), name)
    yield "## Built-in components"
    for name in plugins.names(slot):
        entry = plugins.entry(slot, name)
        yield f"### `{name}`"
        yield _prose(inspect.getdoc(sys.modules[entry.config.__module__]) or "")
        yield _prose(inspect.getdoc(entry.factory if inspect.isclass(entry.factory) else entry.config) or "")
        options = [(row["name"], row["default"], row["comment"]) for row in options_of(entry.config)]
        yield _table(("option", "default", ""), options)


def _reference(module: ModuleType, name: str) -> Iterator[str]:
    """Yield the mkdocstrings directive of a class or function, after a table of a class' attributes."""
    item = getattr(module, name)
    if annotations := inspect.get_annotations(item) if inspect.isclass(item) else {}:
        comments = comments_of(item)
        yield f"Attributes of `{name}`:"
        rows = [(key, annotation, comments.get(key, "")) for key, annotation in annotations.items()]
        yield _table(("attribute", "type", ""), rows)
    yield f"::: {module.__name__}.{name}"


def _prose(docstring: str) -> str:
    """Return a docstring as Markdown: YAML and tables as code blocks, section titles in bold."""
    text = re.sub(r"^(\w+):\n((?: {4}.*\n?)+)", r"**\1**\n\n\2", docstring, flags=re.MULTILINE)
    return re.sub(r"^(\w[\w-]*: \{.*)$", r"    \1", text, flags=re.MULTILINE)


def _table(heads: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> str:
    lines = [f"| `{name}` | `{_cell(value)}` | {_cell(comment)} |" for name, value, comment in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "| --- | --- | --- |", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

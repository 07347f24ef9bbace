"""Completes the pages of slots when the site is built: an example, checks, the interface, and options.

A page in reference/slots/ is written by hand. What is appended here comes from the templates of
``plugins new``, docstrings, comments of options, and entry points. mkdocs loads this file as hooks.
"""

from __future__ import annotations

import inspect
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from janus_modular import ComponentConfig, interfaces, objectives, protocols
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.plugins.options import comments_of, options_of
from janus_modular.plugins.scaffold import write_plugin
from janus_modular.registry import MODEL_SLOTS, SLOTS, Entry, Hooks, slot_label

FOLDER = "reference/slots"
UNCHECKED = ("formats", "runtimes")
"""Slots without an example that fits every component, so that ``plugins check`` cannot check them."""

RELATED: dict[str, tuple[str, ...]] = {
    "understanding_encoders": (
        "interfaces.PixelSpec",
        "capabilities.ReadsPretrained",
        "capabilities.LoadsPretrained",
    ),
    "generation": (
        *("graph_specs.GraphSpec", "graph_specs.TensorSpec", "model.sampling.sample_with_noise"),
        *("capabilities.EncodesImages", "sequence.EncodedSpec", "capabilities.HasLogProbabilities"),
        *("capabilities.AlignsHiddenStates", "capabilities.HidesCondition"),
    ),
    "adaptors": ("capabilities.ReshapesGrid",),
    "text_samplers": ("protocols.TextSamplerSettings", "protocols.Session", "sequence.Sequence"),
    "image_samplers": (
        *("protocols.ImageSamplerSettings", "protocols.CodeSamplerSettings"),
        *("protocols.Session", "sequence.Sequence"),
        *("sequence.unconditional", "protocols.EncodedImages"),
    ),
    "backbones": (
        *(
            "interfaces.Cache",
            "interfaces.RowCache",
            "interfaces.StateCache",
            "model.cache.TensorCache",
            "capabilities.HidesPositions",
        ),
        *("graph_specs.TensorSpec", "capabilities.DeclaresCache", "capabilities.DeclaresPositions"),
        *(
            "capabilities.AttendsTogether",
            "capabilities.ChecksPacking",
            "capabilities.MasksPositions",
            "capabilities.ReturnsLayer",
            "capabilities.LoadsPretrained",
            "capabilities.DeclaresFlops",
        ),
    ),
    "sources": (
        *(f"sequence.{name}" for name in ("Sample", "Message", "Text", "ImageInput", "ImageTarget")),
        "protocols.Fingerprinted",
    ),
    "objectives": (
        *("objectives.Losses", "objectives.ReadsExamples", "objectives.ComparesExamples"),
        "objectives.HasOptimizers",
        *("processing.sample_images.image_of", "processing.sample_images.captioned_image_of"),
        *("training.exchange.gather_examples", "capabilities.ReconstructsImages"),
        *("capabilities.Reconstruction", "capabilities.DerivesWeights"),
    ),
    "trackers": ("protocols.LogsImages", "protocols.LogsTexts", "protocols.LogsConfig"),
    "schedulers": ("protocols.BatchState", "protocols.TaskState", "protocols.Plan"),
    "formats": (
        "capabilities.ReadsPretrained",
        "capabilities.LoadsPretrained",
    ),
}
"""By slot: further classes and functions that its page documents, by module of janus_modular."""


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Append the generated sections to the page of a slot."""
    folder, _, name = page.file.src_uri.rpartition("/")
    slot = name.removesuffix(".md")
    return complete(markdown, slot, default_plugins()) if folder == FOLDER and slot in SLOTS else markdown


def complete(written: str, slot: str, plugins: Plugins) -> str:
    """Return the page of a slot in Markdown: what is written by hand, and the generated sections."""
    return "\n\n".join([written, *_example(slot), *_interface(slot), *_built_ins(slot, plugins)]) + "\n"


def example_files(slot: str) -> dict[str, str]:
    """Return the component and its test that ``plugins new`` writes for a slot, by path."""
    name = f"acme-{slot_label(slot).split()[-1]}"
    with tempfile.TemporaryDirectory() as folder:
        files = write_plugin(name, slot, Path(folder))
        texts = {f"{name}/{file}": Path(folder, name, file).read_text("utf-8") for file in files}
    return {path: text for path, text in texts.items() if path.endswith(".py") and "__init__" not in path}


def _example(slot: str) -> Iterator[str]:
    word = slot_label(slot).replace(" ", "-")
    name = f"acme-{word.rpartition('-')[2]}"
    (file, component), (test_file, test) = example_files(slot).items()
    contract = f"the contract of the slot as a test, [all of its checks](../testing.md), in `{test_file}`:"
    yield "## A complete example"
    yield f"`janus-modular plugins new {name} --slot {word}` writes this file, `{file}`, into a new package:"
    yield f"```python\n{component}```"
    yield f"Its last function is the plugin's hook: [`register_{slot}`](../hooks.md#register_{slot}registry)."
    yield "## Check it"
    if slot in UNCHECKED:
        yield f"No example fits every {slot_label(slot)}, so `plugins new` writes {contract}"
    else:
        yield f"```bash\njanus-modular plugins check {name} --plugin {file}\n```"
        yield f"`plugins new` also writes {contract}"
    yield f"```python\n{test}```"


def _interface(slot: str) -> Iterator[str]:
    hook = getattr(Hooks, f"register_{slot}")
    yield "## Interface"
    [name] = re.findall(r"Registry\[(\w+)", inspect.get_annotations(hook)["registry"])
    module = next(module for module in (interfaces, objectives, protocols) if hasattr(module, name))
    yield from _reference(module, name)
    if related := RELATED.get(slot):
        yield "## Related classes and functions"
        for path in related:
            module_name, _, name = path.rpartition(".")
            yield from _reference(import_module(f"janus_modular.{module_name}"), name)


def _built_ins(slot: str, plugins: Plugins) -> Iterator[str]:
    yield "## Options of the built-in components"
    if slot in MODEL_SLOTS:
        yield (
            "Every component also has `pretrained` (a folder, a file, or a hub id) and `revision`; see"
            " [pretrained components](../../how-to/swap-parts.md#pretrained-components)."
        )
    for name in plugins.names(slot):
        entry = plugins.entry(slot, name)
        yield f"### `{name}`"
        yield _prose(inspect.getdoc(sys.modules[entry.config.__module__]) or "")
        yield _prose(inspect.getdoc(entry.factory if inspect.isclass(entry.factory) else entry.config) or "")
        yield _options(entry)


def _options(entry: Entry[object]) -> str:
    """Return the table of a component's options, without those of every component."""
    common = set(inspect.get_annotations(ComponentConfig))
    rows = [
        (row["name"], row["default"], row["comment"])
        for row in options_of(entry.config)
        if row["name"] not in common
    ]
    return _table(("option", "default", "meaning"), rows) if rows else "It has no options of its own."


def _reference(module: ModuleType, name: str) -> Iterator[str]:
    """Yield the mkdocstrings directive of a class or function, after a table of a class' attributes."""
    item = getattr(module, name)
    if annotations := inspect.get_annotations(item) if inspect.isclass(item) else {}:
        comments = comments_of(item)
        yield f"Attributes of `{name}`:"
        rows = [(key, annotation, comments.get(key, "")) for key, annotation in annotations.items()]
        yield _table(("attribute", "type", "meaning"), rows)
    yield f"::: {module.__name__}.{name}"


def _prose(docstring: str) -> str:
    """Return a docstring as Markdown: YAML and tables as code blocks, section titles in bold."""
    text = re.sub(r"^(\w+):\n((?: {4}.*\n?)+)", r"**\1**\n\n\2", docstring, flags=re.MULTILINE)
    return re.sub(r"^(\w[\w-]*: \{.*)$", r"    \1", text, flags=re.MULTILINE)


def _table(heads: Sequence[str], rows: Sequence[tuple[str, str, str]]) -> str:
    lines = [f"| `{name}` | `{_cell(value)}` | {_cell(comment)} |" for name, value, comment in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "| --- | --- | --- |", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

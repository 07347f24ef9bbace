"""Completes the catalogue of components when the site is built, with the results of their checks.

The results are stored in docs/check_results.json, because all checks take minutes; a test compares them.
After a change of components or checks, run them again:

    OMP_NUM_THREADS=1 python docs/catalogue.py
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from janus_modular.plugins import EntryPointInfo, Plugins, default_plugins
from janus_modular.plugins.catalogue import BUILT_IN
from janus_modular.registry import SLOTS, slot_label

PAGE = "reference/catalogue.md"
RESULTS = Path(__file__).parent / "check_results.json"
CONVOLUTIONAL = (
    "channels=8",
    "channel_multipliers=[1,2]",
    *("residual_blocks=1", "latent_channels=8", "num_codes=16", "code_dim=4"),
)
SIZES = "hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 20, patch_size: 8"
OPTIONS: Mapping[str, Sequence[str]] = {
    "understanding_encoders:siglip": (
        *("feature_dim=16", "layers=2", "heads=2", "intermediate=20", "patch_size=8", "image_size=32"),
        "pixels={height: 32, width: 32}",
    ),
    "understanding_encoders:hf-vision": (
        f"config={{model_type: siglip2_vision_model, num_patches: 16, {SIZES}}}",
    ),
    "image_tokenizers:llamagen": CONVOLUTIONAL,
    "image_tokenizers:vqgan": CONVOLUTIONAL,
    "image_tokenizers:ibq": CONVOLUTIONAL,
    "image_tokenizers:hf-vq": (
        "config={model_type: emu3_vqgan, base_channels: 32, channel_multiplier: [1, 1], hidden_size: 32,"
        " num_res_blocks: 1, attn_resolutions: [1], codebook_size: 16}",
    ),
    "image_tokenizers:open-magvit2": (
        *("channels=8", "channel_multipliers=[1,1,2]", "residual_blocks=1", "bits=[6,12]"),
    ),
    "image_tokenizers:fsq": (
        *("channels=8", "channel_multipliers=[1,2]", "residual_blocks=1", "patch_size=2", "factor=8"),
        *("latent_channels=8", "levels=[4,3]"),
    ),
}
"""By component: options that keep it small, with which it is checked; others have those of ``tiny``."""

UNCHECKED = {
    "formats": "tests with files of their own",
    "runtimes": "tests with bundles of their own",
    **{
        f"sources:{name}": "tests with data files of its own"
        for name in ("emoji", "image-folder", "jsonl", "parquet", "webdataset")
    },
    **{
        f"trackers:{name}": "tests with the library itself, without a network"
        for name in ("wandb", "mlflow", "trackio")
    },
}
"""Slots and components that no generated example fits, with what checks them instead."""

EXPECTED_FAILURES = {"understanding_encoders:tokenizer-features": "choosing a code has no gradient"}


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Append the tables to the page of the catalogue."""
    return f"{markdown}\n{tables(default_plugins())}" if page.file.src_uri == PAGE else markdown


def built_ins(plugins: Plugins) -> dict[str, EntryPointInfo]:
    """Return the built-in components by ``slot:name``."""
    return {f"{i.slot}:{i.name}": i for i in plugins.entry_points if i.dist == BUILT_IN}


def tables(plugins: Plugins) -> str:
    """Return a table of built-in components for each slot, in Markdown."""
    results = json.loads(RESULTS.read_text("utf-8"))
    lines = []
    for slot in SLOTS:
        lines += [f"## {slot_label(slot).capitalize()}: `{slot}`", ""]
        lines += ["| component | what it is | distribution | checks |", "| --- | --- | --- | --- |"]
        lines += [
            f"| [`{info.name}`](slots/{slot}.md#{info.name}) | {_summary(plugins, info)} | {info.dist} |"
            f" {_outcome(key, results)} |"
            for key, info in sorted(built_ins(plugins).items())
            if info.slot == slot
        ]
        lines += [""]
    return "\n".join(lines)


def _summary(plugins: Plugins, info: EntryPointInfo) -> str:
    """Return the first sentence of a component's module."""
    config = plugins.entry(info.slot, info.name).config
    text = inspect.getdoc(sys.modules[config.__module__]) or ""
    return text.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def _outcome(key: str, results: Mapping[str, Mapping[str, str]]) -> str:
    if key not in results:
        return UNCHECKED.get(key) or UNCHECKED[key.partition(":")[0]]
    names: dict[str, list[str]] = {"passed": [], "skipped": [], "failed": []}
    for check, outcome in results[key].items():
        names[outcome].append(f"`{check}`")
    text = f"{len(names['passed'])} passed"
    if names["skipped"]:
        text += f"; not applicable: {', '.join(names['skipped'])}"
    if names["failed"]:
        text += f"; expected failure: {', '.join(names['failed'])} ({EXPECTED_FAILURES[key]})"
    return text


def is_checkable(key: str) -> bool:
    """Return True if a component can be checked with a generated example."""
    return not {key, key.partition(":")[0]} & {*UNCHECKED}


def check(plugins: Plugins, key: str) -> dict[str, str]:
    """Run the checks of a component, slow ones excluded; return their outcomes by name."""
    from janus_modular.testing import checks_of, run_check
    from janus_modular.testing.fixtures import context

    slot, _, name = key.partition(":")
    make = context(plugins, slot, name, OPTIONS.get(key, ()))
    checks: list[Any] = [item for item in checks_of(slot) if not item.slow]
    return {item.name: run_check(item, make, slot=slot).outcome for item in checks}


def main() -> None:
    """Check all built-in components, and store the results."""
    plugins = default_plugins()
    results = {}
    for key in sorted(filter(is_checkable, built_ins(plugins))):
        results[key] = check(plugins, key)
        print(key, _outcome(key, results))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

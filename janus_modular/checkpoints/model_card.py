"""Writes the model card of a checkpoint (README.md): its components, plugins, sources and usage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from torch import nn

from janus_modular.config import component_specs, module_path
from janus_modular.model.model import JanusModel


def model_card(model: JanusModel, name: str, record: Mapping[str, Any]) -> str:
    """Return the model card of a model saved as ``name``; ``record`` is its config.json."""
    rows = [
        f"| {path} | {spec.name} | {millions(model.get_submodule(module_path(path))):,.3f} |"
        for path, spec in component_specs(model.config)
    ]
    sources = [
        f"- {report['slot']} `{report['name']}`: `{report['source']}`"
        + (f" at `{report['revision']}`" if report["revision"] else "")
        for report in record["pretrained"]
    ]
    plugins = [
        f"- {item['slot']} `{item['name']}`: {item['file'] or item['dist']} {item['version'] or ''}".rstrip()
        for item in record["plugins"]
    ]
    training = dict(record["training"])
    config, environment = training.pop("config", None), training.pop("environment", None)
    training.pop("data", None)  # the hashes of its files are in config.json
    notes = [f"- {key}: {value}" for key, value in training.items()]
    sections = [
        "---\nlibrary_name: janus-modular\npipeline_tag: any-to-any\n---",
        f"# {name}\n\nA Janus model: one transformer that reads images and draws them.",
        f"```sh\njanus-modular chat {name} --image image.png 'What is this?'\n"
        f"janus-modular draw {name} 'a cat'\n```",
        "## Components\n\n| path | component | parameters (M) |\n| --- | --- | ---: |\n"
        + "\n".join([*rows, f"| all | | {millions(model):,.3f} |"]),
        "## Plugins it needs\n\n" + "\n".join(plugins),
    ]
    if sources:
        sections.append("## Started from\n\n" + "\n".join(sources))
    if notes:
        sections.append("## Training\n\n" + "\n".join(notes))
    if config is not None:
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000)
        sections.append(
            f"<details><summary>The config of the run</summary>\n\n```yaml\n{text}```\n\n</details>"
        )
    if environment is not None:
        sections.append("## Made with\n\n" + "\n".join(_environment_lines(environment)))
    return "\n\n".join(sections) + "\n"


def _environment_lines(environment: Mapping[str, Any]) -> list[str]:
    """Return the commit, versions and plugins of a run as list items."""
    lines = []
    if git := environment["git"]:
        changes = f", with {git['num_changed']} changed files" if git["num_changed"] else ""
        lines.append(f"- git: `{git['commit']}`{changes}")
    lines += [f"- {name} {number}" for name, number in environment["versions"].items()]
    lines += [
        f"- plugin {plugin['plugin']} {plugin['version'] or ''}, sha256 `{plugin['sha256']}`"
        for plugin in environment["plugins"]
    ]
    return lines


def millions(module: nn.Module) -> float:
    """Return the number of parameters, in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6

"""Writes the model card of a checkpoint (README.md): its components, plugins, sources and usage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    notes = [f"- {key}: {value}" for key, value in record["training"].items()]
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
    return "\n\n".join(sections) + "\n"


def millions(module: nn.Module) -> float:
    """Return the number of parameters, in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6

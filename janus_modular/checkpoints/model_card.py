"""The README.md of a checkpoint: what it is, what it is made of, how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from janus_modular.config import component_specs, module_path
from janus_modular.model.model import JanusModel


def model_card(model: JanusModel, name: str, record: Mapping[str, Any]) -> str:
    """Describe a model that is saved as ``name``; ``record`` is its config.json."""
    rows = [
        f"| {path} | {part.name} | {millions(model.get_submodule(module_path(path))):,.3f} |"
        for path, part in component_specs(model.config)
    ]
    sources = [
        f"- {one['slot']} `{one['name']}`: `{one['source']}`"
        + (f" at `{one['revision']}`" if one["revision"] else "")
        for one in record["pretrained"]
    ]
    needs = [
        f"- {one['slot']} `{one['name']}`: {one['file'] or one['dist']} {one['version'] or ''}".rstrip()
        for one in record["plugins"]
    ]
    notes = [f"- {key}: {value}" for key, value in record["training"].items()]
    sections = [
        "---\nlibrary_name: janus-modular\npipeline_tag: any-to-any\n---",
        f"# {name}\n\nA Janus model: one transformer that reads images and draws them.",
        f"```sh\njanus-modular chat {name} --image image.png 'What is this?'\n"
        f"janus-modular draw {name} 'a cat'\n```",
        "## Parts\n\n| part | component | parameters (M) |\n| --- | --- | ---: |\n"
        + "\n".join([*rows, f"| all | | {millions(model):,.3f} |"]),
        "## Plugins it needs\n\n" + "\n".join(needs),
    ]
    if sources:
        sections.append("## Started from\n\n" + "\n".join(sources))
    if notes:
        sections.append("## Training\n\n" + "\n".join(notes))
    return "\n\n".join(sections) + "\n"


def millions(module: nn.Module) -> float:
    """Count the parameters, in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6

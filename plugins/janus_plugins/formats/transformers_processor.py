"""The files of transformers' Janus processor: images, special tokens, and how a conversation is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from janus_modular import CheckpointError, read_json
from janus_plugins.formats.preparation import token_ids, write_json, write_pixels

ROLES = {"janus": ("User", "Assistant"), "janus-pro": ("<|User|>", "<|Assistant|>")}

CHAT_TEMPLATE = """\
{%- set roles = {'user': 'USER', 'assistant': 'ASSISTANT'} -%}
{%- for message in messages -%}
  {%- set said = namespace(text='') -%}
  {%- for part in ([{'text': message.content}] if message.content is string else message.content) -%}
    {%- set said.text = said.text ~ ('PLACEHOLDER' if part.type == 'image' else part.text) -%}
  {%- endfor -%}
  {%- set last = loop.last and not add_generation_prompt -%}
  {%- set end = eos_token if message.role == 'assistant' else '' if last else '\\n\\n' -%}
  {{- (roles[message.role] ~ ': ' if message.role in roles else '') ~ said.text.strip() ~ end -}}
{%- endfor -%}
{{- roles.assistant ~ ':' if add_generation_prompt else '' -}}
"""
"""The published prompt (Janus, Janus-Pro) as a jinja program; the processor puts the system text first."""


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """Read the image processor's settings: a file of their own, or, written lately, the processor's."""
    processor = folder / "processor_config.json"
    if processor.exists() and (inside := read_json(processor, CheckpointError).get("image_processor")):
        return dict(inside)
    return read_json(folder / "preprocessor_config.json", CheckpointError)


def write_processor(config: Mapping[str, Any], folder: Path, *, num_image_tokens: int) -> None:
    """Write what AutoProcessor and ``generate`` need of a native model config."""
    pixels, chosen = config["understanding"]["encoder"]["pixels"], config["processor"]
    tokens, ids = chosen["tokens"], token_ids(folder)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "JanusImageProcessor",
            "size": {"height": pixels["height"], "width": pixels["width"]},
            "resample": 3,  # bicubic
            **{f"do_{step}": True for step in ("convert_rgb", "resize", "rescale", "pad")},
            **write_pixels(pixels, "transformers"),
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "JanusProcessor",
            "num_image_tokens": num_image_tokens,
            "use_default_system_prompt": chosen["template"] in ROLES and chosen["system"] is None,
        },
    )
    special = {f"{key}_token_id": ids[tokens[key]] for key in ("bos", "eos", "pad") if tokens[key] in ids}
    begin = {"generation_kwargs": {"boi_token_id": ids[tokens["begin_image"]]}}
    write_json(folder / "generation_config.json", special | begin)
    named = {"image_token": "placeholder", "boi_token": "begin_image", "eoi_token": "end_image"}
    extra = {hf_name: tokens[name] for hf_name, name in named.items()}
    path = folder / "tokenizer_config.json"
    write_json(path, read_json(path, CheckpointError) | {"extra_special_tokens": extra})
    if chosen["template"] in ROLES:
        user, assistant = ROLES[chosen["template"]]
        program = CHAT_TEMPLATE.replace("PLACEHOLDER", tokens["placeholder"])
        program = program.replace("'USER'", f"'{user}'").replace("'ASSISTANT'", f"'{assistant}'")
        (folder / "chat_template.jinja").write_text(program, "utf-8")

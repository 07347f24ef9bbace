"""The schema of a model's config: which component fills which slot. It mirrors the module tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from janus_modular.interfaces import ComponentSpec, component


@dataclass
class UnderstandingConfig:
    """The understanding path: image encoder and adaptor."""

    encoder: ComponentSpec = component("understanding_encoders")
    adaptor: ComponentSpec = component("adaptors")


@dataclass
class SpecialTokens:
    """The strings of the special tokens; their ids are looked up in the tokenizer.

    None for bos, eos and pad: as the tokenizer's own configuration has it. The other defaults are those of
    Janus' tokenizer.
    """

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None  # also stands for the dropped condition; None: eos where the tokenizer has no pad
    begin_image: str | None = "<begin_of_image>"  # None: images begin without a token, as JanusFlow's
    end_image: str = "<end_of_image>"
    placeholder: str = "<image_placeholder>"


@dataclass
class ProcessorConfig:
    """How text and images become a sequence."""

    tokenizer: str | None = (
        None  # folder, tokenizer.json, hub id, or "bytes"; None: beside the backbone's weights
    )
    revision: str | None = None
    template: Literal["janus", "janus-pro", "chat", "plain"] = "chat"  # chat: the tokenizer's own
    system: str | None = None  # understanding's system text; None: the template's default
    # Values of the chat template's variables (such as enable_thinking), in training and inference.
    template_variables: dict[str, Any] = field(default_factory=dict)
    tokens: SpecialTokens = field(default_factory=SpecialTokens)
    # Tokens that a text answer never contains: those added to a tokenizer for images.
    suppress_tokens: list[str] = field(default_factory=list)


@dataclass
class ModelConfig:
    """A model: its components and its processor."""

    understanding: UnderstandingConfig = field(default_factory=UnderstandingConfig)
    generation: ComponentSpec = component("generation")
    backbone: ComponentSpec = component("backbones")
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)
    # [understanding]: positions of an input image attend to each other in both directions; []: causal.
    together: list[Literal["understanding"]] = field(default_factory=list)
    text_sampler: str = "text"  # the sampler of text answers
    image_sampler: str | None = None  # the sampler of images; None: as the generation path names it


def raw_model(
    *, size: tuple[int, int], processor: Mapping[str, Any], **components: str | Mapping[str, Any]
) -> dict[str, Any]:
    """Return the config of a Janus model as YAML would hold it, from its components.

    A component is a registered name, or ``{"name": ..., **options}``.
    """
    specs = {
        key: {"name": component} if isinstance(component, str) else dict(component)
        for key, component in components.items()
    }
    return {
        "understanding": {"encoder": specs["encoder"], "adaptor": specs["encoder_adaptor"]},
        "generation": {
            "name": "autoregressive",
            "height": size[0],
            "width": size[1],
            "tokenizer": specs["tokenizer"],
            "adaptor": specs["code_adaptor"],
            "head": specs["head"],
        },
        "backbone": specs["backbone"],
        "processor": dict(processor),
    }

"""The configuration of a model: which component sits in which slot. A mirror of the module tree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from janus_modular.interfaces import ComponentSpec, component


@dataclass
class UnderstandingConfig:
    """The path of images that are read."""

    encoder: ComponentSpec = component("understanding_encoders")
    adaptor: ComponentSpec = component("adaptors")


@dataclass
class SpecialTokens:
    """The strings of the special tokens; ids are looked up by them, never assumed.

    None takes what the tokenizer's own configuration names. The defaults are Janus' (published tokenizer).
    """

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None  # also stands for the dropped condition; None: eos where the tokenizer has no pad
    begin_image: str = "<begin_of_image>"
    end_image: str = "<end_of_image>"
    placeholder: str = "<image_placeholder>"


@dataclass
class ProcessorConfig:
    """How words and images become a sequence."""

    tokenizer: str | None = (
        None  # folder, tokenizer.json, hub id, or "bytes"; None: beside the backbone's weights
    )
    revision: str | None = None
    template: Literal["janus", "janus-pro", "chat", "plain"] = "chat"  # chat: the tokenizer's own
    system: str | None = None  # understanding's system text; None: the template's default
    # Values of variables that the chat template reads, enable_thinking say: in training and inference alike.
    template_variables: dict[str, Any] = field(default_factory=dict)
    tokens: SpecialTokens = field(default_factory=SpecialTokens)
    # Tokens that an answer in words never holds: those that a foreign tokenizer was given for images.
    suppress_tokens: list[str] = field(default_factory=list)


@dataclass
class ModelConfig:
    """A whole model."""

    understanding: UnderstandingConfig = field(default_factory=UnderstandingConfig)
    generation: ComponentSpec = component("generation")
    backbone: ComponentSpec = component("backbones")
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)
    text_sampler: str = "text"  # the registered sampler that answers in text
    image_sampler: str | None = None  # the registered sampler that draws; None: the generation path's own

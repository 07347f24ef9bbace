"""The objective `multimodal`, that of Janus' stages: text and target images, every supervised position alike.

It is the default of a training config.
"""

from __future__ import annotations

from janus_modular import Multimodal, MultimodalConfig, Objective, Registry, hookimpl


@hookimpl
def register_objectives(registry: Registry[Objective]) -> None:
    """Register ``multimodal``."""
    registry.add("multimodal", Multimodal, MultimodalConfig)

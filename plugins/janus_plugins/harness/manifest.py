"""The entry point of lmms-eval: ``--model janus_modular --model_args pretrained=FOLDER``."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Return the name and the class of the model."""
    return ModelManifest(
        "janus_modular", simple_class_path="janus_plugins.harness.answering_model.AnsweringModel"
    )

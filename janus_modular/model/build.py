"""From a configuration to a model: build the parts, and let neighbours decide each other's widths."""

from __future__ import annotations

from janus_modular.components import Builder
from janus_modular.config import parts_in
from janus_modular.config.errors import Fault, config_error
from janus_modular.config.schema import ModelConfig
from janus_modular.model.model import JanusModel, Understanding
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.size_limits import MAX_TENSORS, bounded_weights, check_numbers


def assemble(
    config: ModelConfig,
    plugins: Plugins | None = None,
    *,
    weights: bool = True,
    root: str = "",
    most_tensors: int = MAX_TENSORS,
) -> JanusModel:
    """Build the model of a resolved configuration, in float32 on the current default device.

    ``weights=False`` leaves every ``pretrained`` unread (its architecture is taken all the same), for
    a checkpoint that is loaded next, or for counting parameters under ``torch.device("meta")``.
    ``root`` is where the model stands in the user's config (``model`` in that of a training), for errors.
    What was loaded from where is in ``model.pretrained``. Building stops at ``most_tensors`` weights.

    Raises:
        ConfigError: a part cannot be built, or is larger than any model, this machine or ``most_tensors``.
    """
    check_numbers(config, root)
    paths = {id(part): f"{root}.{path}".lstrip(".") for path, part in parts_in(config)}
    build = Builder(plugins or default_plugins(), weights=weights, paths=paths)
    with bounded_weights(most_tensors):
        backbone = build(config.backbone)
        encoder = build(config.understanding.encoder)
        adaptor = build(config.understanding.adaptor, encoder.width, backbone.width)
        generation = build(config.generation, backbone.width)
    try:
        understanding = Understanding(encoder, adaptor)
    except ValueError as error:
        raise config_error([Fault("understanding", str(error), "")]) from error
    return JanusModel(understanding, generation, backbone, config, build.reports)

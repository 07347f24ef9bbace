"""Tries how a model reads an image, without numbers: on the meta device a tensor is its shape alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from janus_modular.config.errors import FieldError
from janus_modular.errors import JanusError
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.registry import slot_label


def shape_errors(model: JanusModel, plugins: Plugins | None = None) -> list[FieldError]:
    """Have an image of the encoder's own size read; return what its parts make otherwise than they promise.

    The encoder gets the image, the adaptor features as the encoder promises them: each answers for itself.
    One that cannot run on the meta device is passed over. The model's parts are on that device afterwards.
    """
    reading, chosen = model.understanding.to("meta").eval(), model.config.understanding
    encoder, adaptor, spec = reading.encoder, reading.adaptor, reading.encoder.pixels
    grid = encoder.grid(spec.height, spec.width)
    pixels = reading.normalize(torch.empty(1, 3, spec.height, spec.width, device="meta"))
    features = pixels.new_empty(1, prod(grid), encoder.feature_dim)
    places = (1, reading.num_tokens, model.backbone.hidden_size)
    said = f"{spec.height}x{spec.width} pixels, {grid[0]}x{grid[1]} features"
    plugins = plugins or default_plugins()
    errors = (
        _fault(chosen.encoder, plugins, said, lambda: encoder(pixels), tuple(features.shape)),
        _fault(chosen.adaptor, plugins, said, lambda: adaptor(features, grid), places),
    )
    return [one for one in errors if one]


def _fault(
    part: ComponentSpec, plugins: Plugins, of: str, run: Callable[[], Tensor], expected: tuple[int, ...]
) -> FieldError | None:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = run()
    except (ValueError, JanusError) as error:
        made = f"refuses what it is to read ({of}): {error}"
    except Exception:  # it computes something that the meta device cannot: no fault of its own
        return None
    else:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape == expected:
            return None
        made = f"makes {shape} of {of}, and promises {expected}"
    path, promise = {
        "understanding_encoders": ("encoder", "UnderstandingEncoder: (N, P, C), P as grid says, C its width"),
        "adaptors": ("adaptor", "Adaptor: (N, P', D), P' as num_tokens says, D the backbone's width"),
    }[part.slot]
    who = f"the {slot_label(part.slot)} '{part.name}' of {plugins.find(part.slot, part.name).origin}"
    return FieldError(f"understanding.{path}", f"{who} {made} (see {promise})", "")

"""Checks whether an image sampler can drive a generation path, without computing anything."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from janus_modular.errors import JanusError
from janus_modular.model.cache import state_tensors
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins
from janus_modular.samplers import with_settings
from janus_modular.sequence import IGNORE_INDEX
from janus_modular.sequence import Sequence as Prompt
from janus_modular.sessions import BaseSession


class _ProbeEndError(Exception):
    """The sampler asks for a result, which nothing has computed: no error was found up to here."""


class _MissingSizeError(KeyError):
    """The sampler reads a size that the generation path does not declare."""


class _MissingGraphError(Exception):
    """The sampler runs a graph that the generation path does not declare."""


class _Sizes(dict[str, Any]):
    def __missing__(self, name: str) -> NoReturn:
        raise _MissingSizeError(name)


class _ProbeSession(BaseSession):
    """A session that reads prompts, and ends the probe where a sampler needs their results."""

    def __init__(self, model: JanusModel) -> None:
        path = model.generation
        super().__init__(model.backbone.context)
        self.sizes = _Sizes(path.sizes)
        self.graphs = {"embed", "sample_text", *(graph.name for graph in path.graphs())}
        self.hidden_size, self.vocab_size = model.backbone.hidden_size, model.backbone.vocab_size
        self.image_positions, self.pad_id = path.num_tokens, 0
        self.has_states = bool(state_tensors(model.backbone))

    def allocate_rows(self, count: int) -> None:
        """Do nothing."""

    def read_prompts(self, prompts: Any, first_row: int) -> object:
        """Return what stands for hidden states: a sampler passes them on to a graph."""
        return object()

    def run(self, name: str, *_: Any) -> NoReturn:
        """End the probe, after a look at the name."""
        raise _ProbeEndError if name in self.graphs else _MissingGraphError(name)

    def _end(self, *_: Any, **__: Any) -> NoReturn:
        """End the probe: nothing has computed what the sampler asks for."""
        raise _ProbeEndError

    feed = expand = squeeze = take = stack = to_host = _end


def image_sampler_mismatch(model: JanusModel, plugins: Plugins) -> str:
    """Return why the model's image sampler cannot drive its generation path; "" if nothing was found.

    The sampler runs up to its first result: sizes and graphs that it asks for, and the path does not declare,
    are found, and the sampler's own checks. Any other exception of a sampler is ignored: it may be raised for
    want of a result.
    """
    name, owner = model.image_sampler, type(model.generation).__name__
    prompt = Prompt(
        tokens=np.zeros(1, np.int64),
        labels=np.full(1, IGNORE_INDEX),
        understanding_mask=np.zeros(1, bool),
        generation_mask=np.zeros(1, bool),
    )
    advice = "Choose the image sampler of the path: leave image_sampler out."
    path = model.generation
    try:
        sampler, settings = with_settings(plugins, "image_samplers", name, {})
        next(sampler(_ProbeSession(model), [prompt], settings))
    except _MissingSizeError as error:
        sizes = ", ".join(path.sizes) or "none"
        return f"the image sampler '{name}' needs the size {error}; {owner} has {sizes}. {advice}"
    except _MissingGraphError as error:
        graphs = ", ".join(graph.name for graph in path.graphs())
        return f"the image sampler '{name}' runs the graph '{error}'; those of {owner} are {graphs}. {advice}"
    except JanusError as error:
        return f"the image sampler '{name}' refuses {owner}: {error}"
    except Exception:
        return ""
    return ""

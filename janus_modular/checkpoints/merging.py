"""A checkpoint without what only training needs: adapters folded into the weights that they adapt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial

from torch import Tensor

from janus_modular.checkpoints import native
from janus_modular.checkpoints.opening import LazyCheckpoint
from janus_modular.config import component_specs, module_path
from janus_modular.plugins import Plugins
from janus_modular.protocols import Merges
from janus_modular.weights.files import Weights


def merge_adapters(opened: LazyCheckpoint, plugins: Plugins | None = None) -> LazyCheckpoint:
    """Put what a component becomes in the place of each that says so; one without any stays as it is.

    Nothing is read yet: a tensor is merged when it is asked for, and not kept.
    """
    modules = {
        path: opened.model.get_submodule(module_path(path))
        for path, _ in component_specs(opened.model.config)
    }
    path, merges = next(
        ((path, module) for path, module in modules.items() if isinstance(module, Merges)), ("", None)
    )
    if merges is None:
        return opened
    prefix = f"{module_path(path)}."
    reads = {name: partial(opened.tensors.__getitem__, name) for name in opened.tensors}
    own = {name.removeprefix(prefix): reads.pop(name) for name in list(reads) if name.startswith(prefix)}
    instead, made = merges.merged(Weights(opened.folder, own))
    tensors: Mapping[str, Callable[[], Tensor]] = {
        **reads,
        **{prefix + name: read for name, read in made.items()},
    }
    config = deepcopy(opened.model.config)
    place = dict(component_specs(config))[path]
    place.name, place.config = instead.name, deepcopy(instead.config)
    model = native.blank(config, plugins)
    model.pretrained, model.recorded = opened.model.pretrained, opened.model.recorded
    return merge_adapters(replace(opened, model=model, tensors=Weights(opened.folder, tensors)), plugins)

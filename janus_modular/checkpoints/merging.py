"""Merges adapters into the weights that they adapt, so that a checkpoint has only what inference needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial

from torch import Tensor

from janus_modular.capabilities import Merges
from janus_modular.checkpoints.opening import LazyCheckpoint
from janus_modular.config import component_specs, module_path
from janus_modular.model.build import build_model
from janus_modular.plugins import Plugins
from janus_modular.weights.files import Weights


def merge_adapters(checkpoint: LazyCheckpoint, plugins: Plugins | None = None) -> LazyCheckpoint:
    """Return the checkpoint with each component that can be merged (`Merges`) replaced by what it becomes.

    Nothing is read yet: a tensor is merged whenever it is read, and not kept.
    """
    config = deepcopy(checkpoint.model.config)
    specs = {module_path(path): spec for path, spec in component_specs(config)}
    components = checkpoint.model.components().items()
    mergeable = [(name, module) for name, module in components if isinstance(module, Merges)]
    if not mergeable:
        return checkpoint
    name, module = mergeable[0]
    spec, prefix = specs[name], f"{name}."
    reads = {name: partial(checkpoint.tensors.__getitem__, name) for name in checkpoint.tensors}
    own = {name.removeprefix(prefix): reads.pop(name) for name in list(reads) if name.startswith(prefix)}
    successor, own_reads = module.merged(Weights(checkpoint.folder, own))
    spec.name, spec.config = successor.name, deepcopy(successor.config)
    tensors: Mapping[str, Callable[[], Tensor]] = {
        **reads,
        **{prefix + name: read for name, read in own_reads.items()},
    }
    result = LazyCheckpoint(
        build_model(config, plugins, on_meta=True),
        checkpoint.processor,
        checkpoint.provenance,
        folder=checkpoint.folder,
        format_name=checkpoint.format_name,
        tensors=Weights(checkpoint.folder, tensors),
        training=checkpoint.training,
    )
    return merge_adapters(result, plugins)

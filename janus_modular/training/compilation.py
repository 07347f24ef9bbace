"""Compiles the blocks of components by torch.compile: faster steps, after a first one that compiles."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

from janus_modular.errors import ConfigError
from janus_modular.model.model import JanusModel
from janus_modular.training.parallel import blocks_of, check_components

BACKEND = "inductor"


def compile_blocks(model: JanusModel, components: Sequence[str]) -> None:
    """Compile each block of components, in place; before activations are checkpointed, and blocks sharded.

    Blocks of one component have the same code, so that it is compiled once. A block is compiled as a whole:
    what torch cannot compile is an error in the first step, never run uncompiled. Single layers among the
    blocks, such as a convolution, stay as they are.

    Raises:
        ConfigError: there is no such component, or it has no blocks.
    """
    check_components(model, {}, (), components)
    for name in components:
        blocks = blocks_of(name, model.get_submodule(name), "compile")
        composed = [block for block in blocks if next(block.children(), None) is not None]
        if not composed:
            raise ConfigError(
                f"compile: the blocks of {name} are single layers; expected blocks of several, which"
                " torch.compile can fuse. Leave it out."
            )
        for block in composed:
            block.forward = torch.compile(block.forward, backend=BACKEND, fullgraph=True)


def uncompiled() -> AbstractContextManager[None]:
    """Return a context in which compiled blocks run as they were before: for shapes that come once."""
    stance: Any = torch.compiler.set_stance("force_eager")
    return cast(AbstractContextManager[None], stance)

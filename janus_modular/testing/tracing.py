"""Tracing a call of a component as an export does: the lengths of its batch are not known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as tracing
from torch.utils import _pytree as pytree

from janus_modular.errors import CheckError
from janus_modular.testing.calls import Call, Calling

LONGEST = 64
"""What a length may be at most; so small, that no table of positions is too short."""


def traced(component: Any, call: Call, larger: Call) -> ExportedProgram:
    """Trace a call with torch.export; lengths in which ``larger`` differs, the same call again, may vary.

    Raises:
        CheckError: the component fixes a length, by ``len(x)`` or ``int(x.shape[0])`` say.
    """
    lengths: dict[tuple[int, int], Any] = {}

    def varying(one: Any, other: Any) -> Any:
        if not isinstance(one, Tensor):
            return None
        return {
            axis: lengths.setdefault(pair, Dim(f"length_{pair[0]}_{pair[1]}", min=1, max=LONGEST * max(pair)))
            for axis, pair in enumerate(zip(one.shape, other.shape, strict=True))
            if pair[0] != pair[1]
        }

    shapes = pytree.tree_map(varying, call.inputs, larger.inputs)
    try:
        with tracing.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # lengths may be 1
            return torch.export.export(
                Calling(component, call).eval(),
                call.inputs,
                dynamic_shapes=(shapes,),
                prefer_deferred_runtime_asserts_over_guards=True,  # rows may be images times a number
            )
    except torch._dynamo.exc.UserError as error:
        raise CheckError(
            f"{call.name} fixes the number of rows: it computes with a length as a number that Python knows"
            f" (len(x), int(x.shape[0])). Use x.shape[0] itself. torch says: {str(error).splitlines()[0]}"
        ) from error

"""Ids that stand for logits which were not finite, and what a session does about them. No torch in here."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from janus_modular.errors import NotFiniteError

NOT_FINITE = -1
"""The id that is sampled from logits which are NaN or infinite; see `janus_modular.mark_not_finite`."""


def refuse_not_finite(x: NDArray[Any]) -> NDArray[Any]:
    """Return what a session brings to the host, if no id in it is `NOT_FINITE`.

    Raises:
        NotFiniteError: an id is, so that everything after it would be noise.
    """
    if x.dtype.kind == "i" and (x == NOT_FINITE).any():
        raise NotFiniteError(
            f"the model's logits are NaN or infinite, for {int((x == NOT_FINITE).sum())} of {x.size} sampled"
            " ids; expected finite numbers. Its weights, or what it computes from them, do not fit into its"
            " dtype: try float32 or bfloat16 (of a bundle the variant fp32, and what `janus-modular verify`"
            " says of this one); where that fails too, the checkpoint itself is damaged."
        )
    return x

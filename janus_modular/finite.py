"""The id that marks logits which are not finite, and the check for it on the host, without torch."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from janus_modular.errors import NotFiniteError

NOT_FINITE = -1
"""The id that is sampled from logits which are NaN or infinite; see `janus_modular.mark_not_finite`."""


def refuse_not_finite(x: NDArray[Any]) -> NDArray[Any]:
    """Return an array that a session has copied to the host, if no id in it is `NOT_FINITE`.

    Raises:
        NotFiniteError: an id is: its logits were NaN or infinite, and what is sampled later is noise.
    """
    if x.dtype.kind == "i" and (x == NOT_FINITE).any():
        raise NotFiniteError(
            f"the model's logits are NaN or infinite, for {int((x == NOT_FINITE).sum())} of {x.size} sampled"
            " ids; expected finite numbers. Its weights, or what it computes from them, do not fit into its"
            " dtype: try float32 or bfloat16 (of a bundle the variant fp32, and what `janus-modular verify`"
            " says of this one); where that fails too, the checkpoint itself is damaged."
        )
    return x

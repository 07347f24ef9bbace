"""Reads checkpoints with both trained and EMA weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from janus_modular import belongs_to


def ema_weights_first(
    weights: Mapping[str, Tensor], prefix: str, tokenizer: nn.Module, own_name: Callable[[str], str] = str
) -> Iterator[tuple[str, Tensor]]:
    """Yield a tokenizer's names and tensors below ``prefix``: EMA weights, or trained ones if there are none.

    EMA weights (``model_ema.``) have the weights' names without dots. Trained and EMA weights are not mixed:
    an EMA weight that is missing is not yielded. The networks of losses (``loss.``) and the trained
    weights are read and ignored.
    """
    averages, known = f"{prefix}model_ema.", tokenizer.state_dict().keys()
    averaged = any(name.startswith(averages) for name in weights)
    for name in weights:
        source_name = name.removeprefix(prefix) if name.startswith(prefix) else ""
        own = own_name(source_name)
        if source_name.startswith(("loss.", "model_ema.")):
            _ = weights[name]  # read, so that it is not reported as unexpected
        elif belongs_to(own, tokenizer):
            trained = weights[name]
            if not averaged or own not in known:
                yield own, trained
            elif (average := averages + source_name.replace(".", "")) in weights:
                yield own, weights[average]

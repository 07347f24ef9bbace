"""Checkpoints that hold a tokenizer's weights twice: as trained, and averaged over training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from janus_modular import belongs_to


def ema_weights_first(
    weights: Mapping[str, Tensor], prefix: str, tokenizer: nn.Module, own_name: Callable[[str], str] = str
) -> Iterator[tuple[str, Tensor]]:
    """Yield a tokenizer's names and tensors from below ``prefix``: averages, where the file has any.

    Averages (``model_ema.``) have the weights' names without their points. It is one or the other for the
    whole file: an average that is missing is not yielded, since the weight as trained would not go with the
    rest. The losses' networks (``loss.``) and the weights that were averaged are known, and not needed.
    """
    averages, known = f"{prefix}model_ema.", tokenizer.state_dict().keys()
    averaged = any(name.startswith(averages) for name in weights)
    for name in weights:
        theirs = name.removeprefix(prefix) if name.startswith(prefix) else ""
        own = own_name(theirs)
        if theirs.startswith(("loss.", "model_ema.")):
            _ = weights[name]  # read, so that it does not count as left over
        elif belongs_to(own, tokenizer):
            trained = weights[name]
            if not averaged or own not in known:
                yield own, trained
            elif (average := averages + theirs.replace(".", "")) in weights:
                yield own, weights[average]

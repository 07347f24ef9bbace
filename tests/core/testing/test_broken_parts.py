"""Model components that each violate one rule: the check of this rule fails with a reason."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from janus_modular.plugins import default_plugins
from janus_modular.plugins.loading import load_file, module_of
from janus_modular.testing import checks_of, run_check
from janus_modular.testing.fixtures import context
from janus_modular.testing.sharding import close_pair

Break = Callable[[Any], None]


def result_of(slot: str, component: str, check: str, broken: Break | None = None) -> tuple[str, str]:
    """Run a check on a built-in component that ``broken`` changes after it was built."""
    make = context(default_plugins(), slot, component)

    def changed() -> tuple[Any, Any]:
        made, example = make()
        if broken:
            broken(made)
        return made, example

    [chosen] = [one for one in checks_of(slot) if one.name == check]
    result = run_check(chosen, changed, slot=slot)
    return result.outcome, result.note


def put(**values: Any) -> Break:
    """Set attributes."""
    return lambda component: vars(component).update(values)


def wrap(method: str, around: Callable[..., Any]) -> Break:
    """Replace a method by ``around(component, old, *inputs)``."""

    def apply(component: Any) -> None:
        old = getattr(component, method)
        setattr(component, method, MethodType(lambda self, *a, **k: around(self, old, *a, **k), component))

    return apply


def sees_all(backbone: Any, old: Any, x: Tensor, **others: Any) -> Tensor:
    return old(x, **others) + x.mean(1, keepdim=True)


def never_restarts(backbone: Any, old: Any, x: Tensor, *, positions: Tensor, cache: Any = None) -> Tensor:
    if cache is None:
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    return old(x, positions=positions, cache=cache)


def without_cache(backbone: Any, old: Any, x: Tensor, *, positions: Tensor, cache: Any = None) -> Tensor:
    if cache is not None:
        cache.begin(x.shape[1])
    return old(x, positions=positions)


def redrawn(backbone: Any, old: Any, vocab_size: int) -> None:
    old(vocab_size)
    table = next(one for one in backbone.modules() if isinstance(one, nn.Embedding))
    nn.init.normal_(table.weight)


def without_embeddings(backbone: Any, old: Any, vocab_size: int) -> None:
    table = next(one for one in backbone.modules() if isinstance(one, nn.Embedding))
    before = nn.Embedding.from_pretrained(table.weight.detach().clone())
    old(vocab_size)
    vars(backbone)["embed"] = before


BACKBONES: Mapping[str, tuple[str, Break, str]] = {
    "hidden states of another size": (
        "backbone_sizes",
        wrap("forward", lambda self, old, x, **others: old(x, **others)[..., :-1]),
        "hidden states are",
    ),
    "logits of another size": (
        "backbone_sizes",
        wrap("logits", lambda self, old, hidden: old(hidden)[..., :-1]),
        "logits are",
    ),
    "a position that sees what follows": ("causal", wrap("forward", sees_all), "with the last one changed"),
    "packed sequences that attend to each other": (
        "packing",
        wrap("forward", never_restarts),
        "packed into a row",
    ),
    "a cache that is not read": ("cache", wrap("forward", without_cache), "a step, with and without a cache"),
    "new tokens that change old ones": ("resize_vocab", wrap("resize_vocab", redrawn), "of the old tokens"),
    "new tokens that only logits have": (
        "resize_vocab",
        wrap("resize_vocab", without_embeddings),
        "have no embeddings",
    ),
    "tokens that are not added": (
        "resize_vocab",
        wrap("resize_vocab", lambda self, old, vocab_size: None),
        "vocab_size is 320 after resize_vocab(323)",
    ),
}


@pytest.mark.parametrize(("check", "broken", "note"), BACKBONES.values(), ids=BACKBONES)
def test_a_broken_backbone_is_found(check: str, broken: Break, note: str) -> None:
    assert result_of("backbones", "hf", check)[0] == "passed"
    outcome, said = result_of("backbones", "hf", check, broken)
    assert (outcome, note in said) == ("failed", True), said


def summed_per_image(tokenizer: Any, old: Any, pixels: Tensor) -> Any:
    return {name: value.expand(len(pixels)) for name, value in old(pixels).items()}


def counts(tokenizer: Any, old: Any, pixels: Tensor) -> Any:
    next(iter(tokenizer.parameters())).data += 1
    return old(pixels)


def forgets(head: Any, old: Any, *inputs: Any, **options: Any) -> Any:
    state = old(*inputs, **options)
    if not options and not inputs:
        state.pop(next(iter(state)))
    return state


def rounds(head: Any, old: Any, *inputs: Any, **options: Any) -> Any:
    return {name: x.half().float() for name, x in old(*inputs, **options).items()}


def hides(head: Any) -> None:
    """Keep a weight in a plain list, of which no state dict knows."""
    hidden = [torch.ones(())]
    old = head.forward
    vars(head)["hidden"] = hidden
    head.forward = MethodType(lambda self, x, before: old(x, before) * self.hidden[0], head)


PARTS: Mapping[str, tuple[str, str, str, Break, str]] = {
    "fewer codes than the grid has": (
        "image_tokenizers",
        "vq",
        "tokenizer_sizes",
        wrap("encode", lambda self, old, pixels: old(pixels)[:, 1:]),
        "codes are",
    ),
    "codes beyond the codebook": (
        "image_tokenizers",
        "vq",
        "tokenizer_sizes",
        wrap("encode", lambda self, old, pixels: old(pixels) + self.codebooks[0]),
        "of a codebook of",
    ),
    "codes that are expected int64": (
        "image_tokenizers",
        "vq",
        "tokenizer_sizes",
        wrap("encode", lambda self, old, pixels: old(pixels).int()),
        "expected int64",
    ),
    "images of another size": (
        "image_tokenizers",
        "vq",
        "tokenizer_sizes",
        wrap("decode", lambda self, old, codes, **size: old(codes, **size)[..., 1:]),
        "are decoded as",
    ),
    "code vectors of another size": (
        "image_tokenizers",
        "vq",
        "tokenizer_sizes",
        wrap("codebook_embeddings", lambda self, old: old()[:-1]),
        "codebook_embeddings are",
    ),
    "no losses": (
        "image_tokenizers",
        "vq",
        "tokenizer_losses",
        wrap("losses", lambda self, old, pixels: {}),
        "it has no losses",
    ),
    "losses of each image": (
        "image_tokenizers",
        "vq",
        "tokenizer_losses",
        wrap("losses", summed_per_image),
        "expected a finite scalar",
    ),
    "losses that are NaN": (
        "image_tokenizers",
        "vq",
        "tokenizer_losses",
        wrap("losses", lambda self, old, pixels: {"l2": torch.tensor(float("nan"))}),
        "expected a finite scalar",
    ),
    "losses that change weights": (
        "image_tokenizers",
        "vq",
        "tokenizer_losses",
        wrap("losses", counts),
        "before and after",
    ),
    "fewer positions than an adaptor says": (
        "adaptors",
        "mlp",
        "adaptor_sizes",
        wrap("forward", lambda self, old, x, grid: old(x, grid)[:, 1:]),
        "num_tokens declares (N, P')",
    ),
    "logits of another codebook": (
        "heads",
        "mlp",
        "head_shapes",
        wrap("forward", lambda self, old, hidden, before: old(hidden, before)[..., 1:]),
        "logits are",
    ),
    "a state whose neighbours count": (
        "heads",
        "mlp",
        "head_shapes",
        wrap("forward", lambda self, old, hidden, before: (x := old(hidden, before)) - x.mean(0)),
        "states",
    ),
    "a state dict that lacks a weight": (
        "heads",
        "mlp",
        "state_dict",
        wrap("state_dict", forgets),
        "Missing key",
    ),
    "a state dict in half precision": (
        "heads",
        "mlp",
        "state_dict",
        wrap("state_dict", rounds),
        "after a round trip of the weights",
    ),
    "a weight outside of the state dict": (
        "heads",
        "mlp",
        "state_dict",
        hides,
        "parameter nor buffer: hidden",
    ),
    "a config that is no dataclass": ("heads", "mlp", "config_round_trip", put(config={}), "self.config is"),
}


@pytest.mark.parametrize(("slot", "name", "check", "broken", "note"), PARTS.values(), ids=PARTS)
def test_a_broken_part_is_found(slot: str, name: str, check: str, broken: Break, note: str) -> None:
    assert result_of(slot, name, check)[0] == "passed"
    outcome, said = result_of(slot, name, check, broken)
    assert (outcome, note in said) == ("failed", True), said


BROKEN_TOGETHER = """
import torch
from torch import nn

from dataclasses import dataclass

from janus_modular import ComponentConfig, hookimpl


@dataclass
class Empty(ComponentConfig):
    pass


class Scaled(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, hidden, before):
        return self.layer(hidden) * self.scale


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.weights = [self.layer.weight]

    def forward(self, hidden, before):
        return hidden @ self.weights[0].T + self.layer.bias


@hookimpl
def register_heads(registry):
    registry.add("scaled", Scaled, Empty)
    registry.add("remembering", Remembering, Empty)
"""


@pytest.mark.slow
def test_parts_that_cannot_be_sharded_are_found(tmp_path: Path) -> None:
    file = tmp_path / "broken_together.py"
    file.write_text(BROKEN_TOGETHER)
    load_file(file)  # as the other processes do
    module = sys.modules[module_of(file)]
    [sharding] = [one for one in checks_of("heads") if one.name == "sharding"]
    hidden = torch.ones(3, 8)
    expected = {
        "passed": (module.Scaled((1,)), ""),
        "a scalar, which FSDP2 cannot cut": (module.Scaled(()), "scalar"),
        "a weight that is remembered": (module.Remembering(), "layer.weight has no gradient when sharded"),
    }
    try:
        for what, (head, note) in expected.items():
            head.codebooks = (8,)
            result = run_check(sharding, lambda head=head: (head, hidden), slot="heads")
            assert (result.outcome, note in result.note) == (
                "passed" if what == "passed" else "failed",
                True,
            ), (what, result)
    finally:
        close_pair()

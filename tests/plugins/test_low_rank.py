"""Low-rank adapters on encoders, adaptors and heads: what they compute, and that none is passed by."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from janus_modular import ConfigError, Plugins
from janus_modular.config import resolve
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import ModelBuilder
from janus_plugins.low_rank import linear_layers

INPUTS: dict[
    str, tuple[tuple[Any, ...], tuple[Any, ...]]
] = {  # by slot: neighbours, and arguments of forward
    "understanding_encoders": ((), (torch.rand(2, 3, 32, 32),)),
    "adaptors": ((12, 20), (torch.rand(2, 16, 12), (4, 4))),
    "heads": ((8, (5,)), (torch.rand(2, 3, 8), torch.zeros(2, 3, 0, dtype=torch.long))),
}
INNER: list[tuple[str, str, Any]] = [
    ("understanding_encoders", "encoder", {"name": "vit", "feature_dim": 16, "layers": 1, "heads": 2}),
    (
        "understanding_encoders",
        "encoder",
        {
            "name": "siglip", "feature_dim": 16, "layers": 2, "heads": 2, "intermediate": 20,
            "patch_size": 8, "image_size": 32, "pixels": {"height": 32, "width": 32},
        },
    ),
    ("adaptors", "adaptor", {"name": "mlp"}),
    ("adaptors", "adaptor", {"name": "perceiver", "queries": 3, "layers": 1, "heads": 4, "kv_heads": 2}),
    ("adaptors", "adaptor", {"name": "ldp"}),
    ("heads", "head", {"name": "mlp"}),
    ("heads", "head", {"name": "factorized", "layers": 1, "heads": 2, "hidden": 12}),
]  # fmt: skip


def built(plugins: Plugins, slot: str, raw: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    options = {key: value for key, value in raw.items() if key != "name"}
    config = resolve(options, plugins.entry(slot, raw["name"]).config, plugins)
    return ModelBuilder(plugins)(ComponentSpec(slot, raw["name"], config), *INPUTS[slot][0]).eval()


def disturb(module: nn.Module) -> None:
    for name, weight in module.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(weight, std=0.3)


@pytest.mark.parametrize(("slot", "field", "raw"), INNER, ids=[raw["name"] for _, _, raw in INNER])
def test_adapters_compute_what_pefts_own_model_computes(
    slot: str, field: str, raw: dict[str, Any], plugins: Plugins
) -> None:
    """Every adapter is called, changes the result, and the result is that of peft's own model."""
    adapted = built(plugins, slot, {"name": "lora", "rank": 2, "alpha": 3.0, field: raw})
    plain = built(plugins, slot, raw)
    torch.testing.assert_close(adapted(*INPUTS[slot][1]), plain(*INPUTS[slot][1]))  # nothing is learned yet

    disturb(adapted)
    called: list[str] = []
    for path, layer in adapted._adapted():
        layer.register_forward_hook(lambda *_, path=path: called.append(path))
    result = adapted(*INPUTS[slot][1])
    assert {path for path, _ in adapted._adapted()} == {*called}
    assert not torch.allclose(result, plain(*INPUTS[slot][1]), atol=1e-3)

    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=linear_layers(plain))
    theirs = peft.PeftModel(plain, config).eval()
    state = {
        f"base_model.model.{name.removeprefix(f'{field}.')}": w for name, w in adapted.state_dict().items()
    }
    theirs.load_state_dict(state)
    torch.testing.assert_close(result, theirs.base_model.model(*INPUTS[slot][1]), rtol=0, atol=0)


def test_layers_that_torch_reads_directly_are_not_adapted() -> None:
    """Their adapters would have no effect: torch reads the weights, and does not call the layers."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    model["block"] = nn.TransformerEncoderLayer(8, 2, 16)
    assert linear_layers(model) == ["out"]


@pytest.mark.parametrize(
    ("slot", "field", "raw"),
    [
        ("adaptors", "adaptor", {"name": "linear"}),
        ("heads", "head", {"name": "mlp"}),
    ],
)
def test_a_component_without_such_a_layer_names_what_it_has(
    slot: str, field: str, raw: dict[str, Any], plugins: Plugins
) -> None:
    with pytest.raises(ConfigError, match=r"q_proj adapts nothing; .* are (layers|output_mlp)"):
        built(plugins, slot, {"name": "lora", "target_modules": ["q_proj"], field: raw})

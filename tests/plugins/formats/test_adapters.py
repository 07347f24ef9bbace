"""Adapters on a published checkpoint: merged, it is a published checkpoint again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from janus_modular import Plugins
from janus_modular.checkpoints import ModelAssembly, convert, native
from janus_modular.training.wrapping import wrap_components


@pytest.mark.slow
def test_adapters_of_a_published_checkpoint_go_back_into_its_format(
    published: Path, tmp_path: Path, plugins: Plugins
):
    """Merged weights are W + alpha / rank * B A where there is an adapter, else the published ones."""
    assembly = ModelAssembly.from_checkpoint(published)
    before = {name: weight.clone() for name, weight in assembly.model.state_dict().items()}
    adapted = ("understanding.encoder", "understanding.adaptor", "generation.head", "backbone")
    wraps = {path: {"name": "lora", "rank": 2, "alpha": 4.0} for path in adapted}
    wrap_components(assembly, wraps, plugins)
    for name, weight in assembly.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    native.save(assembly, tmp_path / "adapted")
    convert(tmp_path / "adapted", tmp_path / "merged", merge=True, format_name="published")

    after = dict(ModelAssembly.from_checkpoint(tmp_path / "merged").model.state_dict())
    expected = dict(before)
    state = assembly.model.state_dict()
    for name in (name for name in state if ".lora_A." in name):
        path = next(path for path in wraps if name.startswith(f"{path}."))
        layer = name.replace(f"{path}.{path.rpartition('.')[2]}.", f"{path}.", 1).partition(".lora_A.")[0]
        update = 4.0 / 2 * state[name.replace(".lora_A.", ".lora_B.")] @ state[name]
        expected[f"{layer}.weight"] = before[f"{layer}.weight"] + update
    assert after.keys() == expected.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.partition(".")[0] for name in changed} == {"understanding", "generation", "backbone"}
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)

"""LoRA adapters around components of a checkpoint: adapters are trained, its weights do not change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from janus_export.bundle.bundle import load_bundle
from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.verify import verify
from janus_modular import ConfigError, JanusError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.checkpoints.converting import convert
from janus_modular.cli.app import app
from janus_modular.janus import Janus
from janus_modular.plugins import default_plugins
from janus_modular.training.dry_run import dry_run
from janus_modular.training.train import train

LORA = {"name": "lora", "rank": 2, "alpha": 4.0}
BACKBONE = {"backbone": {**LORA, "target_modules": ["q_proj", "v_proj"]}}
EVERYWHERE = {
    **BACKBONE,
    "understanding.encoder": LORA,
    "understanding.adaptor": LORA,
    "generation.adaptor": LORA,
    "generation.head": LORA,
}


@pytest.fixture
def first(make) -> Path:
    return train(make(schedule={"steps": 2}), quiet=True)


@pytest.fixture
def second(make, first: Path, tmp_path: Path):
    def build(**changes):
        usual = {"init": str(first), "output": str(tmp_path / "second"), "schedule": {"steps": 4}}
        return make(**{"model": "null", "learn": ["backbone"], "wrap": BACKBONE, **usual, **changes})

    return build


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(ModelAssembly.from_checkpoint(folder).model.state_dict())


def unwrapped(name: str, wraps: Mapping[str, Any]) -> str:
    """Return the name that a weight of a wrapped component has without its wrapper."""
    for path in wraps:
        name = name.replace(f"{path}.{path.rpartition('.')[2]}.", f"{path}.", 1)
    return name.replace(".base_layer.", ".")


def test_only_adapters_are_trained_and_can_be_merged(second, first: Path, tmp_path: Path) -> None:
    folder = train(second(), quiet=True)
    before, after = weights(first), weights(folder)
    adapters = {name for name in after if ".lora_" in name}
    assert len(adapters) == 2 * 2 * 2  # A and B of two projections in two layers
    assert all(after[name].abs().max() > 0 for name in adapters)
    kept = {unwrapped(name, BACKBONE): name for name in after}
    for name, weight in before.items():
        torch.testing.assert_close(after[kept[name]], weight, rtol=0, atol=0)
    plain = tmp_path / "plain"
    done = CliRunner().invoke(app, ["convert", str(folder), str(plain), "--merge"])
    assert done.exit_code == 0, done.output
    adapted, folded = (Janus.from_pretrained(path, device="cpu") for path in (folder, plain))
    assert folded.model.config.backbone.name == "hf"
    assert folded.chat("Colour?", max_tokens=8) == adapted.chat("Colour?", max_tokens=8)


def test_adapters_that_learn_leaves_out_are_an_error(second) -> None:
    """They would stay zero: a setting without effect."""
    config = second(learn=["generation.head"], wrap=EVERYWHERE)
    for action in (
        lambda: train(config, quiet=True),
        lambda: dry_run(config, default_plugins(), Console(quiet=True)),
    ):
        with pytest.raises(ConfigError, match=r"wrap\.backbone: 'lora'.* would have no effect"):
            action()


def test_adapters_on_every_component_learn_and_merge_by_the_formula(second, first: Path, tmp_path: Path):
    """Frozen weights are as before, and merged ones are W + alpha / rank * B A, computed here."""
    folder = train(second(wrap=EVERYWHERE, learn=list(EVERYWHERE)), quiet=True)
    before, after = weights(first), weights(folder)
    adapted = {name.partition(".lora_A.")[0] for name in after if ".lora_A." in name}
    for path in EVERYWHERE:
        assert any(name.startswith(f"{path}.") for name in adapted), f"no layer of {path} is adapted"
    assert all(after[name].abs().max() > 0 for name in after if ".lora_B." in name)

    expected = dict(before)
    for name in after:
        if ".lora_" not in name:
            torch.testing.assert_close(after[name], before[unwrapped(name, EVERYWHERE)], rtol=0, atol=0)
    for layer in adapted:
        a, b = (after[f"{layer}.lora_{which}.default.weight"] for which in "AB")
        expected[unwrapped(f"{layer}.weight", EVERYWHERE)] += 4.0 / 2 * b @ a
    convert(folder, tmp_path / "plain", merge=True)
    merged = weights(tmp_path / "plain")
    assert merged.keys() == before.keys()
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-7)
    config = ModelAssembly.from_checkpoint(tmp_path / "plain").model.config
    assert (config.understanding.encoder.name, config.understanding.adaptor.name) == ("vit", "mlp")


def test_a_stage_trains_the_adapters_that_it_names_alone(second, tmp_path: Path) -> None:
    folder = train(second(wrap=EVERYWHERE, learn=list(EVERYWHERE)), quiet=True)
    learn = ["understanding.encoder", "generation.head"]
    third = second(init=str(folder), output=str(tmp_path / "third"), wrap={}, learn=learn)
    before, after = weights(folder), weights(train(third, quiet=True))
    learned = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert all(".lora_" in name for name in learned)
    assert {".".join(name.split(".")[:2]) for name in learned} == set(learn)


@pytest.mark.slow  # a model's whole export
def test_a_bundle_of_adapters_on_every_component_agrees(second, tmp_path: Path) -> None:
    folder = train(second(wrap=EVERYWHERE, learn=list(EVERYWHERE)), quiet=True)
    settings = ExportConfig(variants=["fp32"], rows=4, capacity=128)
    bundle = load_bundle(export(folder, tmp_path / "bundle", settings))
    files = bundle.manifest["variants"]["fp32"]["files"]
    assert not [name for name, file in files.items() if b"lora" in (bundle.folder / file).read_bytes()]
    assert [report.passed for report in verify(tmp_path / "bundle", folder)] == [True]


def test_a_resumed_run_keeps_its_wrapped_components(second, tmp_path: Path) -> None:
    wraps = {"wrap": EVERYWHERE, "learn": list(EVERYWHERE), "checkpoint_every": 2}
    whole = train(second(**wraps), quiet=True)
    halves = {**wraps, "output": str(tmp_path / "halves")}
    train(second(**halves, schedule={"steps": 4, "stop": 2}), quiet=True)
    resumed = train(second(**halves), quiet=True, resume=True)
    torch.testing.assert_close(weights(whole), weights(resumed), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        ("lora", "found 'lora'; expected component paths"),
        (LORA, r"expected component paths with what wraps each: wrap={backbone: {name: lora"),
        ({"backbone": "lora"}, r"wrap\.backbone: found 'lora'; expected component paths"),
        ({"backbone": {"rank": 2}}, "expected component paths"),
        ({"backbone": {"name": "hf"}}, "'hf' wraps no other component; expected a component that wraps"),
        ({"backbone": {"name": "lora", "backbone": {"name": "hf"}}}, "'lora' sets 'backbone' itself"),
        ({"backbone": {"name": "lora", "rnk": 2}}, r"wrap\.backbone\.rnk: unknown key"),
        ({"backbone": {"name": "lora", "rank": 0}}, "wrap.*rank: 0; expected at least 1"),
        ({"backbone": {"name": "lroa"}}, "no backbone is called 'lroa'"),
        (
            {"generation.heads": LORA},
            r"found 'generation\.heads', which is no component; expected understanding\.encoder, .*"
            r"generation\.head.*did you mean 'generation\.head'",
        ),
        ({"generation.tokenizer": LORA}, r"'generation\.tokenizer', which no stage trains; expected"),
        ({"generation": LORA}, "no generation path is called 'lora'"),
        (
            {"backbone": {**LORA, "target_modules": ["nothing"]}},
            "wrap.backbone.*the backbone 'lora'.* cannot be built: .*nothing adapts nothing; .* are q_proj",
        ),
        (
            {"generation.head": {**LORA, "target_modules": ["fc"]}},
            "fc adapts nothing; the linear layers that can be adapted are output_mlp_projector, vision_head",
        ),
    ],
)
def test_invalid_wraps_are_errors_before_weights_are_read(second, wrap, expected: str) -> None:
    with pytest.raises(JanusError, match=f"(?i){expected}"):
        train(second(wrap=wrap), quiet=True)


def test_a_second_wrap_is_an_error(second, make, tmp_path: Path) -> None:
    folder = train(second(), quiet=True)
    third = make(model="null", init=str(folder), learn=["backbone"], output=str(tmp_path / "third"))
    train(third, quiet=True)
    with pytest.raises(ConfigError, match=r"'lora' already\. Leave wrap out"):
        train(second(init=str(folder), output=str(tmp_path / "fourth")), quiet=True)
    with pytest.raises(ConfigError, match="wrap: wraps components of init"):
        make(wrap=BACKBONE)

"""LoRA: adapted layers, trained parameters, and merging without a change of results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from janus_export.bundle.bundle import load_bundle
from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.verify import verify
from janus_modular import CheckpointError, ConfigError, Plugins
from janus_modular.checkpoints import ModelAssembly, native
from janus_modular.checkpoints.converting import convert
from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import ModelBuilder
from janus_modular.training.trainable import parameter_counts, set_trainable
from janus_plugins.backbones.lora import LoraBackbone, LoraConfig

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
LAYERS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LAYERS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def lora(
    plugins: Plugins, inner: dict[str, Any] | None = None, *, learned: bool = True, **options: Any
) -> Any:
    """Build adapters over a small Llama; ``learned``: as if something had been."""
    torch.manual_seed(0)
    raw = {"rank": 4, "alpha": 6.0, "backbone": inner or {"name": "hf", "config": LLAMA}, **options}
    config = resolve(raw, LoraConfig, plugins)
    backbone = ModelBuilder(plugins)(ComponentSpec("backbones", "lora", config)).eval()
    if learned:
        disturb(backbone)
    return backbone


def disturb(module: torch.nn.Module) -> None:
    for name, weight in module.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)


def logits_of(backbone: Any, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.inference_mode():
        return backbone.logits(backbone(backbone.embed(tokens), positions=positions))


TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))


def test_all_linear_layers_but_the_logits_have_an_adapter_of_the_rank(plugins: Plugins) -> None:
    backbone = lora(plugins, learned=False)
    adapted = {path.split("layers.")[1] for path, _ in backbone._adapted()}
    assert adapted == {f"{i}.{name}" for i in range(2) for name in LAYERS}
    learn = sum(weight.numel() for weight in backbone.parameters() if weight.requires_grad)
    inputs_and_outputs = (16 + 16) + 2 * (16 + 8) + (16 + 16) + 3 * (16 + 24)
    assert learn == 2 * 4 * inputs_and_outputs
    torch.testing.assert_close(
        logits_of(backbone, TOKENS), logits_of(backbone.backbone, TOKENS)
    )  # nothing is learned yet


def test_they_add_what_the_paper_says(plugins: Plugins) -> None:
    backbone = lora(plugins)
    layer = backbone.get_submodule("backbone.model.model.layers.1.mlp.down_proj")
    x = torch.randn(3, 24)
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + 6 / 4 * b @ a).T)


def test_dropout_is_of_the_adapters_and_of_training(plugins: Plugins) -> None:
    backbone = lora(plugins, dropout=0.5)
    torch.testing.assert_close(logits_of(backbone, TOKENS), logits_of(backbone, TOKENS), rtol=0, atol=0)
    backbone.train()
    assert not torch.equal(logits_of(backbone, TOKENS), logits_of(backbone, TOKENS))


def test_target_modules_are_names_as_peft_has_them(plugins: Plugins) -> None:
    backbone = lora(plugins, target_modules=["q_proj", "layers.1.mlp.up_proj"])
    adapted = [path.split("layers.")[1] for path, _ in backbone._adapted()]
    assert adapted == ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "lm_head"]},
            r"lm_head adapts nothing; .* are q_proj, k_proj, .*_proj",
        ),
        ({"target_modules": []}, "an empty list adapts nothing"),
        ({"rank": 0}, "rank: found 0|rank: 0; expected at least 1"),
        ({"dropout": 1.0}, r"dropout.*1\.0; expected at least 0 and less than 1"),
    ],
)
def test_what_cannot_be_adapted_is_an_error(plugins: Plugins, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora(plugins, **options)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "gpt_neox"])
def test_other_families_can_be_adapted(plugins: Plugins, family: str) -> None:
    keys = {**LLAMA, "model_type": family, "head_dim": 4, "pad_token_id": 0}
    if family == "gpt_neox":
        keys = {key: value for key, value in keys.items() if "key_value" not in key and key != "head_dim"}
    backbone = lora(plugins, {"name": "hf", "config": keys})
    assert not torch.allclose(
        logits_of(backbone, TOKENS),
        logits_of(lora(plugins, {"name": "hf", "config": keys}, learned=False), TOKENS),
    )
    assert "lm_head" not in " ".join(path for path, _ in backbone._adapted())


# In a model


def model_config(**options: Any) -> ModelConfig:
    raw = load("tiny")
    raw["backbone"] = {"name": "lora", "rank": 4, "backbone": raw["backbone"], **options}
    return resolve(raw, ModelConfig)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny model whose adapters have learned something."""
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(model_config())
    model = assembly.model
    disturb(model.backbone)
    native.save(assembly, tmp_path / "model")
    return tmp_path / "model"


def test_a_stage_that_names_the_backbone_trains_the_adapters() -> None:
    model = ModelAssembly.from_config(model_config(dropout=0.1)).model
    set_trainable(model, ["backbone", "generation.head"])
    learn = {name for name, weight in model.backbone.named_parameters() if weight.requires_grad}
    assert learn
    assert all(".lora_" in name for name in learn)
    assert len(learn) == 2 * 7 * 2  # two layers of seven, A and B
    in_training = [name for name, module in model.backbone.named_modules() if module.training]
    assert in_training
    assert all(".lora_" in name for name in in_training)
    assert "backbone.model.model.layers.0.mlp.up_proj.lora_dropout.default" in in_training
    counts = {one.path: (one.trainable, one.frozen) for one in parameter_counts(model)}
    assert counts["backbone"][0] == sum(
        weight.numel() for weight in model.backbone.parameters() if weight.requires_grad
    )
    assert counts["backbone"][1] > counts["backbone"][0]


def test_a_stage_may_name_what_is_below() -> None:
    model = ModelAssembly.from_config(model_config()).model
    set_trainable(model, ["backbone", "backbone.backbone.model.model.embed_tokens"])
    learn = {name for name, weight in model.backbone.named_parameters() if weight.requires_grad}
    assert {name for name in learn if ".lora_" not in name} == {"backbone.model.model.embed_tokens.weight"}
    set_trainable(model, ["backbone.backbone"])  # all that is inside, by name
    assert all(weight.requires_grad for weight in model.backbone.parameters())


def test_a_step_changes_the_adapters_alone() -> None:
    model = ModelAssembly.from_config(model_config()).model
    set_trainable(model, ["backbone"])
    before = {name: weight.clone() for name, weight in model.backbone.named_parameters()}
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.1)
    for _ in range(2):  # B is zero at first, and A has a gradient only once it is not
        tokens = torch.arange(12).view(2, 6)
        positions = torch.arange(6).expand(2, 6)
        loss = (
            model.backbone.logits(model.backbone(model.backbone.embed(tokens), positions=positions))
            .square()
            .mean()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {
        name for name, weight in model.backbone.named_parameters() if not torch.equal(weight, before[name])
    }
    assert changed == {name for name in before if ".lora_" in name}


def test_a_checkpoint_holds_base_and_adapters(checkpoint: Path) -> None:
    model = ModelAssembly.from_checkpoint(checkpoint).model
    assert isinstance(model.backbone, LoraBackbone)
    assert any(".lora_B." in name for name in load_file(checkpoint / "model.safetensors"))
    again = ModelAssembly.from_checkpoint(checkpoint).model
    tokens = torch.arange(12).view(2, 6)
    torch.testing.assert_close(
        logits_of(model.backbone, tokens), logits_of(again.backbone, tokens), rtol=0, atol=0
    )


def test_merging_makes_a_plain_checkpoint_that_says_the_same(checkpoint: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["convert", str(checkpoint), str(tmp_path / "plain"), "--merge"])
    assert done.exit_code == 0, done.output

    plain, adapted = (
        ModelAssembly.from_checkpoint(tmp_path / "plain").model,
        ModelAssembly.from_checkpoint(checkpoint).model,
    )

    assert plain.config.backbone.name == "hf"
    assert not any("lora" in name for name in load_file(tmp_path / "plain/model.safetensors"))
    tokens = torch.arange(12).view(2, 6)
    # folded, sums are rounded in another order
    torch.testing.assert_close(
        logits_of(plain.backbone, tokens), logits_of(adapted.backbone, tokens), atol=1e-5, rtol=1e-4
    )
    base = logits_of(adapted.backbone, tokens)
    for name, weight in adapted.backbone.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.zeros_(weight)
    assert not torch.allclose(logits_of(adapted.backbone, tokens), base, atol=1e-2)  # they did say something


def test_merging_what_has_no_adapters_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "once", merge=True)
    convert(tmp_path / "once", tmp_path / "twice", merge=True)
    once, twice = (load_file(tmp_path / one / "model.safetensors") for one in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.slow  # a model's whole export
def test_a_bundle_has_plain_graphs_and_agrees(checkpoint: Path, tmp_path: Path) -> None:
    settings = ExportConfig(variants=["fp32"], rows=4, capacity=128)
    bundle = load_bundle(export(checkpoint, tmp_path / "bundle", settings))
    convert(checkpoint, tmp_path / "plain", merge=True)

    variant = bundle.manifest["variants"]["fp32"]
    assert b"lora" not in (bundle.folder / variant["files"]["backbone"]).read_bytes()
    held = {k: v for file in variant["weights"] for k, v in load_file(bundle.folder / file).items()}
    plain = load_file(tmp_path / "plain/model.safetensors")
    assert {name for name in plain if name.startswith("backbone.")} <= held.keys()
    assert all(torch.equal(held[name], plain[name]) for name in held)
    for layers in (False, True):  # the model in torch has its adapters
        reports = verify(tmp_path / "bundle", checkpoint, layers=layers)
        assert [report.passed for report in reports] == [True]


# From elsewhere


def test_it_adapts_what_a_folder_holds(plugins: Plugins, tmp_path: Path) -> None:
    torch.manual_seed(3)
    source = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})).eval()
    source.save_pretrained(tmp_path)
    backbone = lora(plugins, {"name": "hf", "pretrained": str(tmp_path)}, learned=False)
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(backbone, TOKENS), source(TOKENS).logits)


of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
"""transformers warns peft, which prepares a whole model; adapters that are put into one do without."""


def peft_folder(folder: Path, **options: Any) -> tuple[Path, Any]:
    """Write a base and an adapter as peft does; return the folder, and peft's own model."""
    torch.manual_seed(4)
    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})).save_pretrained(
        folder / "base"
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(base, config)
    disturb(model)
    model.save_pretrained(folder / "adapter")
    return folder, model.eval()


def of_folder(plugins: Plugins, folder: Path, **options: Any) -> Any:
    inner = {"name": "hf", "pretrained": str(folder / "base")}
    options = {"target_modules": ["q_proj", "up_proj"], "pretrained": str(folder / "adapter"), **options}
    return lora(plugins, inner, learned=False, **options)


@of_peft
@pytest.mark.parametrize("start", [True, "gaussian"])
def test_adapters_that_peft_saved_are_read(start: Any, plugins: Plugins, tmp_path: Path) -> None:
    folder, theirs = peft_folder(tmp_path, init_lora_weights=start)
    backbone = of_folder(plugins, folder)
    held = load_file(folder / "adapter/adapter_model.safetensors")
    assert backbone.load_pretrained(folder / "adapter") == (len(held), [], [])
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(backbone, TOKENS), theirs(TOKENS).logits)


@of_peft
def test_adapters_that_are_not_as_the_config_says_are_refused(plugins: Plugins, tmp_path: Path) -> None:
    folder, _ = peft_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"r is 4, not 8; lora_alpha is 6, not 3\.0"):
        of_folder(plugins, folder, rank=8, alpha=3.0)
    with pytest.raises(
        CheckpointError, match=r"4 missing:\n +backbone\.model\.model\.layers\.0\.self_attn\.k_proj"
    ):
        of_folder(plugins, folder, target_modules=["q_proj", "up_proj", "k_proj"])
    with pytest.raises(CheckpointError, match="no adapter of peft's"):
        of_folder(plugins, folder, pretrained=str(folder / "base"))
    described = json.loads((folder / "adapter/adapter_config.json").read_text())
    (folder / "adapter/adapter_config.json").write_text(json.dumps({**described, "use_rslora": True}))
    with pytest.raises(CheckpointError, match="use_rslora is True, which is not supported"):
        of_folder(plugins, folder)


@of_peft
def test_an_adapter_of_more_than_is_adapted_here_is_refused(plugins: Plugins, tmp_path: Path) -> None:
    folder, _ = peft_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not: base_model\.model\.model\.layers\.0\.mlp\.up_proj"):
        of_folder(plugins, folder, target_modules=["q_proj"])
    file = folder / "adapter/adapter_model.safetensors"
    held = load_file(file)
    for name in ("lm_head.lora_A.weight", "model.embed_tokens.lora_embedding_A"):
        save_file({**held, f"base_model.model.{name}": torch.zeros(4, 16)}, file)
        with pytest.raises(CheckpointError, match=rf"does not: base_model\.model\.{re.escape(name)}\. Name"):
            of_folder(plugins, folder)


@of_peft
@pytest.mark.parametrize(
    ("option", "fault"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which may have changed the base"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ],
    ids=str,
)
def test_an_adapter_of_another_base_is_refused(
    option: dict[str, Any], fault: str, plugins: Plugins, tmp_path: Path
) -> None:
    folder, _ = peft_folder(tmp_path, **option)
    with pytest.raises(CheckpointError, match=fault):
        of_folder(plugins, folder)

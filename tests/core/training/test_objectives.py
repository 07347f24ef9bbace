"""Objectives beside that of the stages: reconstruction, images with captions, those of third parties."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel

from janus_modular import Losses, image_of, target_pixels
from janus_modular.checkpoints import ModelAssembly
from janus_modular.errors import ConfigError, TrainingError
from janus_modular.plugins import default_plugins
from janus_modular.training.dry_run import dry_run
from janus_modular.training.objective import build_objective, loss_sums
from janus_modular.training.run_setup import open_sources, step_builder
from janus_modular.training.schema import TrainConfig
from janus_modular.training.train import train
from janus_modular.training.trainable import set_trainable
from janus_modular.weights.files import open_weights

from .conftest import Rank, logged
from .objective_configs import CONTRASTIVE, RECONSTRUCTION, TEXT, VQGAN, MakeStage, start_of, state

Ranks = Callable[..., list[Rank]]


def test_a_step_of_reconstruction_is_that_of_a_plain_loop(make_stage: MakeStage) -> None:
    """VQGAN's loss without its perceptual and adversarial terms, written out, and torch's AdamW."""
    config = make_stage(
        RECONSTRUCTION,
        f"model.generation.tokenizer={VQGAN}",
        "schedule.steps=1",
        "optimizer.clip=null",
        "optimizer.weight_decay=0.0",
    )
    assembly, _, builder = start_of(config)
    tokenizer: Any = assembly.model.get_submodule("generation.tokenizer")
    [batch] = builder.build(0).batches
    x = batch["pixels"].float() / 127.5 - 1
    assert x.shape == (4, 3, 32, 32)

    z = tokenizer.quant_conv(tokenizer.encoder(x)).permute(0, 2, 3, 1)  # (N, h, w, code_dim)
    codebook = tokenizer.quantize.embedding.weight
    codes = torch.cdist(z.flatten(0, 2), codebook).argmin(-1)
    e = codebook[codes].view_as(z)
    straight = z + (e - z).detach()
    decoded = tokenizer.decoder(tokenizer.post_quant_conv(straight.permute(0, 3, 1, 2)))
    loss = F.l1_loss(decoded, x) + tokenizer.config.codebook * F.mse_loss(e, z.detach())
    loss = loss + tokenizer.config.commitment * F.mse_loss(z, e.detach())
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    loss.backward()
    optimizer.step()

    trained = open_weights(train(config, quiet=True))
    for name, weight in tokenizer.state_dict().items():
        torch.testing.assert_close(trained[f"generation.tokenizer.{name}"], weight, atol=1e-5, rtol=1e-4)
    values = logged(Path(config.output))[1]
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert values["psnr"] == pytest.approx(
        (10 * torch.log10(4 / (decoded.clamp(-1, 1) - x).square().flatten(1).mean(1))).mean().item(), rel=1e-4
    )
    counts = torch.bincount(codes, minlength=16)
    assert values["codes_used"] == pytest.approx(float((counts > 0).float().mean()))
    assert values["perplexity"] == pytest.approx(
        float(torch.distributions.Categorical(counts / counts.sum()).entropy().exp()), rel=1e-4
    )


def test_the_contrastive_loss_is_that_of_siglip() -> None:
    """transformers' SiglipModel on random weights, temperature and bias."""
    from janus_plugins.objectives.sigmoid_contrastive import sigmoid_loss

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 32, "max_position_embeddings": 8}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        model.logit_scale.fill_(1.3)
        model.logit_bias.fill_(-2.4)
        output = model(
            input_ids=torch.randint(32, (5, 8)), pixel_values=torch.rand(5, 3, 16, 16), return_loss=True
        )
    similarity = output.image_embeds @ output.text_embeds.T
    scale, bias = model.logit_scale.exp(), model.logit_bias
    ours = sigmoid_loss(similarity, torch.eye(5, dtype=torch.bool), scale, bias)
    assert ours.shape == (5,)
    torch.testing.assert_close(ours.mean(), output.loss)


def test_equal_captions_are_positive(make_stage: MakeStage) -> None:
    """Four images of four colours, twice each: the other image of a colour is a negative one by default."""
    losses = []
    for positives in ("pairs", "equal_captions"):
        config = make_stage(CONTRASTIVE, "batch=8", f"objective.positives={positives}")
        torch.manual_seed(0)
        assembly = ModelAssembly.from_config(config.model)  # type: ignore[arg-type]
        objective: Any = build_objective(config.objective, assembly.model, default_plugins(), "cpu")
        builder = step_builder(config, open_sources(config, default_plugins()), assembly, objective)
        [batch] = builder.build(0).batches
        images = objective.embed_images(assembly.model, batch["pixels"])
        texts = objective.embed_captions(batch["ids"], batch["length"])
        same = [[bool((a == b).all()) for b in batch["ids"]] for a in batch["ids"]]
        assert sum(map(sum, same)) == 16
        signs = torch.tensor(same if positives == "equal_captions" else np.eye(8).tolist()).float() * 2 - 1
        logits = images @ texts.T * objective.scale.exp() + objective.bias
        expected = -F.logsigmoid(signs * logits).sum() / 8
        [loss] = objective.losses(assembly.model, batch, step=0).terms.values()
        torch.testing.assert_close(loss.mean(), expected)
        losses.append(expected.item())
    assert losses[0] != losses[1]


@pytest.mark.parametrize("objective", [RECONSTRUCTION, CONTRASTIVE], ids=["reconstruction", "contrastive"])
def test_two_processes_are_one(objective: dict[str, Any], make_stage: MakeStage, ranks: Ranks) -> None:
    """Gradients (a tenth of them are AdamW's first moments), the codebook, metrics and validation."""
    tokenizer = ["model.generation.tokenizer.continuous_steps=0", "model.generation.tokenizer.num_codes=8"]
    single = make_stage(objective, *tokenizer, "schedule.steps=1")
    source = {"name": "jsonl", "path": single.sources["images"].config.path}
    source |= {"questions": ["Colour?"]} if objective is CONTRASTIVE else {"task": "draw"}
    validation = f"validation={{every: 1, samples: 3, sources: {{held: {source}}}}}"
    single = make_stage(objective, *tokenizer, "schedule.steps=1", validation)
    several = replace(single, output=f"{single.output}-2")
    train(single, quiet=True)
    results = ranks(2, lambda _: str(train(several, quiet=True)))
    assert [result.status for result in results] == [0, 0], results
    one, two = (state(Path(config.output) / "checkpoints/step-0000001") for config in (single, several))
    assert one.keys() == two.keys()
    compared = [name for name in one if "/exp_avg/" in name or "codebook" in name]
    assert len(compared) > 10
    for name in compared:
        torch.testing.assert_close(two[name], one[name], atol=1e-7, rtol=1e-5, msg=name)
    first, second = (logged(Path(config.output))[1] for config in (single, several))
    assert {"validation/held", "loss", "grad_norm"} < first.keys()
    of_micro_batches = ("validation/held/codes_used", "validation/held/perplexity")  # of a process each
    for metric, value in first.items():
        if not metric.endswith("per_second") and metric not in of_micro_batches:
            assert second[metric] == pytest.approx(value, rel=1e-6, abs=1e-6), metric


@pytest.mark.parametrize("objective", [RECONSTRUCTION, CONTRASTIVE], ids=["reconstruction", "contrastive"])
def test_a_resumed_run_is_the_same_to_the_bit(objective: dict[str, Any], make_stage: MakeStage) -> None:
    overrides = ["schedule.steps=4", "model.generation.tokenizer.continuous_steps=1", "ema=0.9"]
    whole = make_stage(objective, *overrides, "schedule.name=cosine")
    parts = replace(whole, output=f"{whole.output}-parts")
    train(whole, quiet=True)
    train(replace(parts, schedule=replace(parts.schedule, stop=2)), quiet=True)
    train(parts, resume=True, quiet=True)
    expected, found = (state(Path(config.output) / "checkpoints/step-0000004") for config in (whole, parts))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    own = [name for name in expected if name.startswith("training/auxiliary/objective.")]
    assert bool(own) == (objective is CONTRASTIVE)
    assert not any(name.startswith("training/ema/objective") for name in expected)
    assert not any("objective" in name for name in open_weights(Path(whole.output) / "model"))


def test_stages_of_components_chain_and_the_table_of_codes_follows_the_codebook(
    make_stage: MakeStage,
) -> None:
    first = make_stage(RECONSTRUCTION, "model.generation.tokenizer.continuous_steps=1")
    trained = open_weights(train(first, quiet=True))
    codebook = trained["generation.tokenizer.codebook"]
    assert torch.equal(trained["generation.embedding.weight"], codebook)
    torch.manual_seed(first.seed)
    assert first.model is not None
    fresh = ModelAssembly.from_config(first.model).model.state_dict()
    assert not torch.equal(fresh["generation.tokenizer.codebook"], codebook)
    assert torch.equal(fresh["backbone.model.model.norm.weight"], trained["backbone.model.model.norm.weight"])

    def after(objective: Any, start: TrainConfig, *overrides: str) -> TrainConfig:
        config = make_stage(objective, *overrides)
        return replace(config, model=None, init=f"{start.output}/model", output=f"{start.output}-next")

    second = after(CONTRASTIVE, first)
    encoder = open_weights(train(second, quiet=True))
    assert torch.equal(encoder["generation.tokenizer.codebook"], codebook)
    third = after(None, second, "learn=[generation.embedding,generation.head]", "length=64")
    table = open_weights(train(third, quiet=True))["generation.embedding.weight"]
    assert not torch.equal(table, codebook)
    fourth = after(RECONSTRUCTION, third)  # a table that was trained stays as it is
    again = open_weights(train(fourth, quiet=True))
    assert torch.equal(again["generation.embedding.weight"], table)
    assert not torch.equal(again["generation.tokenizer.codebook"], codebook)


@pytest.mark.parametrize(
    ("objective", "override", "message"),
    [
        (RECONSTRUCTION, "learn=[generation.tokenizer,backbone]", "'backbone' names backbone, which gets no"),
        (RECONSTRUCTION, "length=64", "length: 64; 'image-reconstruction' trains on examples"),
        (RECONSTRUCTION, "mixture_unit=tokens", "expected samples"),
        (RECONSTRUCTION, "objective.module=backbone", "expected an image tokenizer or autoencoder"),
        (RECONSTRUCTION, "objective.module=generation.x", "the model has none at 'generation.x'"),
        (CONTRASTIVE, "accumulate=2", "compares all examples of a step"),
        (CONTRASTIVE, "learn=[understanding]", "expected understanding.encoder, which the objective trains"),
        (None, "learn=[generation.tokenizer]", "by an objective of its own"),
    ],
)
def test_an_invalid_setting_is_an_error_before_training(
    objective: Any, override: str, message: str, make_stage: MakeStage
) -> None:
    config = make_stage(objective, override)
    for action in (lambda: train(config, quiet=True), lambda: dry_run(config, default_plugins(), Console())):
        with pytest.raises(ConfigError, match=message):
            action()


def test_an_unusable_caption_is_skipped_as_the_config_says(make_stage: MakeStage) -> None:
    small = {**TEXT, "config": {**TEXT["config"], "vocab_size": 4}}  # type: ignore[dict-item]
    with pytest.raises(Exception, match=r"the caption has the token \d+; the text tower .* has 4"):
        train(make_stage(CONTRASTIVE, f"objective.text={small}"), quiet=True)


def test_a_dry_run_counts_examples(make_stage: MakeStage, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(make_stage(CONTRASTIVE), default_plugins(), Console(width=200))
    printed = capsys.readouterr().out
    assert "objective (not in the model)" in printed
    assert "4 examples; 3 steps" in printed


def test_a_dry_run_takes_a_learning_rate_of_the_objectives_own_parameters(
    make_stage: MakeStage, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the run does: the estimate of memory knows the run's optimizers."""
    config = make_stage(CONTRASTIVE, "optimizer.groups={objective: {lr: 1e-4}}")
    dry_run(config, default_plugins(), Console(width=200))
    assert "4 examples; 3 steps" in capsys.readouterr().out
    train(config, quiet=True)


class Brightness(nn.Module):
    """A third party's objective: the tokenizer's decoder reproduces the mean brightness of images."""

    trains = ("generation.tokenizer.decoder",)

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))

    def example(self, sample: Any, processor: Any, rng: np.random.Generator) -> dict[str, Any]:
        return {"pixels": target_pixels(image_of(sample, rng), processor)}

    def losses(self, model: Any, batch: Mapping[str, torch.Tensor], *, step: int) -> Losses:
        tokenizer = model.get_submodule("generation.tokenizer")
        x = batch["pixels"].float() / 127.5 - 1
        with torch.no_grad():
            codes = tokenizer.encode(x)
        decoded = tokenizer.decode(codes, height=32, width=32)
        apart = decoded.flatten(1).mean(1) + self.offset - x.flatten(1).mean(1)
        return Losses({"brightness": apart.square()}, {"number": (float(step), 1.0)})


def test_an_objective_of_a_third_party_trains(make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "janus_modular.training.train.build_objective", lambda spec, model, plugins, device: Brightness()
    )
    config = make_stage(
        RECONSTRUCTION, "learn=[generation.tokenizer.decoder]", "accumulate=2", "schedule.steps=30"
    )
    model = train(config, quiet=True)
    values = logged(Path(config.output))
    assert values[30]["loss/brightness"] < 0.1 * values[1]["loss/brightness"]
    assert [values[step]["number"] for step in (1, 2, 30)] == [0, 1, 29]
    saved = state(Path(config.output) / "checkpoints/step-0000030")
    assert float(saved["training/auxiliary/objective.offset"]) != 0
    assert "objective.offset" not in open_weights(model)


def test_a_model_s_parameter_is_no_objective_s_own(
    make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_stage(RECONSTRUCTION)
    assert config.model is not None
    model = ModelAssembly.from_config(config.model).model

    def keeps(config: Any, model: Any) -> nn.Module:
        module = Brightness()
        module.kept = model.generation.tokenizer
        return module

    entry = default_plugins().entry("objectives", "image-reconstruction")
    monkeypatch.setattr(type(entry), "make", lambda self, config, model, build: keeps(config, model))
    with pytest.raises(ConfigError, match=r"keeps kept\.\S+, which is the model's own"):
        build_objective(config.objective, model, default_plugins(), "cpu")


def test_a_loss_of_another_shape_is_an_error() -> None:
    batch = {"pixels": torch.zeros(3, 1)}
    assert loss_sums(Losses({"x": torch.tensor(2.0)}), batch) == {"x": (torch.tensor(6.0), 3)}
    with pytest.raises(TrainingError, match=r"the loss 'x' is \(2,\); expected that of 3 examples"):
        loss_sums(Losses({"x": torch.zeros(2)}), batch)


def test_learn_selects_among_the_modules_that_the_objective_trains(make_stage: MakeStage) -> None:
    config = make_stage(RECONSTRUCTION, "learn=[generation.tokenizer.decoder]")
    assert config.model is not None
    model = ModelAssembly.from_config(config.model).model
    objective = build_objective(config.objective, model, default_plugins(), "meta")
    set_trainable(model, config.learn, objective.trains)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("generation.tokenizer.decoder.") for name in trained)
    assert not model.get_submodule("generation.tokenizer").training  # its codebook stays

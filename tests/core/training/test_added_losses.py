"""What may be added to the loss of reconstructions: a discriminator, and features of given weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from janus_modular.checkpoints import ModelAssembly
from janus_modular.errors import ConfigError
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import default_plugins
from janus_modular.training.objective import build_objective
from janus_modular.training.train import train
from janus_modular.weights.writing import write_weights

from .conftest import logged
from .objective_configs import RECONSTRUCTION, VQGAN, MakeStage, start_of, state

ADVERSARIAL = {
    **RECONSTRUCTION,
    "adversarial": {
        "weight": 0.3,
        "start": 1,
        "channels": 4,
        "layers": 2,
        "optimizer": {"lr": 1e-3, "clip": 0.5},
    },
}


def test_a_discriminator_trains_as_in_a_loop_of_two_optimizers(make_stage: MakeStage) -> None:
    """Step 1 of VQGAN's loop: the tokenizer with a fixed discriminator, then the discriminator.

    Step 0 is before the discriminator begins. With betas of 0, AdamW's first moments are the gradients.
    """
    config = make_stage(
        ADVERSARIAL,
        f"model.generation.tokenizer={VQGAN}",
        "schedule.steps=2",
        "optimizer.clip=null",
        "optimizer.betas=[0.0, 0.95]",
        "optimizer.lr=1e-3",
        "objective.adversarial.optimizer.betas=[0.0, 0.95]",
    )
    assembly, objective, builder = start_of(config)
    tokenizer: Any = assembly.model.get_submodule("generation.tokenizer")
    discriminator = objective.discriminator
    first, second = (builder.build(step).batches[0]["pixels"].float() / 127.5 - 1 for step in (0, 1))

    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-3, betas=(0.0, 0.95), weight_decay=0.0)
    torch.stack([*tokenizer.losses(first).values()]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    made = tokenizer.reconstruct(second)
    loss = torch.stack([*made.named_losses(second).values()]).sum() - 0.3 * discriminator(made.pixels).mean()
    loss.backward()
    discriminator.zero_grad()
    scores, of_made = discriminator(second), discriminator(made.pixels.detach())
    (0.5 * (F.relu(1 - scores) + F.relu(1 + of_made))).mean().backward()
    nn.utils.clip_grad_norm_(discriminator.parameters(), 0.5)

    train(config, quiet=True)
    saved = state(Path(config.output) / "checkpoints/step-0000002")
    moments = "training/optimizer/exp_avg/"
    for name, parameter in tokenizer.named_parameters():
        actual = saved[f"{moments}generation.tokenizer.{name}"]
        torch.testing.assert_close(actual, parameter.grad, atol=1e-5, rtol=1e-3)
    for name, parameter in discriminator.named_parameters():
        actual = saved[f"{moments}objective.discriminator.{name}"]
        torch.testing.assert_close(actual, parameter.grad, atol=1e-5, rtol=1e-3)
        before = parameter.detach()  # step 0 left it as it was
        step = saved[f"training/auxiliary/objective.discriminator.{name}"] - before
        assert float(step.abs().max()) <= 1.01e-3
    values = logged(Path(config.output))
    assert "loss/discriminator" not in values[1]
    assert {"loss/adversarial", "loss/discriminator", "grad_norm/objective.discriminator"} < values[2].keys()


def test_a_run_with_a_discriminator_resumes_before_and_after_its_start(make_stage: MakeStage) -> None:
    whole = make_stage(ADVERSARIAL, "schedule.steps=3", "objective.adversarial.start=2")
    parts = replace(whole, output=f"{whole.output}-parts")
    train(whole, quiet=True)
    train(replace(parts, schedule=replace(parts.schedule, stop=1)), quiet=True)
    train(parts, resume=True, quiet=True)
    expected, resumed = (state(Path(config.output) / "checkpoints/step-0000003") for config in (whole, parts))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], x) for name, x in expected.items())


def test_a_perceptual_loss_compares_features_of_given_weights(make_stage: MakeStage, tmp_path: Path) -> None:
    encoder = {
        "name": "vit", "feature_dim": 16, "layers": 1, "heads": 2, "stem": [8, 16],
        "pixels": {"height": 16, "width": 16},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="'vit' has random weights; expected `pretrained`"):
        make_stage({**RECONSTRUCTION, "perceptual": encoder})
    given = make_stage({**RECONSTRUCTION, "perceptual": {**encoder, "pretrained": "none/given"}})
    spec = given.objective.config.perceptual  # type: ignore[union-attr]
    spec.config.pretrained = None
    module = ModelBuilder(default_plugins())(spec)
    write_weights(tmp_path, module.state_dict().items())
    config = make_stage({**RECONSTRUCTION, "perceptual": {**encoder, "pretrained": str(tmp_path)}})
    assert config.model is not None
    model = ModelAssembly.from_config(config.model).model.eval()
    objective: Any = build_objective(config.objective, model, default_plugins(), "cpu").eval()
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    losses = objective.losses(model, {"pixels": pixels}, step=0).terms

    x = pixels / 127.5 - 1
    made = model.get_submodule("generation.tokenizer").reconstruct(x).pixels
    module.eval()
    features = [
        F.normalize(
            module(F.interpolate((y + 1) / 2, (16, 16), mode="bicubic", antialias=True) * 2 - 1), dim=-1
        )
        for y in (made, x)
    ]
    expected = (2 - 2 * (features[0] * features[1]).sum(-1)).mean()  # of unit vectors
    torch.testing.assert_close(losses["perceptual"], expected, atol=1e-5, rtol=1e-4)
    losses["perceptual"].backward()
    decoder = model.get_submodule("generation.tokenizer.decoder")
    assert any(p.grad is not None and p.grad.any() for p in decoder.parameters())
    assert not [*objective.parameters()]  # the encoder is not saved
    assert all(p.grad is None for p in objective.perceptual[0].parameters())

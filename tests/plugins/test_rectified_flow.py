"""JanusFlow's path: its losses against plain PyTorch, and sampling against a plain Euler loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from janus_modular import ConfigError, PromptError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.batch import Batch, collate
from janus_modular.model.session import TorchRuntime
from janus_modular.plugins import Plugins
from janus_modular.sequence import ImageTarget, Message, Sample, Text
from janus_plugins.generation.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from janus_plugins.samplers.rectified_flow import FlowSettings, draw


def assemble(plugins: Plugins, *overrides: str) -> ModelAssembly:
    torch.manual_seed(0)
    return ModelAssembly.from_config(resolve(load("tiny_flow", overrides, plugins), ModelConfig, plugins))


@pytest.fixture
def assembly(plugins: Plugins) -> ModelAssembly:
    return assemble(plugins)


def batch_of(assembly: ModelAssembly, *texts: str, seed: int = 3) -> Batch:
    pixels = np.random.default_rng(0).integers(0, 256, (len(texts), 32, 32, 3), dtype=np.uint8)
    sequences = []
    for text, image in zip(texts, pixels, strict=True):
        turns = [Message("user", [Text(text)]), Message("assistant", [ImageTarget(Image.fromarray(image))])]
        sequences.append(assembly.processor.sequence(Sample(turns)))
        sequences[-1].seed = seed
    return collate(sequences)


def test_losses_are_those_of_plain_pytorch(assembly: ModelAssembly) -> None:
    model, path = assembly.model, assembly.model.generation
    assert isinstance(path, RectifiedFlow)
    batch = batch_of(assembly, "a cat", "two dogs in snow")
    assert batch.generation_mask.sum(1).tolist() == [17, 17]  # the time, and 4 x 4 patches
    rngs = [np.random.default_rng(seed) for seed in batch.image_seeds]
    noise = torch.from_numpy(np.stack([rng.standard_normal(path.shape, np.float32) for rng in rngs]))
    time = torch.tensor([rng.normal() for rng in rngs], dtype=torch.float32).sigmoid()
    with torch.no_grad():
        output = model(batch)
        pixels = batch.generation_pixels
        assert pixels is not None
        encoded = path.autoencoder.encode(pixels / 127.5 - 1)
        mixture = time[:, None, None, None] * encoded + (1 - time[:, None, None, None]) * noise
        skip, embedded = path.encoder(mixture, time)
        x = model.backbone.embed(batch.tokens)
        patches = path.adaptor.layers(skip.flatten(2).transpose(1, 2))
        x[batch.generation_mask] = torch.cat([embedded[:, None], patches], dim=1).flatten(0, 1)
        states = model.backbone.body(inputs_embeds=x, output_hidden_states=True)
        hidden = states[0][batch.generation_mask].view(2, 17, -1)[:, 1:]
        features = path.decoder_adaptor(path.decoder_norm(hidden)).transpose(1, 2).unflatten(2, (4, 4))
        velocity = path.decoder(features, skip, embedded)
        projected = path.aligner(states.hidden_states[1][batch.generation_mask].view(2, 17, -1)[:, 1:])
        clean = model.understanding.encoder(pixels / 127.5 - 1)
    expected = ((velocity - (encoded - noise)) ** 2).mean((1, 2, 3))
    loss = output.losses["image"].view(2, 17)
    torch.testing.assert_close(loss, expected[:, None].expand(2, 17))
    cosine = (F.normalize(projected, dim=-1) * F.normalize(clean, dim=-1)).sum(-1)
    torch.testing.assert_close(output.losses["align"].view(2, 17)[:, 1:], -0.5 * cosine)
    assert not output.losses["align"].view(2, 17)[:, 0].any()


def test_only_the_autoencoder_and_the_encoder_get_no_gradient(assembly: ModelAssembly) -> None:
    output = assembly.model(batch_of(assembly, "a cat"))
    torch.stack([loss.sum() for loss in output.losses.values()]).sum().backward()
    without = {name for name, weight in assembly.model.named_parameters() if weight.grad is None}
    prefixes = ("understanding.", "generation.autoencoder.")
    assert without == {name for name, _ in assembly.model.named_parameters() if name.startswith(prefixes)}


def test_noise_and_time_are_the_samples_own(assembly: ModelAssembly) -> None:
    path = assembly.model.generation
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    together = path.targets(pixels, [np.random.default_rng(5), np.random.default_rng(6)])
    alone = path.targets(pixels[1:], [np.random.default_rng(6)])
    assert torch.equal(together.noise[1:], alone.noise)
    assert torch.equal(together.time[1:], alone.time)
    assert not torch.equal(together.noise[0], together.noise[1])


def test_times_are_logit_normal(plugins: Plugins) -> None:
    path = assemble(plugins, "generation.time_mean=-0.5", "generation.time_std=2").model.generation
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(4000, -1, -1, -1)
    path.encode_image = lambda pixels: torch.zeros(len(pixels), *path.shape)
    time = path.targets(pixels, [np.random.default_rng(i) for i in range(4000)]).time
    logits = torch.logit(time.double())
    assert abs(float(logits.mean()) + 0.5) < 0.13  # four standard errors: 4 * 2 / sqrt(4000)
    assert abs(float(logits.std()) - 2) < 0.09  # 4 * 2 / sqrt(8000)


def hide_all_but_first(x: Tensor, length: int) -> Tensor:
    """Return the mask (1, 1, T, T), added to scores, of a row that sees a prompt's first position alone."""
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    seen[:, 1:length] = False
    return torch.where(seen, 0.0, float("-inf"))[None, None]


@torch.no_grad()
def euler(assembly: ModelAssembly, texts: list[str], noise: Tensor, steps: int, guidance: float) -> Tensor:
    """Follow the velocity with a whole forward pass a step and row, without a cache."""
    model: Any = assembly.model
    path = model.generation
    images = []
    for text, z in zip(texts, noise, strict=True):
        condition = assembly.processor.draw_prompt(text)
        dropped = np.full_like(condition.tokens, assembly.processor.pad_id)
        dropped[0], dropped[-1] = condition.tokens[0], condition.tokens[-1]
        z = z[None]
        for k in range(steps):
            time = torch.tensor([k / steps])
            skip, embedded = path.encoder(z, time)
            velocities = []
            for tokens in (condition.tokens, dropped):
                x = model.backbone.embed(torch.from_numpy(tokens)[None])
                x = torch.cat([x, path.embeddings(skip, embedded)], dim=1)
                mask = None if tokens is condition.tokens else hide_all_but_first(x, len(tokens))
                hidden = model.backbone.body(inputs_embeds=x, attention_mask=mask)[0]
                velocities.append(path.velocity(hidden[:, -path.num_tokens :], skip, embedded))
            conditional, unconditional = velocities
            z = z + (guidance * conditional - (guidance - 1) * unconditional) / steps
        images.append(z)
    return torch.cat(images)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drawing_is_the_plain_loop(assembly: ModelAssembly, guidance: float) -> None:
    assembly.model.eval()
    texts, settings = ["a cat", "two dogs in snow"], FlowSettings(guidance=guidance, steps=5, seed=7)
    runtime = TorchRuntime(assembly.model, pad=assembly.processor.pad_id)
    prompts = [assembly.processor.draw_prompt(text) for text in texts]
    session = runtime.open(max(map(len, prompts)) + assembly.model.generation.num_tokens)
    steps = draw(session, prompts, settings)
    progress = []
    try:
        while True:
            progress.append(next(steps))
    except StopIteration as end:
        drawn = end.value
    assert progress == [(k, 5) for k in range(1, 6)]
    noise = [np.random.default_rng((7, i)).standard_normal((4, 8, 8), np.float32) for i in range(2)]
    expected = euler(assembly, texts, torch.from_numpy(np.stack(noise)), 5, guidance)
    # float32 sums in another order, 5 times over
    np.testing.assert_allclose(drawn.encoded, expected, atol=1e-5 * float(expected.abs().max()))
    with torch.no_grad():
        pixels = assembly.model.generation.decode_image(torch.from_numpy(drawn.encoded)).numpy()
    assert np.array_equal(drawn.images, pixels)


def test_training_drops_conditions_as_sampling_does(assembly: ModelAssembly) -> None:
    """A dropped condition is hidden, also in a row that holds another sequence."""
    model: Any = assembly.model.eval()
    turns = [
        Message("user", [Text("two dogs in snow")]),
        Message("assistant", [ImageTarget(Image.new("RGB", (32, 32), "red"))]),
    ]
    whole = assembly.processor.sequence(Sample(turns))
    dropped = assembly.processor.sequence(Sample(turns), condition_dropout=True)
    start = int(whole.generation_mask.argmax())
    assert dropped.hidden is not None
    assert np.array_equal(np.flatnonzero(dropped.hidden), np.arange(1, start))
    batch = collate([[whole, dropped]])
    with torch.no_grad():
        x = model.embed(batch)
        hidden, _ = model.hidden(x, batch)
        alone = x[:, len(whole) :]
        expected = model.backbone.body(inputs_embeds=alone, attention_mask=hide_all_but_first(alone, start))[
            0
        ]
        pads_seen = model.backbone.body(inputs_embeds=alone)[0]
    after = slice(len(whole) + start, None)
    torch.testing.assert_close(hidden[:, after], expected[:, start:])
    assert not torch.allclose(hidden[:, after], pads_seen[:, start:], atol=1e-3)


def test_a_backbone_that_cannot_hide_is_named(plugins: Plugins) -> None:
    overrides = ["backbone.config.model_type=mistral", "backbone.config.sliding_window=8"]
    assembly = assemble(plugins, *overrides)
    turns = [Message("user", [Text("a")]), Message("assistant", [ImageTarget(Image.new("RGB", (32, 32)))])]
    batch = collate([assembly.processor.sequence(Sample(turns), condition_dropout=True)])
    with pytest.raises(PromptError, match="HfBackbone, as configured, cannot hide positions"):
        assembly.model(batch)


def test_pads_are_seen_where_the_config_says_so(plugins: Plugins) -> None:
    assembly = assemble(plugins, "generation.hidden_condition=false")
    turns = [Message("user", [Text("a")]), Message("assistant", [ImageTarget(Image.new("RGB", (32, 32)))])]
    assert assembly.processor.sequence(Sample(turns), condition_dropout=True).hidden is None
    assert assembly.model.generation.sizes["hidden_condition"] is False


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generation.align_layer=3"], "found align_layer 3; expected 1 to 2"),
        (["generation.align_dim=16"], r"\(32, 32, 16, 32\); expected \(32, 32, 16, 16\)"),
        (["understanding.encoder.pixels.height=64"], r"\(64, 32, 32, 32\); expected \(32, 32, 16, 32\)"),
        (["generation.patch_size=3"], "as 8x8; expected a multiple of patch_size 3"),
        (["generation.channels=33"], "channels: 33; expected an even number"),
        (["generation.adaptor.begin=true"], "makes 17 positions of 4x4 patches"),
        (["generation.height=30"], "autoencoder-kl: 30x32 is no multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit(plugins: Plugins, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assemble(plugins, *overrides)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: found 0; expected a whole number from 1"),
        ({"steps": 2.5}, r"steps: found 2\.5"),
        ({"guidance": float("nan")}, "guidance: found nan"),
        ({"seed": -1}, "seed: found -1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        FlowSettings(**settings)


def test_the_config_has_defaults_of_janusflow() -> None:
    config = RectifiedFlowConfig()
    assert (config.channels, config.patch_size, config.encoder_blocks, config.decoder_blocks) == (
        768,
        2,
        2,
        2,
    )
    assert (FlowSettings().guidance, FlowSettings().steps) == (2.0, 30)

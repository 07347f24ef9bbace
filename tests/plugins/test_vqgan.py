"""VQGAN against transformers' Chameleon, which is one without a decoder, and the published names."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import ChameleonVQVAE
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

from janus_modular import CheckpointError
from janus_plugins.image_tokenizers.vqgan import VqganConfig, VqganTokenizer

Published = Callable[..., dict[str, Tensor]]


def tiny(**options: object) -> VqganTokenizer:
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "channels": 8,
        "channel_multipliers": [1, 2, 4],
        "residual_blocks": 1,
        "latent_channels": 12,
        "num_codes": 32,
        "code_dim": 4,
    }
    tokenizer = VqganTokenizer(VqganConfig(**{**sizes, **options})).eval()  # type: ignore[arg-type]
    tokenizer.quantize.embedding.weight.data.normal_(std=0.3)  # of the latents' size: many codes are in use
    return tokenizer


def load(tokenizer: VqganTokenizer, weights: dict[str, Tensor]) -> None:
    tokenizer.load_state_dict(dict(tokenizer.read_pretrained(weights)))


@torch.inference_mode()
@pytest.mark.parametrize("prefix", ["", "model.vqmodel."])
def test_encodes_as_chameleon_in_transformers(prefix: str, taming_weights: Published) -> None:
    torch.manual_seed(0)
    config = ChameleonVQVAEConfig(
        base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1, latent_channels=32,
        num_embeddings=64, embed_dim=4,
    )  # fmt: skip
    theirs = ChameleonVQVAE(config).eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.1)
    options = {"channels": 32, "channel_multipliers": [1, 2], "latent_channels": 32, "num_codes": 64}
    ours = tiny(attention=False, **options)
    decoder = {
        name: weight
        for name, weight in taming_weights(ours, attention=False).items()
        if name.startswith("dec")
    }
    load(ours, {f"{prefix}{name}": weight for name, weight in {**decoder, **theirs.state_dict()}.items()})
    pixels = torch.rand(2, 3, 12, 20) * 2 - 1

    encoded = theirs.encode(pixels)

    torch.testing.assert_close(ours.encoder(pixels), encoded.last_hidden_state, atol=1e-5, rtol=1e-4)
    codes = ours.encode(pixels)
    assert torch.equal(codes.flatten(), encoded.image_tokens)
    assert len(codes.unique()) > 4  # not one code for all
    assert torch.equal(ours.codebook_embeddings(), theirs.quantize.embedding.weight)


def test_chameleons_sizes_are_those_of_transformers() -> None:
    with torch.device("meta"):
        ours = VqganTokenizer(VqganConfig(num_codes=8192, attention=False))
        theirs = ChameleonVQVAE(ChameleonVQVAEConfig())
    count = sum(weight.numel() for name, weight in ours.named_parameters() if not name.startswith("decoder."))
    assert count == sum(weight.numel() for weight in theirs.parameters())
    assert (ours.grid(512, 512), ours.code_dim) == ((32, 32), 256)


def test_latent_diffusions_vq_f4_has_the_published_numbers_of_parameters() -> None:
    sizes = {"channel_multipliers": [1, 2, 4], "latent_channels": 3, "code_dim": 3, "num_codes": 8192}
    with torch.device("meta"):
        tokenizer = VqganTokenizer(VqganConfig(attention=False, **sizes))  # type: ignore[arg-type]
    counts = {name: sum(w.numel() for w in part.parameters()) for name, part in tokenizer.named_children()}
    assert round(counts["encoder"] / 1e6, 1) == 22.3
    assert round(counts["decoder"] / 1e6, 1) == 33.0
    assert round(counts["quantize"] / 1e3, 1) == 24.6
    assert counts["quant_conv"] == counts["post_quant_conv"] == 12
    assert tokenizer.factor == 4


@pytest.mark.parametrize("attention", [True, False])
def test_the_published_names_are_all_there_is(attention: bool, taming_weights: Published) -> None:
    source, target = tiny(attention=attention), tiny(attention=attention)
    weights = taming_weights(source, attention)
    for weight in weights.values():
        nn.init.normal_(weight)
    losses = {
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1),
    }

    load(target, {f"state_dict.{name}": weight for name, weight in (weights | losses).items()})

    torch.testing.assert_close(target.state_dict(), source.state_dict())


def test_a_transformers_tokenizer_of_conditions_is_not_taken_for_the_images(
    taming_weights: Published,
) -> None:
    source = tiny()
    weights = taming_weights(source)
    offered = {f"cond_stage_model.{name}": torch.zeros_like(weight) for name, weight in weights.items()}
    offered |= {f"first_stage_model.{name}": weight for name, weight in weights.items()}
    target = tiny()
    for weight in target.parameters():
        nn.init.zeros_(weight)

    load(target, offered)

    torch.testing.assert_close(target.state_dict(), source.state_dict())


def test_weights_without_a_codebook_or_a_decoder_are_errors_with_a_hint(
    taming_weights: Published,
) -> None:
    tokenizer = tiny()
    weights = taming_weights(tokenizer)
    with pytest.raises(CheckpointError, match="no codebook"):
        load(tokenizer, {"quantize.embed.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no decoder.*vqgan\.ckpt"):
        load(tokenizer, {name: weight for name, weight in weights.items() if "decoder" not in name})


@torch.inference_mode()
@pytest.mark.parametrize("size", [(8, 8), (8, 20), (24, 4)])
def test_any_multiple_of_the_factor_goes_round(size: tuple[int, int]) -> None:
    tokenizer = tiny()
    pixels = torch.rand(2, 3, *size) * 2 - 1

    codes = tokenizer.encode(pixels)

    assert codes.shape == (2, math.prod(tokenizer.grid(*size)))
    assert tokenizer.decode(codes, height=size[0], width=size[1]).shape == pixels.shape
    distances = torch.cdist(tokenizer.latents(pixels), tokenizer.codebook_embeddings().expand(2, -1, -1))
    assert torch.equal(codes, distances.argmin(-1))  # nearest as they are, not at unit length


def test_losses_are_the_published_ones() -> None:
    tokenizer = tiny()
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    codes = tokenizer.encode(pixels)
    decoded = tokenizer.decode(codes, height=8, width=12)

    losses = tokenizer.losses(pixels)

    distance = (tokenizer.codebook_embeddings()[codes] - tokenizer.latents(pixels)).square().mean()
    torch.testing.assert_close(losses["pixels"], (decoded - pixels).abs().mean())
    torch.testing.assert_close(losses["codebook"] + losses["commitment"], 1.25 * distance)
    torch.testing.assert_close(losses["codebook"], 0.25 * distance)


def test_a_few_steps_on_its_losses_paint_an_image_better(taught: Callable[..., list[float]]) -> None:
    tokenizer = tiny()
    history = taught(tokenizer)
    assert history[-1] < 0.6 * history[0]

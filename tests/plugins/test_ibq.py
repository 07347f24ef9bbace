"""IBQ against its formulas written out, its published sizes and names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from janus_modular import CheckpointError
from janus_modular.weights.files import Weights
from janus_modular.weights.loading import load_weights
from janus_plugins.image_tokenizers.ibq import IbqCodebook, IbqConfig, IbqTokenizer

Published = Callable[..., dict[str, Tensor]]


def tiny(**options: object) -> IbqTokenizer:
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "channels": 8,
        "channel_multipliers": [1, 2, 4],
        "residual_blocks": 1,
        "latent_channels": 12,
        "num_codes": 32,
        "code_dim": 4,
    }
    return IbqTokenizer(IbqConfig(**{**sizes, **options})).eval()  # type: ignore[arg-type]


def load(tokenizer: IbqTokenizer, weights: dict[str, Tensor]) -> Weights:
    """Read weights as the checkpoint module does; what was read can be told afterwards."""
    offered = Weights(None, {name: lambda one=one: one for name, one in weights.items()})  # type: ignore[arg-type]
    tokenizer.load_state_dict(dict(tokenizer.read_pretrained(offered)))
    return offered


def test_emu3_5_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        tokenizer = IbqTokenizer(IbqConfig(channels=256, num_codes=131072))
    assert round(sum(weight.numel() for weight in tokenizer.parameters()) / 1e6) == 455


def test_codes_are_those_of_the_largest_product_whatever_their_length() -> None:
    tokenizer = tiny()
    tokenizer.quantize.embedding.weight.data *= torch.rand(32, 1) * 9 + 1
    pixels = torch.rand(2, 3, 8, 20) * 2 - 1

    codes = tokenizer.encode(pixels)

    products = torch.einsum("npc,kc->npk", tokenizer.latents(pixels), tokenizer.quantize.embedding.weight)
    assert torch.equal(codes, products.argmax(-1))
    assert len(codes.unique()) > 1
    assert tokenizer.decode(codes, height=8, width=20).shape == pixels.shape


def test_choosing_equals_the_papers_one_hot_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    codebook = IbqCodebook(16, 4)
    latents = torch.randn(2, 5, 4, requires_grad=True)
    fixed_weights = torch.randn(2, 5, 4)

    scores = codebook.scores(latents)
    passed, chosen = codebook.select(scores)
    found = torch.autograd.grad((passed * fixed_weights).sum(), [latents, codebook.embedding.weight])

    # a one-hot whose gradient is the softmax's, times the codebook
    rows = codebook.embedding.weight
    choice = (latents @ rows.T).softmax(-1)
    hard = nn.functional.one_hot(choice.argmax(-1), 16).float()
    literal = (hard - choice.detach() + choice) @ rows
    wanted = torch.autograd.grad((literal * fixed_weights).sum(), [latents, rows])

    torch.testing.assert_close(passed, literal)
    torch.testing.assert_close(chosen, hard @ rows)
    torch.testing.assert_close(found, wanted)
    assert (found[1].abs().sum(-1) > 0).all()  # every code learns, chosen or not


def test_losses_are_the_papers() -> None:
    tokenizer = tiny()
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    latents, codes = tokenizer.latents(pixels), tokenizer.encode(pixels)
    distance = (tokenizer.codebook_embeddings()[codes] - latents).square().mean()
    decoded = tokenizer.decode(codes, height=8, width=12)

    losses = tokenizer.losses(pixels)

    torch.testing.assert_close(losses["pixels"], (decoded - pixels).abs().mean())
    double = losses["index"] + losses["commitment"] + losses["codebook"]
    torch.testing.assert_close(double, 2.25 * distance)
    p = ((latents @ tokenizer.codebook_embeddings().T).flatten(0, 1) / 0.01).softmax(-1)
    unsure, even = torch.special.entr(p).sum(-1).mean(), torch.special.entr(p.mean(0)).sum()
    # the published logarithm adds 1e-5 to its argument: at most 32 codes times that
    torch.testing.assert_close(losses["entropy"], 0.05 * (unsure - even), atol=0.05 * 32e-5, rtol=0)
    assert "entropy" not in tiny(entropy=0.0).losses(pixels)


def test_a_few_steps_on_its_losses_paint_an_image_better(taught: Callable[..., list[float]]) -> None:
    tokenizer = tiny()
    history = taught(tokenizer)
    assert history[-1] < 0.6 * history[0]


@pytest.mark.parametrize("averaged", [True, False])
def test_reads_the_published_names_and_averages_first(averaged: bool, taming_weights: Published) -> None:
    source, target = tiny(), tiny()
    weights = taming_weights(source)
    for weight in weights.values():
        nn.init.normal_(weight)
    offered = {f"state_dict.{name}": weight for name, weight in weights.items()}
    if averaged:
        offered = {name: torch.zeros_like(weight) for name, weight in offered.items()}
        offered |= {
            f"state_dict.model_ema.{name.replace('.', '')}": weight for name, weight in weights.items()
        }
        offered["state_dict.model_ema.decay"] = torch.tensor(0.999)
        offered["state_dict.model_ema.lossdiscriminatormain0weight"] = torch.zeros(1)
    offered["state_dict.loss.discriminator.main.0.weight"] = torch.zeros(1)
    offered["callbacks.best_model_score"] = torch.zeros(())

    read = load(target, offered)

    torch.testing.assert_close(target.state_dict(), source.state_dict())
    assert read.unexpected_keys() == ["callbacks.best_model_score"]


def test_averages_and_weights_as_trained_are_not_mixed(taming_weights: Published) -> None:
    weights = taming_weights(tiny())
    averages = {f"model_ema.{name.replace('.', '')}": weight for name, weight in weights.items()}
    del averages["model_ema.quant_convweight"]
    target = tiny()
    with pytest.raises(CheckpointError, match=r"1 missing:\n +quant_conv\.weight"):
        load_weights(target, target.read_pretrained(weights | averages)).check("the file")

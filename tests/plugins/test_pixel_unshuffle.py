"""``pixel-unshuffle``, against InternVL's and Idefics3's connectors in transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Idefics3Config, InternVLConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

from janus_modular import CheckpointError
from janus_modular.interfaces import ComponentSpec
from janus_modular.weights.pretrained import PretrainedReport, load_pretrained
from janus_plugins.adaptors.pixel_unshuffle import PixelUnshuffleAdaptor, PixelUnshuffleConfig

C, D, GRID = 6, 16, (4, 8)  # not square: rows and columns cannot be taken for each other


def features() -> Tensor:
    return torch.randn(2, GRID[0] * GRID[1], C, generator=torch.Generator().manual_seed(1))


def read(
    config: PixelUnshuffleConfig, weights: dict[str, Tensor], folder: Path
) -> tuple[PixelUnshuffleAdaptor, PretrainedReport]:
    save_file(weights, folder / "model.safetensors")
    config.pretrained = str(folder)
    adaptor = PixelUnshuffleAdaptor(config, C, D)
    return adaptor, load_pretrained(adaptor, ComponentSpec("adaptors", "pixel-unshuffle", config))


def internvl() -> tuple[InternVLMultiModalProjector, Tensor]:
    """transformers' projector with random weights, and what it makes of `features`."""
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config={"hidden_size": C, "num_attention_heads": 2, "num_hidden_layers": 1},
        text_config={"model_type": "llama", "hidden_size": D, "num_attention_heads": 2},
    )
    theirs = InternVLMultiModalProjector(config)
    torch.nn.init.normal_(theirs.layer_norm.weight)
    torch.nn.init.normal_(theirs.layer_norm.bias)
    shuffled = InternVLModel.pixel_shuffle(None, features().unflatten(1, GRID), 0.5)  # type: ignore[arg-type]
    return theirs, theirs(shuffled.flatten(1, 2))


@pytest.mark.parametrize(
    "names",
    [
        ("mlp1.0", "mlp1.1", "mlp1.3"),
        tuple(f"model.multi_modal_projector.{one}" for one in ("layer_norm", "linear_1", "linear_2")),
    ],
    ids=["published", "transformers"],
)
@torch.no_grad()
def test_it_reads_internvl_and_computes_what_transformers_does(names: tuple[str, ...], tmp_path: Path):
    theirs, wanted = internvl()
    modules = dict(zip(("layer_norm", "linear_1", "linear_2"), names, strict=True))
    weights = {
        f"{modules[name.split('.')[0]]}.{name.split('.')[1]}": x for name, x in theirs.state_dict().items()
    }
    weights["language_model.norm.weight"] = torch.ones(3)

    adaptor, report = read(PixelUnshuffleConfig(), weights, tmp_path)

    assert (report.loaded, report.unexpected_keys) == (6, ["language_model.norm.weight"])
    torch.testing.assert_close(adaptor(features(), GRID), wanted)


@torch.no_grad()
def test_it_reads_idefics3_and_computes_what_transformers_does(tmp_path: Path):
    torch.manual_seed(0)
    config = Idefics3Config(
        vision_config={"hidden_size": C, "num_attention_heads": 2},
        text_config={"model_type": "llama", "hidden_size": D, "num_attention_heads": 2},
        scale_factor=2,
    )
    theirs = Idefics3Connector(config)
    weights = {f"model.connector.{name}": x for name, x in theirs.state_dict().items()}
    square = torch.randn(2, 16, C)  # it takes no others

    adaptor, _ = read(PixelUnshuffleConfig(norm=False, depth=1, bias=False), weights, tmp_path)

    torch.testing.assert_close(adaptor(square, (4, 4)), theirs(square))


def test_a_connector_without_the_norm_does_not_pass_for_one_with(tmp_path: Path):
    weights = {
        "multi_modal_projector.linear_1.weight": torch.zeros(D, 4 * C),  # LLaVA's names
        "multi_modal_projector.linear_1.bias": torch.zeros(D),
        "multi_modal_projector.linear_2.weight": torch.zeros(D, D),
        "multi_modal_projector.linear_2.bias": torch.zeros(D),
    }
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        read(PixelUnshuffleConfig(), weights, tmp_path)


def test_each_token_is_made_of_one_square_and_squares_keep_their_order():
    adaptor = PixelUnshuffleAdaptor(PixelUnshuffleConfig(factor=2), C, D)
    x = features()
    before = adaptor(x, GRID)
    x[:, 1 * 8 + 5] += 1  # row 1, column 5: in the square of row 0, column 2
    changed = (adaptor(x, GRID) != before).any(-1)

    assert before.shape == (2, adaptor.num_tokens(GRID), D) == (2, 8, D)
    assert changed.nonzero()[:, 1].tolist() == [2, 2]


def test_a_grid_that_does_not_divide_is_refused_with_both_numbers():
    adaptor = PixelUnshuffleAdaptor(PixelUnshuffleConfig(factor=3), C, D)
    for ask in (adaptor.num_tokens, lambda grid: adaptor(torch.zeros(1, 24, C), grid)):
        with pytest.raises(ValueError, match=r"a grid of 6x4 .* does not divide by its factor 3"):
            ask((6, 4))


@pytest.mark.parametrize(("width", "count"), [(6144, 116_429_824), (7168, 143_170_560)])
def test_published_sizes_have_the_published_numbers_of_parameters(width: int, count: int):
    """InternVL 1.5 over InternLM2-20B, and over a 34 B model: its model card says 116.43 M and 143.17 M."""
    with torch.device("meta"):
        adaptor = PixelUnshuffleAdaptor(PixelUnshuffleConfig(), 3200, width)
    assert sum(weight.numel() for weight in adaptor.parameters()) == count


@pytest.mark.parametrize("wrong", [{"factor": 0}, {"depth": 0}])
def test_sizes_of_nothing_are_refused(wrong: dict[str, int]):
    with pytest.raises(ValueError, match="at least 1"):
        PixelUnshuffleConfig(**wrong)


@pytest.mark.parametrize(
    ("option", "named"),
    [({"norm": False}, "norm.bias"), ({"depth": 1}, "layers.2.bias"), ({"bias": False}, "layers.0.bias")],
    ids=str,
)
def test_weights_of_another_function_are_refused(option: dict[str, Any], named: str, tmp_path: Path):
    theirs, _ = internvl()
    weights = {f"model.multi_modal_projector.{name}": x for name, x in theirs.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"unexpected:\n +{re.escape(named)}"):
        read(PixelUnshuffleConfig(**option), weights, tmp_path)


def test_what_the_connector_holds_besides_is_refused_by_its_name(tmp_path: Path):
    theirs, _ = internvl()
    weights = {f"model.multi_modal_projector.{name}": x for name, x in theirs.state_dict().items()}
    weights["model.multi_modal_projector.gate"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"1 unexpected:\n +model\.multi_modal_projector\.gate"):
        read(PixelUnshuffleConfig(), weights, tmp_path)

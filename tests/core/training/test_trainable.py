from __future__ import annotations

from io import StringIO
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from janus_modular import ConfigError, TrainingError
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.build import build_model
from janus_modular.model.model import JanusModel
from janus_modular.plugins import default_plugins
from janus_modular.training.dry_run import dry_run
from janus_modular.training.train import train
from janus_modular.training.trainable import parameter_counts, set_trainable, trainable_table

STAGE_1 = ["understanding.adaptor", "generation.embedding", "generation.adaptor", "generation.head"]
STAGES = {1: STAGE_1, 2: [*STAGE_1, "backbone"], 3: ["understanding", *STAGE_1[1:], "backbone"]}


def linear(*widths: int) -> int:
    """Parameters of a row of linear layers with biases."""
    return sum(a * b + b for a, b in pairwise(widths))


def trainable(model: JanusModel) -> dict[str, int]:
    return {one.path: one.trainable for one in parameter_counts(model)}


@pytest.fixture
def model() -> JanusModel:
    return build_model(resolve(load("tiny"), ModelConfig), on_meta=True)


@pytest.mark.parametrize(
    ("name", "width", "millions"), [("janus_pro_1b", 2048, 48.28), ("janus_pro_7b", 4096, 121.70)]
)
def test_stage_1_trains_as_many_parameters_as_the_papers_state(
    name: str, width: int, millions: float
) -> None:
    model = build_model(resolve(load(name), ModelConfig), on_meta=True)
    set_trainable(model, STAGE_1)
    counts = trainable(model)
    assert counts["understanding.adaptor"] == linear(1024, width, width)
    assert counts["generation.adaptor"] == linear(8, width, width)
    assert counts["generation.head"] == linear(width, width, 16384)
    assert counts["generation.embedding"] == 16384 * 8 == 131_072
    assert sum(counts.values()) - 131_072 == pytest.approx(
        millions * 1e6, abs=0.005e6
    )  # two digits, in the spec


def test_later_stages_add_the_language_model_and_the_encoder() -> None:
    model = build_model(resolve(load("janus_pro_1b"), ModelConfig), on_meta=True)
    set_trainable(model, STAGES[2])
    counts = trainable(model)
    assert counts["understanding.encoder"] == counts["generation.tokenizer"] == 0
    assert counts["backbone"] == pytest.approx(1652.656e6, abs=0.001e6)
    set_trainable(model, STAGES[3])
    counts = trainable(model)
    assert counts["understanding.encoder"] == pytest.approx(303.689e6, abs=0.001e6)
    assert counts["generation.tokenizer"] == 0


def test_frozen_modules_are_in_eval_mode(model: JanusModel) -> None:
    model.train()
    set_trainable(model, ["generation.head", "backbone.model.model.layers.1"])
    training = {name for name, module in model.named_modules() if module.training}
    assert training
    assert all(name.startswith(("generation.head", "backbone.model.model.layers.1")) for name in training)


def test_a_star_matches_one_name(model: JanusModel) -> None:
    set_trainable(model, ["backbone.model.model.layers.*.mlp", "*.adaptor"])
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    prefixes = {
        name.rpartition(".layers.")[0] if "adaptor" in name else name.rpartition(".mlp")[0]
        for name in learned
    }
    layers = {f"backbone.model.model.layers.{i}" for i in range(2)}
    assert prefixes == layers | {"understanding.adaptor", "generation.adaptor"}


def test_the_image_tokenizer_stays_frozen(model: JanusModel) -> None:
    set_trainable(model, ["generation"])
    assert not any(p.requires_grad for p in model.generation.tokenizer.parameters())
    assert not model.generation.tokenizer.training
    assert all(p.requires_grad for p in model.generation.head.parameters())


def test_tied_weights_are_trained_together(model: JanusModel) -> None:
    set_trainable(model, ["backbone.model.lm_head"])
    assert model.backbone.model.model.embed_tokens.weight.requires_grad


def test_every_invalid_pattern_is_reported(model: JanusModel) -> None:
    with pytest.raises(ConfigError) as error:
        set_trainable(
            model, ["generation.adapter", "understanden", "backbone", "generation.tokenizer.encoder"]
        )
    message = str(error.value)
    assert "'generation.adapter' matches nothing. generation holds:" in message
    assert "Did you mean 'adaptor'?" in message
    assert "'understanden' matches nothing. The model holds: understanding, generation, backbone." in message
    assert "generation.tokenizer.encoder, which is trained separately" in message


def test_the_table_shows_trainable_and_frozen_parameters(model: JanusModel) -> None:
    set_trainable(model, STAGE_1)
    console = Console(width=80, file=StringIO())
    console.print(trainable_table(model))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("generation.tokenizer" in line and "│         - │" in line for line in lines)
    assert any("all" in line and "M" in line for line in lines)


def test_partially_trainable_components_train_the_rest_only_by_name(
    model: JanusModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["model.model.layers.1.mlp", "model.model.norm.weight"]
    monkeypatch.setattr(type(model.backbone), "trainable_parameters", lambda self: own, raising=False)

    def learned(*patterns: str) -> set[str]:
        set_trainable(model, patterns)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    mlp = {f"backbone.{own[0]}.{one}_proj.weight" for one in ("gate", "up", "down")}
    assert learned("backbone") == {*mlp, "backbone.model.model.norm.weight"}
    assert not model.backbone.model.model.layers[0].training
    assert model.backbone.model.model.layers[1].mlp.training
    inside = "backbone.model.model.layers.0.input_layernorm"
    assert learned("backbone", inside) == {*mlp, "backbone.model.model.norm.weight", f"{inside}.weight"}
    assert learned(inside) == {f"{inside}.weight"}  # a part of it by name, the adapters not
    assert "understanding.adaptor.layers.0.weight" in learned("understanding", "backbone")


ONLY = {name: {"read": 0, "draw": 0, "text": 0} | {name: 1} for name in ("read", "draw", "text")}


@pytest.mark.parametrize(
    ("learn", "mixture", "words"),
    [
        (["generation.head"], ONLY["text"], r"\[generation\.head\] learns nothing .*sources: text\)"),
        (["understanding.adaptor"], ONLY["text"], r"none of the first 30 samples \(sources: text\)"),
        (["generation.head", "understanding"], ONLY["text"], "sources: text"),
        (["understanding"], ONLY["draw"], "sources: draw"),
        (["generation.head"], ONLY["read"], "sources: read"),
        (
            ["generation.head"],
            [{"until": 1, **ONLY["text"]}, ONLY["draw"]],
            "from step 0 on: .*first 5 samples",
        ),
        (
            ["generation.head"],
            [{"until": 1, **ONLY["draw"]}, ONLY["text"]],
            "from step 1 on: .*first 25 samples",
        ),
    ],
)
def test_modules_that_no_loss_reaches_are_an_error_before_the_run(
    make: Any, learn: list[str], mixture: Any, words: str
) -> None:
    config = make(learn=learn, mixture=mixture)
    with pytest.raises(ConfigError, match=words):
        dry_run(config, default_plugins(), Console(file=StringIO()))
    with pytest.raises(ConfigError, match=words):
        train(config, quiet=True)


@pytest.mark.parametrize(("batch", "accumulate"), [(5, 5), (1, 1)])
def test_a_step_or_micro_batch_may_reach_nothing_that_is_trained(
    make: Any, metrics: Any, batch: int, accumulate: int
) -> None:
    """Text beside images to draw: the first three of the five samples are of other sources."""
    config = make(learn=["generation.head"], batch=batch, accumulate=accumulate, length="null")
    train(config, quiet=True)
    norms = [line["grad_norm"] for line in metrics(config)]
    assert any(norms)
    assert all(norms) is (batch > 1)


def test_a_run_whose_steps_have_no_gradient_is_an_error(make: Any) -> None:
    """The table of text logits, in a run without text to learn: nothing shows that before the first step."""
    config = make(
        learn=["backbone.model.lm_head"],
        mixture=ONLY["draw"],
        model__backbone__config__tie_word_embeddings=False,
    )
    with pytest.raises(TrainingError, match="after step 5: no loss has reached a trainable parameter"):
        train(config, quiet=True)


@pytest.mark.parametrize(
    ("learn", "mixture", "names"),
    [
        (["backbone", "understanding.adaptor"], ONLY["text"], "understanding.adaptor"),
        (["generation.head", "understanding.adaptor"], ONLY["read"], "generation.head"),
        (
            ["generation.adaptor", "generation.head", "backbone"],
            ONLY["read"],
            "generation.adaptor, generation.head",
        ),
        (["backbone", "understanding.adaptor"], {"read": 1, "draw": 1, "text": 1}, ""),
    ],
)
def test_modules_among_others_that_no_loss_reached_are_warned_of(
    make: Any, caplog: pytest.LogCaptureFixture, learn: list[str], mixture: Any, names: str
) -> None:
    train(make(learn=learn, mixture=mixture), quiet=True)
    warnings = [message for message in caplog.messages if "no loss has reached" in message]
    assert len(warnings) == bool(names)
    assert all(f"({names}" in warning for warning in warnings), warnings

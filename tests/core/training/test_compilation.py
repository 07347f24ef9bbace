"""Compiled blocks: the gradients of uncompiled ones, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from janus_modular import ConfigError
from janus_modular.plugins import default_plugins
from janus_modular.training import compilation
from janus_modular.training.compilation import compile_blocks
from janus_modular.training.initial_model import initial_model
from janus_modular.training.objective import step_losses
from janus_modular.training.parallel import blocks_of, checkpoint_activations
from janus_modular.training.run_setup import batch_builder, open_sources
from janus_modular.training.train import train
from janus_modular.training.trainable import set_trainable

from .conftest import Make, Rank

pytestmark = [  # of what torch itself does when it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

COMPILED = ["backbone", "understanding.encoder"]


@pytest.fixture
def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate as inductor does, without minutes of C++; nothing is traced already."""
    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


@pytest.mark.parametrize(("backend", "recomputed"), [("inductor", []), ("aot_eager", ["backbone"])])
@pytest.mark.slow
def test_gradients_are_those_of_uncompiled_blocks(
    make: Make, monkeypatch: pytest.MonkeyPatch, backend: str, recomputed: list[str]
) -> None:
    """1e-5 of the largest gradient: other kernels sum float32 in another order."""
    monkeypatch.setattr(compilation, "BACKEND", backend)
    config = make(compile=COMPILED, batch=4)
    plugins = default_plugins()
    grads: list[dict[str, Any]] = []
    for components in ([], COMPILED):
        torch.manual_seed(0)
        assembly = initial_model(config, plugins, "cpu")
        model = assembly.model
        set_trainable(model, config.learn)
        compile_blocks(model, components)
        checkpoint_activations(model, recomputed)
        builder = batch_builder(config, open_sources(config, plugins), model, assembly.processor)
        for loss in step_losses(model, builder.build(0), "cpu"):
            loss.value.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    eager, compiled = grads
    assert eager.keys() == compiled.keys()
    for name, grad in eager.items():
        limit = 1e-5 * max(float(grad.abs().max()), 1e-2)
        torch.testing.assert_close(compiled[name], grad, rtol=0, atol=limit, msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("_traced")
def test_a_compiled_run_trains_validates_and_resumes(make: Make, data: Path, metrics: Any) -> None:
    drawn = {"name": "jsonl", "path": str(data / "draw.jsonl"), "task": "draw"}
    validation = {"every": 2, "sources": {"drawn": drawn}, "prompts": ["red"]}
    keys: dict[str, Any] = {"validation": validation, "compile": ["backbone"], "checkpoint_every": 2}
    train(make(**keys, schedule__stop=2), quiet=True)
    train(make(**keys, schedule__stop=4), quiet=True, resume=True)
    compiled = [line["loss"] for line in metrics(make()) if "loss" in line]
    plain = make(schedule__stop=4, output=str(Path(make().output) / "plain"))
    train(plain, quiet=True)
    expected = [line["loss"] for line in metrics(plain) if "loss" in line]
    assert compiled == pytest.approx(expected, rel=1e-4)  # rounding, through four updates


@pytest.mark.slow
@pytest.mark.usefixtures("_traced")
def test_sharded_blocks_are_compiled(make: Make, ranks: Callable[..., list[Rank]], metrics: Any) -> None:
    parallel = {"backbone": "fsdp"}
    config = make(batch=6, parallel=parallel, compile=COMPILED, schedule__steps=2)
    outcomes = ranks(2, lambda rank: str(train(config, quiet=True)), seconds=400)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    plain = make(batch=6, output=str(Path(config.output) / "plain"), schedule__steps=2)
    train(plain, quiet=True)
    losses, expected = ([line["loss"] for line in metrics(c)] for c in (config, plain))
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_block_that_cannot_be_compiled_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    config = make(compile=["backbone"])
    model = initial_model(config, default_plugins(), "cpu").model
    [block, *_] = blocks_of("backbone", model.backbone, "compile")  # type: ignore[arg-type]
    forward = block.forward

    def breaking(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    block.forward = breaking
    compile_blocks(model, ["backbone"])
    x = torch.zeros(1, 2, model.backbone.hidden_size)
    with pytest.raises(Exception, match="graph_break"):
        model.backbone(x, positions=torch.arange(2)[None])


def test_components_without_blocks_cannot_be_compiled(make: Make) -> None:
    model = initial_model(make(), default_plugins(), "meta").model
    for name, message in (
        ("understanding", "compile: found 'understanding', which is no component"),
        ("generation.tokenizer", "compile: found generation.tokenizer; expected a component that is trained"),
    ):
        with pytest.raises(ConfigError, match=message):
            compile_blocks(model, [name])
    assert isinstance(model, nn.Module)

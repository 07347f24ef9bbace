"""The estimate of a step's memory, against every allocation of a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from janus_modular import Plugins
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model import model as model_module
from janus_modular.training.engine import Engine
from janus_modular.training.memory import estimate_memory
from janus_modular.training.objective import step_losses
from janus_modular.training.parallel import checkpoint_activations
from janus_modular.training.run_setup import batch_builder, open_sources
from janus_modular.training.schema import OptimizerConfig
from janus_modular.training.trainable import set_trainable

ALL = ["understanding", "generation", "backbone"]
DECODER = (
    "backbone.config={model_type: llama, hidden_size: 64, intermediate_size: 176, num_hidden_layers: 6, "
)
DECODER += "num_attention_heads: 4, num_key_value_heads: 4, vocab_size: 320, max_position_embeddings: 512}"


def allocated(action: Any) -> int:
    """Return the most bytes that an action allocated beyond those that were there, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_the_profiler_sees_every_allocation() -> None:
    def action() -> None:
        kept = torch.empty(1_000_000)
        for _ in range(3):
            torch.empty(500_000)
        del kept

    assert allocated(action) == pytest.approx(6_000_000, rel=0.01)


@pytest.mark.parametrize(
    ("learn", "recomputed", "dtype", "accumulate"),
    [
        (ALL, [], "float32", 1),
        (ALL, ["backbone"], "float32", 1),
        (ALL, [], "float32", 2),
        (ALL, [], "bfloat16", 1),
        (["generation.head", "generation.adaptor"], [], "float32", 1),
    ],
    ids=["all", "recomputed", "accumulated", "bfloat16", "adaptors"],
)
def test_the_estimate_is_within_a_tenth_of_a_real_step(
    learn: list[str],
    recomputed: list[str],
    dtype: str,
    accumulate: int,
    make: Any,
    plugins: Plugins,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_module, "MAX_LOGITS", 320 * 64)  # several chunks
    config = make(learn=learn, batch=10, length=512, accumulate=accumulate, supervise="all")
    words = ["processor.system=''", DECODER]
    assembly = ModelAssembly.from_config(resolve(load("tiny", words), ModelConfig))
    model = assembly.model
    set_trainable(model, learn)
    step = batch_builder(config, open_sources(config, plugins), model, assembly.processor).build(0)
    half = dtype == "bfloat16"
    memory = estimate_memory(
        model, step.batches, optimizer=config.optimizer, half=half, recomputed=recomputed
    )

    checkpoint_activations(model, recomputed)
    engine = Engine(
        model,
        lambda batch: step_losses(model, batch, "cpu"),
        config.optimizer,
        config.schedule,
        autocast=torch.bfloat16 if half else None,
    )
    engine.step(step)  # makes the optimizer's state
    engine.optimizer.zero_grad()
    states = [x for state in engine.optimizer.state.values() for x in state.values() if x.ndim]
    assert memory.optimizer == sum(x.numel() * x.element_size() for x in states)
    assert memory.parameters == sum(p.numel() * p.element_size() for p in model.parameters())
    measured = allocated(lambda: engine.step(step))
    estimated = memory.total - memory.parameters - memory.optimizer
    assert estimated == pytest.approx(measured, rel=0.1), (estimated / measured, memory)


def test_sharding_divides_blocks_and_recomputing_keeps_their_inputs(built, make, plugins: Plugins) -> None:
    model, processor = built
    config = make()
    set_trainable(model, config.learn)
    step = batch_builder(config, open_sources(config, plugins), model, processor).build(0)
    whole = estimate_memory(model, step.batches)
    blocks = model.backbone.body.layers
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    halves = estimate_memory(model, step.batches, sharded=["backbone"], world=2)
    assert whole.gradients - halves.gradients == 4 * sum(sizes) / 2
    assert whole.optimizer - halves.optimizer == 8 * sum(sizes) / 2
    assert whole.parameters - halves.parameters == 4 * sum(sizes) / 2
    assert halves.communication == 3 * 4 * max(sizes)  # two blocks that are gathered, gradients of one
    assert estimate_memory(model, step.batches, sharded=["backbone"]) == whole  # of one process
    less = estimate_memory(model, step.batches, recomputed=["backbone"])
    assert less.activations < whole.activations
    assert estimate_memory(model, step.batches, half=True).activations < whole.activations
    assert estimate_memory(model).activations == 0


def test_muon_keeps_one_number_where_adamw_keeps_two(built, make) -> None:
    model, _ = built
    set_trainable(model, ["backbone"])
    adamw = estimate_memory(model).optimizer
    muon = estimate_memory(model, optimizer=OptimizerConfig(groups={"backbone": {"name": "muon"}})).optimizer
    layers = [m for m in model.backbone.body.modules() if isinstance(m, torch.nn.Linear)]
    assert adamw - muon == 4 * sum(layer.weight.numel() for layer in layers)

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from janus_modular import ConfigError, TrainingError
from janus_modular.training.engine import Engine, Loss, scalar_losses
from janus_modular.training.loop import fit, run
from janus_modular.training.optimizer import build_optimizer, lr_factor
from janus_modular.training.schema import OptimizerConfig, ScheduleConfig


def repeated(x: Tensor) -> Iterator[Tensor]:
    while True:
        yield x


class Kept:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.lines.append((step, dict(values)))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("quiet", [False, True])
def test_in_a_terminal_a_bar_shows_the_progress(quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    main, terminal = os.openpty()
    read: list[bytes] = []

    def read_all() -> None:  # a terminal that nobody reads blocks its writer after some kilobytes
        while not b"".join(read).endswith(b"END"):
            read.append(os.read(main, 65_536))

    reader = threading.Thread(target=read_all, daemon=True)
    reader.start()
    learner, schedule = nn.Linear(2, 1), ScheduleConfig(steps=3)
    monkeypatch.setenv("TERM", "xterm-256color")
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        batches = repeated(torch.ones(1, 2))
        fit(
            learner,
            lambda x: {"y": learner(x).square().mean()},
            batches,
            optimizer=OptimizerConfig(),
            schedule=schedule,
            log_every=1,
            quiet=quiet,
        )
        os.write(terminal, b"END")
        reader.join(60)
    shown = b"".join(read).decode()
    os.close(main)
    assert ("3/3" in shown and "loss 0." in shown) is not quiet
    assert "step 1 of" not in shown


def test_any_module_can_be_fitted() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    truth, learner = nn.Linear(4, 1), nn.Linear(4, 1)
    target = truth(x).detach()
    kept = Kept()
    metrics = fit(
        learner,
        lambda x: {"square": (learner(x) - target).square().mean(), "nothing": x.new_zeros(())},
        repeated(x),
        optimizer=OptimizerConfig(lr=3e-2),
        schedule=ScheduleConfig(steps=300, name="cosine", warmup=10),
        trackers=[kept],
        log_every=100,
        quiet=True,
    )
    # A linear problem without noise has an exact solution; 1e-4 is 1 % of a standard deviation.
    assert metrics["loss"] == metrics["loss/square"] < 1e-4
    assert [step for step, _ in kept.lines] == [100, 200, 300]
    assert kept.lines[-1][1] == metrics
    assert not learner.training


def test_steps_match_torch_by_hand() -> None:
    """The engine against the same update written out with torch's own parts."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1))
    theirs = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(8, 3)
    engine = Engine(
        ours,
        scalar_losses(lambda x: {"square": ours(x).square().mean()}),
        OptimizerConfig(lr=0.1, weight_decay=0.1, clip=0.05),
        ScheduleConfig(steps=4, warmup=2),
    )
    decayed = [p for p in theirs.parameters() if p.ndim == 2]
    kept = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for lr in (0.05, 0.1, 0.1, 0.1):
        metrics = engine.step(x).values()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        theirs(x).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        optimizer.step()
        assert metrics["lr"] == pytest.approx(lr)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)  # fp32 rounding of a sum
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the fused kernel rounds in another order


def test_micro_batches_add_up_to_the_batch() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    models = [nn.Linear(3, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())

    def losses(model: nn.Module, pieces: list[Tensor]) -> Iterator[Loss]:
        for piece in pieces:
            each = model(piece).square()
            yield Loss(
                each.sum() / 6, {"loss/square": (each.detach().sum(), len(piece))}, {"rows": len(piece)}
            )

    metrics = []
    for model, pieces in zip(models, ([x], [x[:1], x[1:]]), strict=True):
        engine = Engine(model, lambda w, m=model: losses(m, w), OptimizerConfig(), ScheduleConfig(steps=1))
        metrics.append(engine.step(pieces).values())
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    assert metrics[0]["loss"] == pytest.approx(metrics[0]["loss/square"])
    assert metrics[0]["rows"] == 6
    torch.testing.assert_close(models[0].weight, models[1].weight)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        (ScheduleConfig(steps=6, warmup=2), [0.5, 1, 1, 1, 1, 1]),
        (ScheduleConfig(steps=5, name="cosine", warmup=1), [1, 1, 0.8535534, 0.5, 0.1464466]),
        (ScheduleConfig(steps=2, name="cosine", final=0.1), [1, 0.55]),
        (ScheduleConfig(steps=6, name="wsd", warmup=1, decay=2), [1, 1, 1, 1, 1, 0.5]),
        (ScheduleConfig(steps=8, name="wsd", warmup=2, decay=4, final=0.2), [0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: ScheduleConfig, shares: list[float]) -> None:
    assert [lr_factor(schedule, step) for step in range(schedule.steps)] == pytest.approx(shares)


def test_embeddings_norms_and_biases_do_not_decay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 3)
            self.position_embedding = nn.Parameter(torch.zeros(1, 4, 3))
            self.convolution = nn.Conv2d(3, 3, 3)
            self.norm = nn.LayerNorm(3)
            self.logits = nn.Linear(3, 7, bias=False)
            self.logits.weight = self.table.weight  # tied
            self.layer = nn.Linear(3, 3)

    net = Net()
    decayed = build_optimizer(net, OptimizerConfig(weight_decay=0.1)).param_groups[0]["params"]
    assert {id(p) for p in decayed} == {id(net.convolution.weight), id(net.layer.weight)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "wsd"}, "with wsd, a decay from 1"),
        ({"name": "cosine", "decay": 3}, "and 0 with any other"),
        ({"name": "wsd", "decay": 9, "warmup": 2, "steps": 10}, "steps after the warmup"),
        ({"final": 0.1}, "expected 0 with name constant"),
    ],
)
def test_schedules_refuse_settings_without_effect(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ScheduleConfig(**settings)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(x))


def test_groups_have_their_own_rates_and_decays() -> None:
    """Against torch's AdamW with these groups; a parameter belongs to the longest path that fits."""
    torch.manual_seed(0)
    model, other = Towers(), Towers()
    other.load_state_dict(model.state_dict())
    groups = {"left": {"lr": 0.01}, "*.0": {"weight_decay": 0.5}}
    config = OptimizerConfig(lr=0.1, weight_decay=0.1, clip=None, groups=groups)
    data = torch.randn(5, 2)
    engine = Engine(
        model,
        scalar_losses(lambda x: {"y": model(x).square().mean()}),
        config,
        ScheduleConfig(steps=4, warmup=2),
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": [other.left[0].weight, other.right[0].weight], "lr": 0.1, "weight_decay": 0.5},
            {"params": [other.left[0].bias, other.right[0].bias], "lr": 0.1, "weight_decay": 0},
            {"params": other.left[1].parameters(), "lr": 0.01, "weight_decay": 0},
            {"params": other.right[1].parameters(), "lr": 0.1, "weight_decay": 0},
        ],
        betas=(0.9, 0.95),
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(4):
        metrics = engine.step(data).values()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1, (step + 1) / 2)
        optimizer.zero_grad()
        other(data).square().mean().backward()
        optimizer.step()
    assert (metrics["lr"], metrics["lr/left"], metrics["lr/*.0"]) == (0.1, 0.01, 0.1)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, other.get_parameter(name), msg=name)


def test_matrices_of_a_muon_group_are_updated_by_muon() -> None:
    """Against torch's Muon and AdamW over parameters that are listed by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    other = deepcopy(model)
    groups = {"0": {"name": "muon", "lr": 0.01, "weight_decay": 0.1}, "2": {"name": "adamw"}}
    data = torch.randn(7, 3)
    engine = Engine(
        model,
        scalar_losses(lambda x: {"y": model(x).square().mean()}),
        OptimizerConfig(lr=0.1, clip=None, groups=groups),
        ScheduleConfig(steps=3),
    )
    muon = torch.optim.Muon([other[0].weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [{"params": [other[0].bias], "lr": 0.01}, {"params": [*other[1:].parameters()]}]
    adamw = torch.optim.AdamW(rest, lr=0.1, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(3):
        metrics = engine.step(data).values()
        for optimizer in (muon, adamw):
            optimizer.zero_grad()
        other(data).square().mean().backward()
        for optimizer in (muon, adamw):
            optimizer.step()
    assert (metrics["lr/0"], metrics["lr/2"]) == (0.01, 0.1)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, other.get_parameter(name), msg=name)
    engine.load_state_dict(engine.state_dict())
    state = engine.state_dict()
    state["tensors"]["training/optimizer/exp_avg/0.weight"] = state["tensors"].pop(
        "training/optimizer/momentum_buffer/0.weight"
    )
    with pytest.raises(ValueError, match="expected momentum_buffer: a resumed run cannot change between"):
        engine.load_state_dict(state)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"left.1": {"name": "muon"}}, "'left.1' has no matrix for Muon"),
        ({"middle": {"lr": 1}}, "'middle' fits no trained parameter"),
        ({"left.0": {"lr": 1}, "*.0": {"lr": 2}}, r"'left.0' and '\*.0' both fit left.0"),
        ({"left": {"lr": 1}, "left.0": {"lr": 2}, "left.1": {"lr": 3}}, "'left' fits no trained parameter"),
    ],
)
def test_groups_that_do_not_fit_are_errors(groups: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_optimizer(Towers(), OptimizerConfig(groups=groups))


@pytest.mark.parametrize(
    "groups",
    [
        ["left"],
        {"left": 1},
        {"left": {}},
        {"left": {"beta": 1}},
        {"left": {"name": "sgd"}},
        {"left": {"name": ["muon"]}},
        {"left": {"lr": "1e-5"}},
        {"left": {"lr": -1}},
    ],
)
def test_groups_of_another_form_are_errors(groups: Any) -> None:
    with pytest.raises(ValueError, match="groups"):
        OptimizerConfig(groups=groups)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()

    def objective(x: Tensor) -> Iterator[Loss]:
        y = model(x).mean()
        yield Loss(y, {"loss/text": (y.detach(), 1.0), "source/good": (torch.tensor(1.0), 1.0)})

    engine = Engine(model, objective, OptimizerConfig(), ScheduleConfig(steps=9))
    engine.step(torch.ones(1, 2))
    before = model.weight.detach().clone()
    with pytest.raises(TrainingError, match="step 1: not finite: loss, loss text, grad_norm"):
        engine.step(torch.full((1, 2), float("nan")))
    assert torch.equal(model.weight, before)


def test_no_trainable_parameter_is_an_error() -> None:
    model = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(TrainingError, match="every parameter is frozen"):
        Engine(model, scalar_losses(lambda x: {}), OptimizerConfig(), ScheduleConfig())


def test_batches_that_end_early_are_an_error() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(TrainingError, match="ended at step 2 of 5"):
        fit(
            model,
            lambda x: {"mean": model(x).mean()},
            [torch.ones(1, 2)] * 2,
            optimizer=OptimizerConfig(),
            schedule=ScheduleConfig(steps=5),
            quiet=True,
        )


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step(which: signal.Signals) -> None:
    model = nn.Linear(2, 1)

    def losses(x: Tensor) -> dict[str, Tensor]:
        if engine.next_step == 2:
            os.kill(os.getpid(), which)
        return {"mean": model(x).mean()}

    engine = Engine(model, scalar_losses(losses), OptimizerConfig(), ScheduleConfig(steps=9))
    calls: list[tuple[int, bool]] = []
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(
            engine,
            repeated(torch.ones(1, 2)),
            title="",
            quiet=True,
            after_step=lambda done, stopping: calls.append((done, stopping)),
        )
    assert calls == [(1, False), (2, False), (3, True)]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

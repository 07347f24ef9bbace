"""Operations of a step, against torch's counter over whole real steps, and against rules of thumb."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from janus_modular import ConfigError, Message, Sample, Text
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.batch import collate
from janus_modular.model.model import JanusModel
from janus_modular.training.flops import SequenceFlops, count_flops, sequence_lengths
from janus_modular.training.run_setup import batch_builder, open_sources
from janus_modular.training.throughput import Throughput, known_peak
from janus_modular.training.train import train
from janus_modular.training.trainable import set_trainable

ALL = ["understanding", "generation", "backbone"]


def model_of(*overrides: str, device: str = "meta", learn: list[str] | None = None) -> JanusModel:
    config = resolve(load("tiny", ["backbone.attention=eager", *overrides]), ModelConfig)
    model = ModelAssembly.from_config(config, device=device).model
    set_trainable(model, learn or ALL)
    return model


def matrices(module: Any, *, trained: bool | None = None) -> int:
    """Return the number of weights of a module's linear layers."""
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    chosen = [layer.weight for layer in layers if trained in (None, layer.weight.requires_grad)]
    return sum(weight.numel() for weight in chosen)


@pytest.mark.parametrize("learn", [ALL, ["generation.head"], ["understanding.adaptor", "generation.adaptor"]])
def test_components_add_up_to_what_torch_counts_in_a_real_step(learn: list[str], make, plugins) -> None:
    """Rows of one sequence, without padding: all that torch runs is needed."""
    config = make(length="null", accumulate=5, learn=learn)
    assembly = ModelAssembly.from_config(
        resolve(load("tiny", ["backbone.attention=eager", "processor.system=''"]), ModelConfig), device="cpu"
    )
    model = assembly.model
    set_trainable(model, learn)
    step = batch_builder(config, open_sources(config, plugins), model, assembly.processor).build(0)
    assert len(step.batches) == 5  # samples that are read, drawn and of text
    model(step.batches[0])  # the first pass also checks that sequences of a row are kept apart
    # torch does not count a CPU's fused attention, so this is the one of matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for batch in step.batches:
            loss = torch.stack([loss.sum() for loss in model(batch).losses.values()]).sum()
            if loss.requires_grad:
                loss.backward()
    counts = count_flops(model)
    assert not counts.uncounted
    counted = counts.of_batches(step.batches)
    expected = {
        "understanding.encoder",
        "understanding.adaptor",
        "generation",
        "generation.tokenizer",
        "backbone",
    }
    assert counted.keys() == expected
    assert sum(counted.values()) == counter.get_total_flops()


def test_a_decoder_follows_the_rule_6nd() -> None:
    """6 N D for the matrices, and 12 layers x hidden size x length² for attention (PaLM, appendix B)."""
    model = model_of()
    body: Any = model.backbone.model.model  # type: ignore[attr-defined]
    counts = count_flops(model)
    layers, hidden = body.config.num_hidden_layers, body.config.hidden_size
    assert counts.backbone.sequence == SequenceFlops(6 * matrices(body), 12 * layers * hidden)
    assert counts.backbone.label == 6 * hidden * model.backbone.vocab_size


def test_frozen_matrices_cost_no_gradient_of_theirs() -> None:
    """2 N for the forward pass, and 2 N for the gradient that passes through to the adaptor."""
    model = model_of(learn=["understanding.adaptor"])
    body: Any = model.backbone.model.model  # type: ignore[attr-defined]
    sequence: Any = count_flops(model).backbone.sequence
    assert sequence.linear == 4 * matrices(body)


def test_a_backbone_below_all_that_learns_costs_its_forward_pass() -> None:
    model = model_of(learn=["generation.head"])
    body: Any = model.backbone.model.model  # type: ignore[attr-defined]
    sequence: Any = count_flops(model).backbone.sequence
    assert sequence.linear == 2 * matrices(body)


class Declared(torch.nn.Module):
    """An adaptor whose kernel torch's counter cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def num_tokens(self, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1]

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        raise NotImplementedError("only on a GPU")


class DeclaredWithFlops(Declared):
    def forward_flops(self, tokens: int) -> int:
        return 1000 * tokens


def test_a_component_may_declare_its_operations() -> None:
    model = model_of()
    tokens = model.understanding.num_tokens
    model.understanding.adaptor = DeclaredWithFlops()
    assert count_flops(model).read_image["understanding.adaptor"] == 3 * 1000 * tokens
    model.understanding.adaptor = Declared()
    counts = count_flops(model)
    assert counts.uncounted == {"understanding.adaptor": "only on a GPU"}
    assert "understanding.encoder" in counts.read_image


def test_padding_is_no_sequence(built) -> None:
    _, processor = built

    def sequence(text: str) -> Any:
        return processor.sequence(Sample([Message("assistant", [Text(text, supervised=True)])]))

    lengths = [[len(sequence("a")), len(sequence("abcd"))], [len(sequence("ab"))]]
    batch = collate([[sequence("a"), sequence("abcd")], [sequence("ab")]])
    assert sequence_lengths(batch) == [length for row in lengths for length in row]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA A1000", None),
    ],
)
def test_peaks_of_common_devices(name: str, tflops: float | None) -> None:
    assert known_peak(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_run_reports_mfu_of_each_component(make, metrics, plugins) -> None:
    config = make(peak_flops=1e9)
    train(config, quiet=True)
    assembly = ModelAssembly.from_config(config.model)
    set_trainable(assembly.model, config.learn)
    counts = count_flops(assembly.model)
    builder = batch_builder(config, open_sources(config, plugins), assembly.model, assembly.processor)
    for step, values in enumerate(metrics(config)):
        shares = {name: value for name, value in values.items() if name.startswith("mfu/")}
        assert sum(shares.values()) == pytest.approx(values["mfu"])
        flops = counts.of_batches(builder.build(step).batches)
        assert shares.keys() == {f"mfu/{name}" for name in flops}
        per_second = sum(flops.values()) * values["steps_per_second"]
        assert values["mfu"] == pytest.approx(per_second / 1e9)
        assert values["tflops_per_second"] == pytest.approx(per_second / 1e12)


def test_an_unknown_peak_is_said_once_and_no_mfu_is_reported(make, metrics, capsys) -> None:
    config = make()
    train(config)
    assert capsys.readouterr().err.count("MFU is not reported: the peak of 'cpu' in float32") == 1
    assert not [name for values in metrics(config) for name in values if name.startswith(("mfu", "tflops"))]
    with pytest.raises(ConfigError, match="peak_flops: 0"):
        make(peak_flops=0)


def test_rates_are_means_over_processes() -> None:
    class Two:
        def gather(self, value: dict[str, float]) -> list[dict[str, float]]:
            return [value, {"backbone": 300.0}]

    throughput = Throughput(count_flops(model_of()), 1000.0, Two())  # type: ignore[arg-type]
    throughput.done = {"backbone": 100.0, "generation": 200.0}
    rates = throughput.rates(2.0)
    assert rates["mfu/backbone"] == pytest.approx((100 + 300) / 2 / 2 / 1000)
    assert rates["mfu"] == pytest.approx((100 + 200 + 300) / 2 / 2 / 1000)
    assert throughput.done == {}

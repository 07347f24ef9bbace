"""Modules built on the meta device and loaded: tied weights, buffers and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from janus_modular.errors import CheckpointError
from janus_modular.weights.loading import LoadResult, load_weights, move_buffers, parameters_on_meta


class Module(nn.Module):
    """A tied weight, a buffer that is stored, one that is computed, and one that is integer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def blank() -> Module:
    with parameters_on_meta():
        return Module()


def test_only_parameters_are_on_meta() -> None:
    module = blank()
    assert all(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(module.table, torch.arange(4.0))
    assert module.head.weight is module.embed.weight
    assert not Module().embed.weight.is_meta  # the hook is gone


@pytest.mark.parametrize("left_out", ["head.weight", "embed.weight"])
def test_a_tied_weight_may_come_under_any_of_its_names(left_out: str) -> None:
    torch.manual_seed(0)
    source, module = Module(), blank()
    tensors = {name: tensor for name, tensor in source.state_dict().items() if name != left_out}
    outcome = load_weights(module, tensors.items())
    outcome.check("it")
    assert outcome.loaded == len(tensors)
    assert module.head.weight is module.embed.weight
    assert all(
        torch.equal(a, b)
        for a, b in zip(source.state_dict().values(), module.state_dict().values(), strict=True)
    )
    assert not module.frozen.requires_grad


def test_casts_what_is_stored_and_leaves_what_is_computed() -> None:
    module = blank()
    load_weights(module, Module().state_dict().items(), dtype=torch.bfloat16)
    move_buffers(module, device="cpu", dtype=torch.bfloat16)
    assert module.embed.weight.dtype == module.norm.running_mean.dtype == torch.bfloat16
    assert module.table.dtype == torch.float32
    assert module.norm.num_batches_tracked.dtype == torch.int64


def test_real_modules_keep_their_tensors() -> None:
    module = Module()
    before = module.embed.weight
    load_weights(module, {"embed.weight": torch.full((5, 3), 2.0, dtype=torch.float16)}.items())
    assert module.embed.weight is before
    assert before.dtype == torch.float32
    assert torch.all(before == 2)


def test_on_meta_names_and_shapes_are_checked_without_memory() -> None:
    module = blank()
    outcome = load_weights(module, Module().state_dict().items(), device="meta")
    assert outcome == LoadResult(loaded=len(module.state_dict()))
    assert module.embed.weight.is_meta


def test_lists_errors_by_the_innermost_component_up_to_a_limit() -> None:
    tensors: dict[str, Tensor] = {f"head.extra{i}": torch.zeros(1) for i in range(30)}
    tensors["frozen"] = torch.zeros(3)
    outcome = load_weights(blank(), tensors.items())
    assert outcome.missing == ["embed.weight", *(f"norm.{n}" for n in sorted(nn.BatchNorm1d(1).state_dict()))]
    with pytest.raises(CheckpointError) as error:
        outcome.check("the file", ["head", "norm"])
    lines = str(error.value).splitlines()
    assert lines[0] == "the file does not fit:"
    assert "  5 missing in norm:" in lines
    assert "  30 unexpected in head:" in lines
    assert "    ... and 22 more" in lines
    assert "    frozen: found (3,), expected (2,)" in lines


def test_whole_numbers_are_no_weights() -> None:
    tensors = {name: tensor.to(torch.int64) for name, tensor in Module().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"norm.weight: found torch.int64, expected torch.float32"):
        load_weights(blank(), tensors.items()).check("it")

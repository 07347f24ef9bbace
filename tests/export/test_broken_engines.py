"""A component that is standard ONNX but that TensorRT cannot build fails the check `rtx_engine`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from janus_export.checks import check_onnx_parity, check_rtx_engine
from janus_modular.testing import run_check
from janus_modular.testing.check import REGISTERED

HIDDEN = torch.linspace(-1, 1, 24).reshape(3, 8)


class Head(nn.Module):
    """Logits (..., 8) of states (..., 8): those of a layer, less the smallest of ``sorted_numbers``."""

    codebooks = (8,)

    def __init__(self, sorted_numbers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.copies = nn.Linear(8, 8), sorted_numbers // 8

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        logits = self.layer(hidden)
        return logits - torch.cat([logits] * self.copies, dim=-1).sort(dim=-1).values[..., :1]


def outcome(check: Any, sorted_numbers: int) -> tuple[str, str]:
    [chosen] = [one for one in REGISTERED.values() if one.run is check]
    result = run_check(chosen, lambda: (Head(sorted_numbers), HIDDEN), slot="heads")
    return result.outcome, result.note


@pytest.mark.slow
def test_what_tensorrt_does_not_take_is_found() -> None:
    pytest.importorskip("tensorrt_rtx")
    assert outcome(check_rtx_engine, 16) == ("passed", "")
    assert outcome(check_onnx_parity, 4096) == ("passed", "")
    found, note = outcome(check_rtx_engine, 4096)  # it sorts 3,840 numbers at most
    assert found == "failed", note
    assert "TopK" in note or "3840" in note, note

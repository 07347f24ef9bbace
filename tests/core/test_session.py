"""Sessions in torch: transfers to the host, and the contract of sessions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from janus_modular import PromptError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import CheckError
from janus_modular.janus import Janus
from janus_modular.model.session import TorchRuntime, TorchSession
from janus_modular.sequence import Sequence
from janus_modular.testing import RuntimeContract
from janus_modular.testing.examples import prompt
from janus_modular.testing.session_checks import check_session_extend


@pytest.fixture(scope="module")
def runtime() -> TorchRuntime:
    torch.manual_seed(0)
    return Janus.of(ModelAssembly.from_config(resolve(load("tiny"), ModelConfig))).runtime


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_states_of_any_dtype_come_to_numpy_as_they_are(dtype: torch.dtype) -> None:
    assembly = ModelAssembly.from_config(resolve(load("tiny"), ModelConfig))
    model, processor = assembly.model, assembly.processor
    session = TorchSession(model.to(dtype).eval(), max_seq_len=8, pad=processor.pad_id)
    hidden = session.prefill([prompt(1, 2, 3)])
    assert hidden.dtype == dtype
    on_host = session.to_host(hidden)
    assert on_host.dtype == (np.float32 if dtype == torch.bfloat16 else hidden.numpy().dtype)
    assert torch.equal(
        torch.from_numpy(on_host).to(dtype), hidden
    )  # to the bit: float32 holds every bfloat16


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 2, 7, 16, 32])
def test_positions_fed_in_chunks_equal_one_forward_pass(runtime: TorchRuntime, width: int) -> None:
    tokens = torch.randint(3, 300, (2, 35), generator=torch.Generator().manual_seed(width))
    x = runtime.model.backbone.embed(tokens)
    whole = runtime.model.backbone(x, positions=torch.arange(35).expand(2, 35))
    session = runtime.open(35)
    last = session.prefill([prompt(*row[:3].tolist()) for row in tokens])
    torch.testing.assert_close(last, whole[:, 2], rtol=0, atol=1e-5)  # float32 sums in another order
    pieces = [session.extend(piece) for piece in x[:, 3:].split(width, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole[:, 3:], rtol=0, atol=1e-5)


def test_rows_that_stay_are_not_computed_when_others_are_admitted(
    runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = runtime.open(40, rows=4)
    session.admit([prompt(1, 2, 3), prompt(4, 5)], [0, 1])
    fed: list[int] = []
    forward = runtime.model.backbone.forward
    monkeypatch.setattr(
        runtime.model.backbone, "forward", lambda x, **others: fed.append(len(x)) or forward(x, **others)
    )
    session.admit([prompt(6)], [3])
    assert fed == [1]


class TestTorchKeepsTheContract(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _of_a_model(self, runtime: TorchRuntime) -> None:
        self.runtime = runtime

    def make(self) -> tuple[TorchRuntime, list[Sequence]]:
        return self.runtime, [prompt(1, 2, 3), prompt(4)]


def test_a_graph_that_there_is_not_is_named_with_those_that_there_are(runtime: TorchRuntime) -> None:
    session = runtime.open(8)
    for name, hint in (("image_next", "It is called 'sample_image' now"), ("embeds", "Did you mean 'embed'")):
        with pytest.raises(PromptError, match=f"found the graph '{name}'; expected embed, .*{hint}"):
            session.run(name)


def test_a_leak_of_a_neighbours_thousandth_is_found(runtime: TorchRuntime) -> None:
    """The session checks allow for rounding alone."""

    class Leaks(TorchSession):
        def feed(self, x: Any, counts: Any) -> Any:
            hidden = super().feed(x, counts)
            return hidden + 1e-3 * hidden.roll(1, dims=0)

    class Runtime(TorchRuntime):
        def open(self, max_seq_len: int, rows: int | None = None) -> TorchSession:
            return Leaks(self.model, max_seq_len=max_seq_len, rows=rows, pad=self.pad)

    leaking = Runtime(runtime.model, pad=runtime.pad)
    with pytest.raises(CheckError, match="states differ by"):
        check_session_extend(leaking, [prompt(1, 2, 3), prompt(4, 5)])
    check_session_extend(runtime, [prompt(1, 2, 3), prompt(4, 5)])


@torch.no_grad()
def test_a_copied_row_hides_the_positions_that_its_source_hides_and_no_others(runtime: TorchRuntime) -> None:
    seen = prompt(1, 5, 6, 7, 8, 9)
    unseen = replace(prompt(1, 2, 2, 2, 2, 2), hidden=np.arange(6) > 0)
    x = runtime.model.backbone.embed(torch.tensor([[11, 12]]))
    for source, other in ((seen, unseen), (unseen, seen)):
        session = runtime.open(16, rows=2)
        session.admit([source, other], [0, 1])
        expected = session.extend_rows(x, [2], 0)
        assert session.copy_row(0, 1, 6)
        torch.testing.assert_close(session.extend_rows(x, [2], 1), expected, rtol=0, atol=0)


def test_a_prompt_that_is_more_than_its_embeddings_is_read_as_a_whole(runtime: TorchRuntime) -> None:
    session = runtime.open(16, rows=2)
    assert session.embed_prompts([prompt(1, 2)]) is not None
    unseen = replace(prompt(1, 2), hidden=np.array([False, True]))
    assert session.embed_prompts([prompt(1, 2), unseen]) is None

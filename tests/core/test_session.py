"""What a session in torch hands to the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from janus_modular.model.session import TorchSession
from janus_modular.testing.examples import prompt


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_states_of_any_dtype_come_to_numpy_as_they_are(dtype: torch.dtype) -> None:
    from janus_modular.checkpoints import ModelAssembly
    from janus_modular.config import load, resolve
    from janus_modular.config.schema import ModelConfig

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

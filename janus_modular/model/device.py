"""Where to compute."""

from __future__ import annotations

import torch

from janus_modular.errors import ConfigError


def choose_device(device: str = "auto") -> torch.device:
    """Return the device of a name; ``auto``: CUDA where there is one, then Apple's MPS, then the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, present in here.items() if present))
    kind = device.partition(":")[0]
    if not here.get(kind, False):
        present = ", ".join(name for name, is_here in here.items() if is_here)
        raise ConfigError(f"there is no device '{device}' here. Here are: {present}; or auto")
    return torch.device(device)

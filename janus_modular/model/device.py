"""Chooses the device to compute on."""

from __future__ import annotations

import torch

from janus_modular.errors import ConfigError


def choose_device(device: str = "auto") -> torch.device:
    """Return the device of a name; ``auto``: CUDA if available, else Apple's MPS, else the CPU.

    Raises:
        ConfigError: the device is not available.
    """
    types = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name, is_available in types.items() if is_available]
    if device == "auto":
        return torch.device(available[0])
    if device.partition(":")[0] not in available:
        raise ConfigError(
            f"the device '{device}' is not available; expected {', '.join(available)}, or auto."
        )
    return torch.device(device)

"""What can go wrong between a checkpoint and a running bundle, in words a user can act on."""

from __future__ import annotations

from janus_modular.errors import BundleError, JanusError

__all__ = ["BundleError", "DeviceError", "ExportError"]


class ExportError(JanusError):
    """A model, or a part of it, that cannot become a graph as it is."""


class DeviceError(JanusError):
    """A GPU, or what drives it, that did not do what it was asked to."""

"""Errors of export and of its runtimes; each message says what the user can do."""

from __future__ import annotations

from janus_modular.errors import BundleError, JanusError

__all__ = ["BundleError", "DeviceError", "ExportError"]


class ExportError(JanusError):
    """A model, or a component of it, that cannot be exported as a graph."""


class DeviceError(JanusError):
    """A failure of a GPU, its driver or its libraries."""

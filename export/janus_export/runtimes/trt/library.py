"""Imports TensorRT or TensorRT-RTX, which have the same API."""

from __future__ import annotations

from collections import deque
from importlib import import_module
from typing import Any

from janus_export.errors import DeviceError
from janus_modular import ConfigError, MissingExtraError

LIBRARIES = {"tensorrt": ("tensorrt", "gpu"), "tensorrt-rtx": ("tensorrt_rtx", "rtx")}
"""The module of a target, and the extra that installs it."""


class Library:
    """The installed TensorRT, and its most recent error messages."""

    def __init__(self, target: str) -> None:
        """Import TensorRT-RTX.

        Raises:
            MissingExtraError: TensorRT-RTX is not installed.
            ConfigError: TensorRT-RTX is installed, but does not load.
        """
        self.target = target
        module, self.extra = LIBRARIES[target]
        try:
            self.trt: Any = import_module(module)
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"the runtime '{target}'", self.extra) from error
        except (ImportError, OSError) as error:
            raise ConfigError(f"{module} is installed, but does not load: {error}") from error
        self.version: str = self.trt.__version__
        self.messages: deque[str] = deque(maxlen=3)
        self.logger = _error_log(self.trt, self.messages)
        self.runtime = self.trt.Runtime(self.logger)

    def check(self, succeeded: object, action: str) -> None:
        """Raise an error if a call of TensorRT failed: such calls return False or None, and log the reason.

        Raises:
            DeviceError: the call failed.
        """
        if not succeeded:
            why = " ".join(self.messages) or "no reason was logged"
            self.messages.clear()
            raise DeviceError(f"{self.target} {self.version}, {action}: {why}")


def _error_log(trt: Any, messages: deque[str]) -> Any:
    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        """Keeps errors for the message that is raised; warnings of a loaded engine are of no use here."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(msg.strip())

    return ErrorLog()

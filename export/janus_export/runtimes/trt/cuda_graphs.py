"""Steps as CUDA graphs: hundreds of kernels, launched by one call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from janus_export.errors import DeviceError
from janus_export.runtimes.trt.cuda import CapturedGraph, Gpu
from janus_export.runtimes.trt.engine import Binding


class CapturedStep:
    """Engines that run one after another, always at the same addresses.

    The first run has no graph: after a change of shapes, TensorRT updates its state in the next enqueue,
    which cannot be captured. The second run captures a graph; later runs launch it. A graph is valid until
    the shapes of one of its contexts change.
    """

    def __init__(self, gpu: Gpu, bindings: Sequence[Binding], *, capture: bool) -> None:
        self.gpu, self.bindings, self.capture = gpu, tuple(bindings), capture
        self.graph: CapturedGraph | None = None
        self.enqueued_at: list[int] | None = None  # numbers of shape changes at the capture
        self.captured_at: list[int] | None = None

    def run(self) -> None:
        """Enqueue the work on the stream, as a CUDA graph if one was captured."""
        if self.graph is not None and self.captured_at == self._changes():
            self.gpu.launch(self.graph)
            return
        for binding in self.bindings:
            binding.bind()
        if self.capture and self.enqueued_at == self._changes() and self._capture():
            self.run()
            return
        self.graph = None
        self._enqueue()
        self.enqueued_at = self._changes()

    def _capture(self) -> bool:
        """Capture the work and return True; if it cannot be captured, warn once and return False."""
        try:
            for binding in self.bindings:
                if not binding.context.is_capturable:
                    raise DeviceError(f"{binding.context.label} cannot be captured")
            self.graph, self.captured_at = self.gpu.capture(self._enqueue), self._changes()
        except DeviceError as error:
            self.capture = False
            warnings.warn(
                f"{error}. Steps run without a CUDA graph, which is slower; to silence this warning, set"
                " the runtime's option cuda_graph to false, or build the engines again",
                stacklevel=2,
            )
        return self.capture

    def _enqueue(self) -> None:
        for binding in self.bindings:
            binding.enqueue()

    def _changes(self) -> list[int]:
        return [binding.context.changes for binding in self.bindings]

"""One GPU, as far as runtimes need it: memory, copies, one stream, CUDA graphs.

All CUDA calls are here, through NVIDIA's own binding (``cuda.bindings.runtime``). Work is enqueued on the
stream and executed in order, asynchronously; only `Gpu.synchronize` waits for it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_export.errors import DeviceError
from janus_export.runtimes.trt.device import compute_capability
from janus_modular import ConfigError, MissingExtraError


class Gpu:
    """A GPU and its single stream. Use it from one thread at a time."""

    def __init__(self, index: int, *, extra: str) -> None:
        """Start the GPU of this number; ``extra`` is what installs the binding.

        Raises:
            MissingExtraError: the binding is not installed.
            ConfigError: there is no such GPU.
        """
        try:
            from cuda.bindings import runtime
        except ModuleNotFoundError as error:
            raise MissingExtraError("running engines", extra) from error
        self.api: Any = runtime
        self.index = index
        if (arch := compute_capability(index)) is None:
            raise self._absent()
        self.arch = arch
        self.use()
        self.name = self._ask("cudaGetDeviceProperties", index).name.decode()
        self._stream = self._ask("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        self.epoch = 0  # how often the host has waited
        self._held: list[object] = []

    def use(self) -> None:
        """Make this GPU the current one of the calling thread."""
        self._do("cudaSetDevice", self.index)

    def synchronize(self) -> None:
        """Wait until all enqueued work is done."""
        self._do("cudaStreamSynchronize", self._stream)
        self.epoch += 1
        self._held.clear()

    def hold(self, *things: object) -> None:
        """Keep objects alive until the enqueued work that uses them is done."""
        self._held += things

    def allocate(self, size: int) -> Memory:
        """Return zeroed GPU memory: uninitialised memory may contain NaN, which masks do not remove."""
        memory = Memory(self, int(self._ask("cudaMalloc", max(size, 1))), "cudaFree")
        self._put("cudaMemsetAsync", memory.address, 0, max(size, 1))
        return memory

    def pin(self, size: int) -> PinnedMemory:
        """Return pinned host memory, which the GPU reads asynchronously."""
        return PinnedMemory(self, int(self._ask("cudaMallocHost", max(size, 1))), size)

    def copy_in(self, to: int, array: NDArray[Any]) -> None:
        """Copy an array to an address of the GPU.

        Pinned memory is read later: it must not change until the stream reaches the copy. Other
        memory is read before this returns, for which CUDA may wait for the stream.
        """
        self._copy_rows(to, array.ctypes.data, array.nbytes, 1, 0, 0, "HostToDevice")

    def copy_out(self, array: NDArray[Any], start: int, *, stride: int = 0) -> None:
        """Copy from an address of the GPU into an array, which is valid after `synchronize`.

        With a ``stride``, the array's rows lie that many bytes apart on the GPU.
        """
        rows = len(array) if stride else 1
        self._copy_rows(array.ctypes.data, start, array.nbytes // rows, rows, 0, stride, "DeviceToHost")

    def copy_across(
        self, to: int, start: int, *, width: int, rows: int = 1, stride: int = 0, to_stride: int = 0
    ) -> None:
        """Copy ``rows`` of ``width`` bytes, at distances of ``stride`` and ``to_stride`` bytes."""
        self._copy_rows(to, start, width, rows, to_stride, stride, "DeviceToDevice")

    def capture(self, record: Callable[[], None]) -> CapturedGraph:
        """Capture the work that ``record`` enqueues as a CUDA graph, without executing it.

        Raises:
            DeviceError: the work cannot be captured. The stream remains usable.
        """
        mode = self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._do("cudaStreamBeginCapture", self._stream, mode)
        _capturing.add(self)
        try:
            record()
        except BaseException:
            self.api.cudaStreamEndCapture(self._stream)  # its error would hide the first one
            raise
        else:
            graph = self._ask("cudaStreamEndCapture", self._stream)
        finally:
            _capturing.discard(self)
            _release_postponed()
        try:
            return CapturedGraph(self, self._ask("cudaGraphInstantiate", graph, 0))
        finally:
            self._do("cudaGraphDestroy", graph)

    def launch(self, graph: CapturedGraph) -> None:
        """Enqueue a captured graph on the stream."""
        self._put("cudaGraphLaunch", graph.handle)

    def release(self, how: str, handle: Any) -> None:
        """Release an object once no enqueued work uses it; to free memory, CUDA itself waits for the GPU.

        Python's garbage collection calls this at any time and in any thread, also during a capture, which
        a release invalidates even if it is of another session's memory. It is postponed until then.
        """
        _postponed.append((self, how, handle))
        _release_postponed()

    def _release(self, how: str, handle: Any) -> None:
        self._do("cudaStreamSynchronize", self._stream)
        self._do(how, handle)

    def _copy_rows(
        self, to: int, start: int, width: int, rows: int, to_stride: int, stride: int, way: str
    ) -> None:
        direction = getattr(self.api.cudaMemcpyKind, f"cudaMemcpy{way}")
        if rows == 1:
            self._put("cudaMemcpyAsync", to, start, width, direction)
        else:
            strides = max(to_stride, width), max(stride, width)
            self._put("cudaMemcpy2DAsync", to, strides[0], start, strides[1], width, rows, direction)

    def _put(self, name: str, *arguments: Any) -> None:
        self._do(name, *arguments, self._stream)

    def _absent(self) -> ConfigError:
        error, count = self.api.cudaGetDeviceCount()
        reason = f"there are {count}" if error == self.api.cudaError_t.cudaSuccess else self._words(error)
        return ConfigError(
            f"there is no CUDA GPU {self.index} here ({reason}). Engines run on NVIDIA's GPUs alone;"
            " elsewhere run the bundle's graphs: --runtime onnx"
        )

    def _do(self, name: str, *arguments: Any) -> None:
        self._call(name, arguments)

    def _ask(self, name: str, *arguments: Any) -> Any:
        [answer] = self._call(name, arguments)
        return answer

    def _call(self, name: str, arguments: tuple[Any, ...]) -> list[Any]:
        error, *answers = getattr(self.api, name)(*arguments)
        if error != self.api.cudaError_t.cudaSuccess:
            full = error == self.api.cudaError_t.cudaErrorMemoryAllocation
            hint = ". Ask for fewer rows or images at once, or build for less capacity" if full else ""
            raise DeviceError(f"CUDA, {name} on GPU {self.index}: {self._words(error)}{hint}")
        return answers

    def _words(self, error: Any) -> str:
        _, words = self.api.cudaGetErrorString(error)
        return words.decode() if isinstance(words, bytes) else str(error)


_capturing: set[Gpu] = set()  # what a thread of this process captures now
_postponed: deque[tuple[Gpu, str, Any]] = deque()  # what to release when nothing is captured


def _release_postponed() -> None:
    """Release what was postponed, unless something is being captured.

    No lock: garbage collection may call this in the middle of itself, so each step is one atomic operation.
    """
    while not _capturing:
        try:
            gpu, how, handle = _postponed.popleft()
        except IndexError:
            return
        gpu._release(how, handle)


class Memory:
    """GPU memory, freed with the last reference to this object."""

    def __init__(self, gpu: Gpu, address: int, free: str) -> None:
        self.address = address
        weakref.finalize(self, gpu.release, free, address).atexit = False  # freed with the process


class PinnedMemory(Memory):
    """Pinned host memory."""

    def __init__(self, gpu: Gpu, address: int, size: int) -> None:
        super().__init__(gpu, address, "cudaFreeHost")
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class CapturedGraph:
    """A captured CUDA graph: work that is enqueued by one call."""

    def __init__(self, gpu: Gpu, handle: Any) -> None:
        self.handle = handle
        weakref.finalize(self, gpu.release, "cudaGraphExecDestroy", handle).atexit = False

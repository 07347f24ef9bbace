"""Detects the local GPU through NVIDIA's CUDA binding (extras `gpu` and `rtx`)."""

from __future__ import annotations


def compute_capability(index: int = 0) -> str | None:
    """Return the compute capability of a GPU, such as "8.9"; None if there is no such GPU, or no driver.

    Raises:
        ModuleNotFoundError: the binding is not installed.
    """
    from cuda.bindings import runtime

    done = runtime.cudaError_t.cudaSuccess
    error, count = runtime.cudaGetDeviceCount()
    if error != done or index >= count:
        return None
    error, properties = runtime.cudaGetDeviceProperties(index)
    return f"{properties.major}.{properties.minor}" if error == done else None

"""Which GPU is here, asked of the driver itself, so that nothing has to be installed to ask."""

from __future__ import annotations

import ctypes
import sys

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the driver's API


def compute_capability(index: int = 0) -> str | None:
    """Return the compute capability of a GPU, "8.9" say; None where there is no such GPU, or no driver."""
    try:
        cuda = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    device, numbers = ctypes.c_int(), []
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), index):
        return None
    for attribute in (MAJOR, MINOR):
        number = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
        numbers.append(str(number.value))
    return ".".join(numbers)

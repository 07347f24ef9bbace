"""Maps device names to ONNX Runtime's execution providers, and checks that they are available."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO

from janus_export.runtimes.ort.library import check_installation, distributions, onnxruntime
from janus_modular import ConfigError

CPU = "CPUExecutionProvider"
PROVIDERS = {
    "cpu": (CPU,),
    "cuda": ("CUDAExecutionProvider", CPU),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", CPU),
    "nv-tensorrt-rtx": ("NvTensorRTRTXExecutionProvider", CPU),
}
"""By device name; the first provider is the requested one, the others run operators that it lacks."""

WARNINGS, FATAL = 2, 4
"""Levels of ONNX Runtime's log; the first is its own default."""

EXACT = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""Options of providers: no TF32 (10-bit mantissa), with which images have different codes."""

PROBE = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02'
    b"\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""An ONNX graph (y = x), opened to test whether a provider starts."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """The device that graphs run on."""

    name: str  # as in PROVIDERS
    index: int  # of several
    memory: str  # "cpu" or "cuda": the memory of tensors
    options: Mapping[str, str] = field(default_factory=dict)  # of the first provider

    @property
    def providers(self) -> list[str | tuple[str, dict[str, str]]]:
        """The providers that an inference session is opened with."""
        device, own_options = {"device_id": str(self.index)}, {PROVIDERS[self.name][0]: self.options}
        return [
            name if name == CPU else (name, {**device, **EXACT.get(name, {}), **own_options.get(name, {})})
            for name in PROVIDERS[self.name]
        ]


def choose_device(word: str, options: Mapping[str, str] | None = None) -> Device:
    """Return the device that a word like ``auto``, ``cpu``, ``cuda:1`` or ``tensorrt`` means.

    ``options`` are those of its provider, by ONNX Runtime's names.

    Raises:
        ConfigError: the name is unknown, the installed ONNX Runtime was built without the device; or there
            are options for a CPU, which takes none.
    """
    check_installation()
    present = onnxruntime.get_available_providers()
    name, _, index = word.partition(":")
    if name == "auto":
        name = _best(present)
    if name not in PROVIDERS or not (index or "0").isdigit():
        raise ConfigError(
            f"unknown device '{word}'. Expected auto, {', '.join(PROVIDERS)}; for one of several GPUs, cuda:1"
        )
    if PROVIDERS[name][0] not in present:
        available = [known for known, (first, *_) in PROVIDERS.items() if first in present]
        raise ConfigError(
            f"device '{word}': the installed ONNX Runtime was built without"
            f" {PROVIDERS[name][0]}. Available: {', '.join(available)}.\n"
            "For a GPU: pip uninstall -y onnxruntime && pip install 'janus-modular[gpu]'"
        )
    if name == "cpu":
        if options:
            raise ConfigError(
                f"provider_options: {', '.join(options)}; expected none on a CPU, whose provider takes none"
            )
        return Device(name, 0, "cpu")
    if options and "device_id" in options:
        raise ConfigError(
            f"provider_options: device_id; expected a GPU's number in device: {name}:{options['device_id']}"
        )
    onnxruntime.preload_dlls()  # CUDA's libraries, where pip put them
    return Device(name, int(index or 0), "cuda", options or {})


def _best(present: Sequence[str]) -> str:
    """Return cuda if ONNX Runtime was built with it and it starts, else cpu; warn if it does not start."""
    if PROVIDERS["cuda"][0] not in present:
        return "cpu"
    if starts("cuda"):
        return "cuda"
    log.warning(
        "%s was built for CUDA, which does not start (GPU, driver or library missing?): running on"
        " the CPU. To see why: --device cuda",
        " ".join(distributions()) or "onnxruntime",
    )
    return "cpu"


def starts(name: str) -> bool:
    """Return True if a device's provider starts; ONNX Runtime's output in the other case is discarded."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    onnxruntime.set_default_logger_severity(FATAL)
    try:
        with redirect_stdout(StringIO()):
            session = onnxruntime.InferenceSession(PROBE, options, providers=list(PROVIDERS[name]))
    except Exception:  # ONNX Runtime's errors have no common base class
        return False
    finally:
        onnxruntime.set_default_logger_severity(WARNINGS)
    return session.get_providers()[0] == PROVIDERS[name][0]


def check_provider(device: Device, session: onnxruntime.InferenceSession) -> None:
    """Raise an error if ONNX Runtime opened a session on another provider than the device's.

    Raises:
        ConfigError: ONNX Runtime fell back to another provider, for example because a driver is missing.
    """
    got = session.get_providers()
    if got[0] != PROVIDERS[device.name][0]:
        raise ConfigError(
            f"device '{device.name}': {PROVIDERS[device.name][0]} did not start, ONNX Runtime fell back to"
            f" {got[0]}. Its message above says which driver or library is missing; or choose --device cpu"
        )


def check_dtype(device: Device, variant: str, dtype: str) -> None:
    """Raise an error for a dtype that ONNX Runtime would reject only after the last step of an image.

    Raises:
        ConfigError: bfloat16 on CUDA, where ONNX Runtime 1.31 lacks bfloat16 kernels of Resize and of norms.
    """
    if device.name == "cuda" and dtype == "bfloat16":
        raise ConfigError(
            f"variant '{variant}' is bfloat16, which ONNX Runtime does not know in all operators on CUDA:"
            " export fp16 for it, or build engines: janus-modular build BUNDLE --target tensorrt"
        )

"""Which of ONNX Runtime's execution providers a device's name means, and whether it is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata

import onnxruntime

from janus_modular import ConfigError

CPU = "CPUExecutionProvider"
PROVIDERS = {
    "cpu": (CPU,),
    "cuda": ("CUDAExecutionProvider", CPU),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", CPU),
    "nv-tensorrt-rtx": ("NvTensorRTRTXExecutionProvider", CPU),
}
"""By the names that people write; the first provider is what they ask for, the others are for leftovers."""

EXACT = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""Options of providers: float32 means float32, and not 10 bits of it, or a drawing has other codes."""

BUILDS = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that install the same package, each over the files of the other."""


@dataclass(frozen=True)
class Device:
    """Where graphs run."""

    name: str  # as in PROVIDERS
    index: int  # of several
    memory: str  # "cpu" or "cuda": where tensors lie
    options: Mapping[str, str] = field(default_factory=dict)  # of the first provider

    @property
    def providers(self) -> list[str | tuple[str, dict[str, str]]]:
        """What an inference session is opened with."""
        device, asked = {"device_id": str(self.index)}, {PROVIDERS[self.name][0]: self.options}
        return [
            name if name == CPU else (name, {**device, **EXACT.get(name, {}), **asked.get(name, {})})
            for name in PROVIDERS[self.name]
        ]


def choose_device(word: str, options: Mapping[str, str] | None = None) -> Device:
    """Return the device that a word like ``auto``, ``cpu``, ``cuda:1`` or ``tensorrt`` means.

    ``options`` are those of its provider, by ONNX Runtime's names.

    Raises:
        ConfigError: there is none of this name, or the installed ONNX Runtime was built without it; or there
            are options for a CPU, which takes none.
    """
    refuse_two_builds()
    present = onnxruntime.get_available_providers()
    name, _, index = word.partition(":")
    if name == "auto":
        name = "cuda" if PROVIDERS["cuda"][0] in present else "cpu"
    if name not in PROVIDERS or not (index or "0").isdigit():
        raise ConfigError(
            f"a bundle runs on no device '{word}'. Expected auto, {', '.join(PROVIDERS)};"
            " of several GPUs, one by its number: cuda:1"
        )
    if PROVIDERS[name][0] not in present:
        here = [known for known, (first, *_) in PROVIDERS.items() if first in present]
        raise ConfigError(
            f"device '{word}': the ONNX Runtime that is installed was built without"
            f" {PROVIDERS[name][0]}. Here are: {', '.join(here)}.\n"
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


def check_provider(device: Device, session: onnxruntime.InferenceSession) -> None:
    """Refuse a session that ONNX Runtime opened on something else than was asked for.

    Raises:
        ConfigError: it fell back to another provider, as it does when a driver or a library lacks.
    """
    got = session.get_providers()
    if got[0] != PROVIDERS[device.name][0]:
        raise ConfigError(
            f"device '{device.name}': {PROVIDERS[device.name][0]} did not start, ONNX Runtime fell back to"
            f" {got[0]}. Its message above says which driver or library lacks; or choose --device cpu"
        )


def check_dtype(device: Device, variant: str, dtype: str) -> None:
    """Refuse what ONNX Runtime would refuse at the end of a drawing.

    Raises:
        ConfigError: bfloat16 on CUDA, where ONNX Runtime 1.31 neither resizes nor norms in it.
    """
    if device.name == "cuda" and dtype == "bfloat16":
        raise ConfigError(
            f"variant '{variant}' is bfloat16, which ONNX Runtime does not know in all operators on CUDA:"
            " export fp16 for it, or build engines: janus-modular build BUNDLE --target tensorrt"
        )


def refuse_two_builds() -> None:
    """Refuse to run where two builds of ONNX Runtime lie over each other.

    Raises:
        ConfigError: both are installed; which of them is imported is chance.
    """
    if all(map(_is_installed, BUILDS)):
        raise ConfigError(
            "onnxruntime and onnxruntime-gpu are both installed: they are one package in two builds, and"
            " overwrite each other. Keep one:\n"
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'"
            "  (without a GPU: onnxruntime)"
        )


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True

"""Errors that a user can cause and cure; the command line prints them without a traceback.

Each says what was found, what was expected, and what to do next.
"""

from collections.abc import Sequence


class JanusError(Exception):
    """Anything a user can put right."""


class ConfigError(JanusError):
    """A configuration that cannot be built; lists every fault with its path."""

    def __init__(self, message: str, faults: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.faults = list(faults)  # `janus_modular.config.Fault`s, for programs


class PluginError(JanusError):
    """A component that is unknown, defined twice, or whose plugin does not load."""


class CheckpointError(JanusError):
    """Weights that are missing, left over, of another shape, or not readable."""


class PictureError(JanusError):
    """A picture that cannot be read, or that is too large to be read safely."""


class PromptError(JanusError):
    """A conversation that cannot become tokens or fills the context; a setting that makes no sense."""


class DataError(JanusError):
    """A training sample that cannot be used as it is."""


class TrainingError(JanusError):
    """A training that cannot go on, or cannot start as it was asked to."""


class CheckError(JanusError):
    """A component that does not keep its slot's contract; says which promise, and how it was broken."""


class MissingExtraError(JanusError):
    """Something is needed that this installation leaves out; says the pip line that adds it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra '{extra}': pip install 'janus-modular[{extra}]'")


EXTRAS = {
    "torch": ("torch", "transformers", "safetensors", "huggingface_hub", "gguf", "accelerate"),
    "train": ("tensorboard",),
    "demo": ("sklearn", "matplotlib"),
    "lora": ("peft",),
    "runtime": ("onnxruntime",),
    "export": ("onnx", "onnxscript", "onnx_ir"),
    "gpu": ("tensorrt",),
    "rtx": ("tensorrt_rtx",),
}
"""Which packages (by import name) each extra adds."""


def missing_extra(error: ModuleNotFoundError, what: str) -> MissingExtraError | None:
    """Return the error that says which extra brings a missing module; None where none does."""
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    return MissingExtraError(what, extra) if extra else None

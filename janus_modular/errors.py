"""Errors that a user can cause and cure; the command line prints them without a traceback.

Each says what was found, what was expected, and what to do next.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec


class JanusError(Exception):
    """Anything a user can put right; its text holds no control characters, whatever file it quotes."""

    def __str__(self) -> str:
        """Return the text with control characters and halves of surrogate pairs escaped; lines stay."""
        return escaped(super().__str__())


def escaped(text: str) -> str:
    """Return a text that cannot steer a terminal: all that is not printable is escaped, line ends apart."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class ConfigError(JanusError):
    """A configuration that cannot be built; lists every fault with its path."""

    def __init__(self, message: str, errors: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.errors = list(errors)  # `janus_modular.config.FieldError`s, for programs


@dataclass(frozen=True)
class Difference:
    """An option that says something else than the description beside the weights."""

    key: str  # relative to the component: config.rope_theta
    written: object
    described: object


class DescriptionError(ConfigError):
    """Options that contradict how pretrained weights describe themselves (config.json, GGUF metadata).

    A component raises this with keys relative to its own options; who builds it adds where these stand.
    """

    def __init__(self, source: str, differences: Sequence[Difference], *, drop: str | None = None) -> None:
        listed = "; ".join(
            f"{one.key}: found {one.written!r}, expected {one.described!r}" for one in differences
        )
        super().__init__(f"{source} says otherwise: {listed}")
        self.source = source
        self.differences = list(differences)
        self.drop = drop  # the option that, set to null, leaves everything to the description


class PluginError(JanusError):
    """A component that is unknown, defined twice, or whose plugin does not load."""


class CheckpointError(JanusError):
    """Weights that are missing, unexpected, of another shape, or not readable."""


class ImageError(JanusError):
    """An image that cannot be read, or that is too large to be read safely."""


class PromptError(JanusError):
    """A conversation that cannot become tokens or fills the context; a setting that makes no sense."""


class BundleError(JanusError):
    """A bundle that is damaged, of another version, or not what its manifest says."""


class NotFiniteError(JanusError):
    """A model whose logits or pixels are NaN or infinite, so that whatever it would say or draw is noise."""


class DataError(JanusError):
    """A training sample that cannot be used as it is."""


class TrainingError(JanusError):
    """A training that cannot go on, or cannot start as it was asked to."""


class CheckError(JanusError):
    """A component that does not keep its slot's contract; says which promise, and how it was broken."""


class MissingExtraError(JanusError):
    """Something is needed that this installation leaves out; says the pip line that adds it."""

    def __init__(self, what: str, *extras: str) -> None:
        names = " and ".join(f"'{extra}'" for extra in extras)
        message = f"{what} needs the extra{'s' if len(extras) > 1 else ''} {names}: {pip_line(extras)}"
        if "runtime" in extras:
            for_gpus = ["gpu" if extra == "runtime" else extra for extra in extras]
            message += f"; where an NVIDIA GPU is, instead: {pip_line(for_gpus)}"
        super().__init__(message)


class MissingPackageError(JanusError):
    """A component needs a package that is in none of the extras; says which component, and which package."""

    def __init__(self, what: str, error: ImportError) -> None:
        module = error.name if isinstance(error, ModuleNotFoundError) else None
        if module:
            package = _package(module)
            text = f"the package '{package}', which is not installed: pip install {package}"
        else:  # libraries also raise it for a version that is too old, with advice of their own
            said = (str(error).strip() or "no reason given").splitlines()[0]
            text = f"a package that cannot be imported: {said}"
        super().__init__(f"{what} needs {text}")


def pip_line(extras: Sequence[str]) -> str:
    """Return the line that installs extras; onnxruntime goes before its other build comes."""
    first = "pip uninstall -y onnxruntime && " if "gpu" in extras and _is_distributed("onnxruntime") else ""
    return f"{first}pip install 'janus-modular[{','.join(extras)}]'"


EXTRAS = {
    "torch": ("torch", "transformers", "safetensors", "huggingface_hub", "gguf", "accelerate"),
    "hub": ("huggingface_hub",),
    "train": ("tensorboard",),
    "demo": ("sklearn", "matplotlib"),
    "lora": ("peft",),
    "runtime": ("onnxruntime",),
    "export": ("onnx", "onnxscript", "onnx_ir"),
    "gpu": ("onnxruntime", "tensorrt", "cuda.bindings", "onnx_ir", "onnxscript"),
    "rtx": ("tensorrt_rtx", "cuda.bindings", "onnx_ir", "onnxscript"),
}
"""Which modules each extra adds. Where several bring one, the first is named to whoever lacks it."""

INCLUDES = {
    "train": ("torch",),
    "lora": ("torch",),
    "export": ("torch",),
    "demo": ("train", "export", "runtime"),
}
"""Which other extras an extra takes along."""


def missing_extra(error: ModuleNotFoundError, what: str) -> MissingExtraError | None:
    """Return the error that says which extra brings a missing module; None where none does."""
    package = _package(error.name or "")
    extra = next((extra for extra, names in EXTRAS.items() if package in map(_package, names)), None)
    return MissingExtraError(what, extra) if extra else None


@contextmanager
def reporting_missing_packages(what: str) -> Iterator[None]:
    """Turn an ImportError inside into an error that names the package and ``what`` needs it.

    Raises:
        MissingExtraError: an extra of ours brings the package.
        MissingPackageError: none does.
    """
    try:
        yield
    except ImportError as error:
        extra = missing_extra(error, what) if isinstance(error, ModuleNotFoundError) else None
        raise extra or MissingPackageError(what, error) from error


@contextmanager
def require_extras(what: str, *extras: str) -> Iterator[None]:
    """Import inside what ``extras`` bring: where that is missing, all of them are named that are incomplete.

    `missing_extra` knows the module alone; who knows the command can say the whole line at once.

    Raises:
        MissingExtraError: a module of these extras is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        incomplete = [extra for extra in extras if missing_extras(extra)]
        known = {_package(name) for extra in incomplete for name in missing_extras(extra)}
        if _package(error.name or "") not in known:
            raise
        raise MissingExtraError(what, *incomplete) from error


def missing_extras(extra: str) -> list[str]:
    """Name the modules of an extra, and of those that it includes, that are not installed."""
    included = [name for inner in INCLUDES.get(extra, ()) for name in missing_extras(inner)]
    own = [name for name in EXTRAS[extra] if not _is_installed(name)]
    return list(dict.fromkeys([*included, *own]))


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it lies in
        return False


def _is_distributed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _package(module: str) -> str:
    return module.partition(".")[0]

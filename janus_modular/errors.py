"""Errors that a user can cause and fix; the command line prints them without a traceback.

Each message says what was found, what was expected, and what to do next.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

MAX_WORD = 300
"""Characters of a word in a message; names of files are shorter, and other words come from damaged files."""

LONG_WORD = re.compile(rf"[^\s/\\]{{{MAX_WORD + 1},}}")


class JanusError(Exception):
    """The base of all errors that a user can fix; its text has no control characters and no endless words."""

    def __str__(self) -> str:
        """Return the text with control characters and surrogates escaped; line ends stay."""
        return escaped(LONG_WORD.sub(lambda word: f"{word[0][:MAX_WORD]}...", super().__str__()))


def escaped(text: str) -> str:
    """Return a text in which all unprintable characters but line ends are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def list_briefly(texts: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Return the first ``most`` of some texts, and the number of the others: ``"a, b and 3 more"``."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


class ConfigError(JanusError):
    """A configuration that cannot be built; lists every error with its path."""

    def __init__(self, message: str, errors: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.errors = list(errors)  # `janus_modular.config.FieldError`s, for programs


@dataclass(frozen=True)
class Difference:
    """An option whose value differs from that in the config beside the weights."""

    key: str  # relative to the component: config.rope_theta
    written: object
    described: object


class DescriptionError(ConfigError):
    """Options that contradict how pretrained weights describe themselves (config.json, GGUF metadata).

    A component raises it with keys relative to its own options; the builder adds their path in the config.
    """

    def __init__(self, source: str, differences: Sequence[Difference], *, drop: str | None = None) -> None:
        listed = "; ".join(f"{d.key}: found {d.written!r}, expected {d.described!r}" for d in differences)
        super().__init__(f"{source} says otherwise: {listed}")
        self.source = source
        self.differences = list(differences)
        self.drop = drop  # the option to set to null, so that all values come from the description


class PluginError(JanusError):
    """A component that is unknown, defined twice, or whose plugin does not load."""


class CheckpointError(JanusError):
    """Weights that are missing, unexpected, of another shape, or not readable."""


class ImageError(JanusError):
    """An image that cannot be read, or that is too large to be read safely."""


class PromptError(JanusError):
    """A conversation that cannot become tokens or fills the context, or an invalid setting."""


class BundleError(JanusError):
    """A bundle that is damaged, of another version, or different from its manifest."""


class NotFiniteError(JanusError):
    """A model whose logits or pixels are NaN or infinite, so that its output would be noise."""


class DataError(JanusError):
    """A training sample that cannot be used as it is."""


class UnsupervisedError(DataError):
    """A training sample without any supervised position, such as a conversation with an empty answer."""


class TrainingError(JanusError):
    """A training run that cannot start or continue."""


class EvaluationError(JanusError):
    """An evaluation that cannot start or continue: its questions, prompts, images or ledger."""


class ServingError(JanusError):
    """A request to an engine that did not end with a result, though its prompt and settings are valid."""


class QueueFullError(ServingError):
    """An engine whose queue is full: try again after ``retry_after`` seconds, an estimate."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(ServingError):
    """A request that was not done before its deadline."""


class RequestCancelledError(ServingError):
    """A request that was cancelled, by its client or because the engine was closed."""


class JournalError(ServingError):
    """A journal of drawings that cannot be read or written: the disk is full, for example."""


class CheckError(JanusError):
    """A component that breaks its slot's contract; says which check failed, and how."""


class MissingExtraError(JanusError):
    """A feature needs packages that are not installed; the text has the pip line that adds them."""

    def __init__(self, subject: str, *extras: str) -> None:
        *first, last = (f"'{extra}'" for extra in extras)
        names = f"{', '.join(first)} and {last}" if first else last
        self.need = f"{subject} needs the extra{'s' if len(extras) > 1 else ''} {names}"
        self.extras = extras
        super().__init__(f"{self.need}: {install_hint(extras)}")


class MissingPackageError(JanusError):
    """A component needs a package that is in none of the extras; the text names both."""

    def __init__(self, subject: str, error: ImportError) -> None:
        module = error.name if isinstance(error, ModuleNotFoundError) else None
        if module:
            package = _package(module)
            text = f"the package '{package}', which is not installed: pip install {package}"
        else:  # libraries also raise it for a version that is too old, with advice of their own
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            text = f"a package that cannot be imported: {reason}"
        super().__init__(f"{subject} needs {text}")


def install_hint(extras: Sequence[str]) -> str:
    """Return the line that installs extras, without those that another includes; for a GPU a second one."""
    included = {inner for extra in extras for inner in INCLUDES.get(extra, ())}
    extras = [extra for extra in extras if extra not in included]
    if "runtime" not in extras:
        return pip_line(extras)
    gpu_extras = ["gpu" if extra == "runtime" else extra for extra in extras]
    return f"{pip_line(extras)}; with an NVIDIA GPU, instead: {pip_line(gpu_extras)}"


def pip_line(extras: Sequence[str]) -> str:
    """Return the line that installs extras; onnxruntime is removed before onnxruntime-gpu is installed."""
    first = "pip uninstall -y onnxruntime && " if "gpu" in extras and _is_distributed("onnxruntime") else ""
    return f"{first}pip install 'janus-modular[{','.join(extras)}]'"


EXTRAS = {
    "torch": ("torch", "transformers", "safetensors", "huggingface_hub", "gguf", "accelerate"),
    "hub": ("huggingface_hub",),
    "train": ("tensorboard",),
    "plot": ("matplotlib",),
    "demo": ("sklearn",),
    "lora": ("peft",),
    "parquet": ("pyarrow",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
    "metrics": ("torchmetrics",),
    "runtime": ("onnxruntime",),
    "export": ("onnx", "onnxscript", "onnx_ir"),
    "gpu": ("onnxruntime", "tensorrt", "cuda.bindings", "onnx_ir", "onnxscript"),
    "serve": ("greenlet", "fastapi", "python_multipart", "uvicorn", "prometheus_client"),
    "ui": ("gradio", "httpx"),
    "ray": ("ray",),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
    "rtx": ("tensorrt_rtx", "cuda.bindings", "onnx_ir", "onnxscript"),
}
"""The modules of each extra. Messages name the first extra that has a missing module."""

INCLUDES = {
    "train": ("torch",),
    "lora": ("torch",),
    "metrics": ("torch",),
    "export": ("torch",),
    "ui": ("serve",),
    "ray": ("serve",),
    "otel": ("serve",),
    "demo": ("train", "export", "runtime", "plot"),
}
"""The other extras that an extra includes."""


def missing_extra(error: ModuleNotFoundError, subject: str) -> MissingExtraError | None:
    """Return the error that names the extra of a missing module; None if no extra has it."""
    package = _package(error.name or "")
    extra = next((extra for extra, names in EXTRAS.items() if package in map(_package, names)), None)
    return MissingExtraError(subject, extra) if extra else None


@contextmanager
def reporting_missing_packages(subject: str) -> Iterator[None]:
    """Turn an ImportError inside into an error that names the package and ``subject``, which needs it.

    Raises:
        MissingExtraError: the package is in an extra.
        MissingPackageError: the package is in none.
    """
    try:
        yield
    except ImportError as error:
        extra = missing_extra(error, subject) if isinstance(error, ModuleNotFoundError) else None
        raise extra or MissingPackageError(subject, error) from error


@contextmanager
def require_extras(subject: str, *extras: str, modules: Sequence[str] = ()) -> Iterator[None]:
    """Name all incomplete ``extras`` at once where an import inside fails for lack of their modules.

    `missing_extra` would name the extra of the first missing module alone. ``modules`` are imported only
    later, and checked now.

    Raises:
        MissingExtraError: a module of these extras is not installed.
    """
    try:
        for module in modules:
            if not _is_installed(module):
                raise ModuleNotFoundError(f"No module named '{module}'", name=module)
        yield
    except ModuleNotFoundError as error:
        incomplete = [extra for extra in extras if missing_extras(extra)]
        known = {_package(name) for extra in incomplete for name in missing_extras(extra)}
        if _package(error.name or "") not in known:
            raise
        raise MissingExtraError(subject, *incomplete) from error


def missing_extras(extra: str) -> list[str]:
    """Return the modules of an extra, and of the extras that it includes, that are not installed."""
    included = [name for inner in INCLUDES.get(extra, ()) for name in missing_extras(inner)]
    own = [name for name in EXTRAS[extra] if not _is_installed(name)]
    return list(dict.fromkeys([*included, *own]))


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not installed either
        return False
    except ValueError:  # it was imported, by other means than a file
        return True


def _is_distributed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _package(module: str) -> str:
    return module.partition(".")[0]

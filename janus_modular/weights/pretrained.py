"""Finds the ``pretrained`` weights of a component, on disk or on the hub, and loads them into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from janus_modular.atomic_writes import refuse_interrupted
from janus_modular.capabilities import LoadsPretrained, ReadsPretrained
from janus_modular.errors import CheckpointError, missing_extra
from janus_modular.foreign import OUTPUTS, foreign_errors, is_hub_id, printable
from janus_modular.interfaces import ComponentSpec
from janus_modular.registry import slot_label
from janus_modular.suggest import did_you_mean
from janus_modular.weights.files import open_weights
from janus_modular.weights.loading import LoadResult, belongs_to, load_weights

DESCRIPTIONS = ["*.json", "*.jinja", "*.txt", "*.model"]
"""What is fetched from a hub repository beside weights: configs, tokenizers, templates."""

PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt"]
"""Fetched only where a hub repository has no safetensors; read with ``weights_only=True`` all the same."""


@dataclass
class PretrainedReport:
    """What was loaded into a component, and from where."""

    slot: str
    name: str
    source: str  # as written in the config
    revision: str | None = None  # of a hub model: the commit, or the revision in the config if unknown
    loaded: int = 0  # tensors
    unexpected_keys: list[str] = field(
        default_factory=list
    )  # names in the files that the component does not have

    def __str__(self) -> str:
        source = f"{self.source}@{self.revision[:12]}" if self.revision else self.source
        text = f"{slot_label(self.slot)} '{self.name}': {self.loaded} tensors from {source}"
        if not self.unexpected_keys:
            return text
        keys = ", ".join(self.unexpected_keys[:5]) + (", ..." if len(self.unexpected_keys) > 5 else "")
        return f"{text}; {len(self.unexpected_keys)} unexpected keys: {keys}"


def resolve_pretrained(pretrained: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the path of a folder or file, which is downloaded first if ``pretrained`` is a hub id.

    Hub ids are ``owner/name`` and ``owner/name/x.gguf``. Without ``weights``, only configs and tokenizers are
    downloaded. huggingface_hub's cache and its offline mode (HF_HUB_OFFLINE=1) are used.

    Raises:
        CheckpointError: the argument is neither a path nor a hub model that can be reached.
    """
    with foreign_errors(
        f"'{printable(pretrained)}'", CheckpointError, "Give a path or a hub id (owner/name)."
    ):
        path = Path(pretrained).expanduser()
        if path.exists():
            return path
        refuse_interrupted(path, error=CheckpointError)
    is_path = not is_hub_id(pretrained) or (pretrained.count("/") > 1 and path.parent.is_dir())
    if is_path:  # the form owner/name/file is also that of a path: one into a folder that is here
        near = [str(sibling) for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        expected = "Give a path or a hub id (owner/name)."
        if pretrained.startswith(f"{OUTPUTS}/"):
            expected = (
                "Commands write there: `janus-modular demo` writes runs/demo, and a training its output."
            )
        hint = did_you_mean(str(path), near) or expected
        raise CheckpointError(f"there is no file or folder '{printable(pretrained)}'. {hint}")
    try:
        return _from_hub(pretrained, revision, weights)
    except ModuleNotFoundError as error:
        raise missing_extra(error, "fetching from the hub") or error from error
    except Exception as error:  # also those of its HTTP library, which are of classes of their own
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        owner, name, *file = pretrained.split("/", 2)
        words = [f"{owner}/{name}", *file, *(["--revision", revision] if revision else [])]
        near = [str(sibling) for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        parent = f"The folder '{path.parent}' is here. {did_you_mean(str(path), near)} " if near else ""
        raise CheckpointError(
            f"'{pretrained}'{f' at {revision}' if revision else ''} is no file or folder here, and the hub"
            f" did not give it:\n  {type(error).__name__}: {reason}\n"
            f"{parent}Check the name, and unset HF_HUB_OFFLINE if it is set. Without a network, fetch it on"
            " another machine, copy the folder, and give its path:"
            f" hf download {' '.join(words)} --local-dir FOLDER"
        ) from error


def _from_hub(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    owner, model, *inside = name.split("/")
    if inside:
        return Path(hf_hub_download(f"{owner}/{model}", "/".join(inside), revision=revision))

    def fetch(files: list[str]) -> Path:
        # only from the root of the repository: its folders hold other formats of the same weights
        patterns = [*DESCRIPTIONS, *files]
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*")
        )

    if not weights:
        return fetch([])
    folder = fetch(["*.safetensors"])
    return folder if any(folder.glob("*.safetensors")) else fetch(PICKLES)


def commit_of(path: Path) -> str | None:
    """Read the commit from a path in the hub's cache (``.../snapshots/<commit>/...``)."""
    names = path.parts
    return names[names.index("snapshots") + 1] if "snapshots" in names[:-1] else None


def load_pretrained(module: nn.Module, spec: ComponentSpec) -> PretrainedReport:
    """Load the weights that ``spec.config.pretrained`` names into the component that was built from it.

    A component may load its weights itself (`janus_modular.LoadsPretrained`) or map names
    (`janus_modular.ReadsPretrained`); otherwise the names in the files must be its own.

    Raises:
        CheckpointError: weights are missing or of another shape, or the files hold weights of the component
            that it does not have; unexpected keys of other modules are only reported.
    """
    config = spec.config
    path = resolve_pretrained(config.pretrained, config.revision)
    report = PretrainedReport(spec.slot, spec.name, config.pretrained, commit_of(path) or config.revision)
    subject = f"{config.pretrained}, given to the {slot_label(spec.slot)} '{spec.name}',"
    if isinstance(module, LoadsPretrained):
        with foreign_errors(subject, CheckpointError, "Fetch it again, or name another."):
            report.loaded, missing, report.unexpected_keys = module.load_pretrained(path)
        LoadResult(missing=missing).check(subject)
        return report
    weights = open_weights(path)
    result = load_weights(module, own_tensors(module, weights))
    report.loaded, report.unexpected_keys = result.loaded, weights.unexpected_keys()
    result.check(subject)
    return report


def own_tensors(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a component in pretrained files, under its own names."""
    if isinstance(module, ReadsPretrained):
        yield from module.read_pretrained(weights)
        return
    known = module.state_dict().keys()
    for name in weights:
        if name in known or belongs_to(name, module):
            yield name, weights[name]

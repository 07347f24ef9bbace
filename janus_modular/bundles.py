"""Opens a bundle (an exported model) in a runtime, without torch and without the exporter."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_modular.atomic_writes import refuse_interrupted
from janus_modular.components import Builder
from janus_modular.config import resolve
from janus_modular.config.presets import refuse_config_name
from janus_modular.errors import BundleError, MissingExtraError
from janus_modular.foreign import is_hub_id, path_exists, sha256
from janus_modular.interfaces import ComponentSpec, component
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.plugins.lock import check_lock
from janus_modular.processing.processor import Processor
from janus_modular.protocols import Runtime, VariantRuntime
from janus_modular.sequence import EncodedSpec

MANIFEST = "manifest.json"
"""The file that a bundle's folder has, and a checkpoint's does not."""

RUNTIME = "onnx"
"""The default runtime."""

RUNTIME_EXTRAS = {
    "onnx": ("runtime", ("onnxruntime",)),
    "tensorrt": ("gpu", ("tensorrt", "cuda.bindings")),
    "tensorrt-rtx": ("rtx", ("tensorrt_rtx", "cuda.bindings")),
}
"""For each runtime of this project the extra that it needs, and the modules of the extra that it imports."""

PASSED = re.compile(r"[1-9]\d* passed")
"""The recorded result of a gate that passed."""

DIGESTS = "digests"
"""The manifest's section of what `digest_of` returned when each variant was exported, or last verified."""

log = logging.getLogger(__name__)


@dataclass
class RuntimeChoice:
    """The config of a bundle's runtime."""

    runtime: ComponentSpec = component("runtimes")


def is_bundle(path: str | Path) -> bool:
    """Return True if a path is a bundle's folder."""
    try:
        return (Path(path).expanduser() / MANIFEST).is_file()
    except (OSError, RuntimeError):  # an invalid path, which opening it reports
        return False


def extras_to_open(path: str | Path, runtime: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the extras that a model on this disk needs, and the modules of them that opening it imports.

    Both are empty for any other path, and for a plugin's runtime: opening them names what is missing.
    """
    if is_bundle(path):
        extra, modules = RUNTIME_EXTRAS.get(runtime or RUNTIME, ("", ()))
        return ((extra,) if extra else ()), modules
    with suppress(OSError, RuntimeError, ValueError):  # an invalid path, which opening it reports
        if Path(path).expanduser().is_dir():
            return ("torch",), ("torch", "transformers", "safetensors")
    return (), ()


def find_bundle(path: str | Path) -> Path | None:
    """Return a bundle's folder, given by its path or as ``owner/name`` on the hub; None if it is no bundle.

    Of the hub, huggingface_hub's cache and its offline mode (HF_HUB_OFFLINE=1) are honoured.

    Raises:
        MissingExtraError: the path is a hub id, and huggingface_hub is not installed.
        BundleError: the folder is being replaced, or its replacement was interrupted; or a config is named.
    """
    if is_bundle(path):
        return Path(path).expanduser()
    with suppress(RuntimeError):  # ~user does not exist, which opening it reports
        refuse_interrupted(Path(path).expanduser(), error=BundleError)
    refuse_config_name(path, error=BundleError)
    if path_exists(path) or not is_hub_id(str(path)) or str(path).count("/") != 1:
        return None
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ModuleNotFoundError as error:
        subject = f"'{path}' is no file or folder here; fetching it from the hub"
        raise MissingExtraError(subject, "hub") from error
    try:
        hf_hub_download(str(path), MANIFEST)
        return Path(snapshot_download(str(path)))
    except Exception:  # opening a checkpoint reports them
        return None


def open_bundle(
    folder: str | Path,
    *,
    runtime: str | Mapping[str, Any] | None = None,
    variant: str | None = None,
    device: str = "auto",
    plugins: Plugins | None = None,
    allow_failed: bool = False,
) -> tuple[Runtime, Processor, Plugins]:
    """Open a bundle in a runtime: a registered name, or ``{"name": ..., **options}``.

    The returned plugins resolve a name that several plugins share as the bundle recorded it. Of the recorded
    plugins only those of the samplers are needed; all other components are in the graphs.

    Raises:
        BundleError: the variant's verification failed, or its manifest was edited since (see
            ``allow_failed``).
        JanusError: the bundle is damaged, or the runtime, the variant or the device is not available.
    """
    plugins = plugins or default_plugins()
    folder = Path(folder).expanduser()
    check_lock(folder, plugins)
    options = {"name": runtime} if isinstance(runtime, str) else dict(runtime or {})
    options = {"name": RUNTIME, "device": device, **options}
    if variant is not None:
        options["variant"] = variant
    spec = resolve({"runtime": options}, RuntimeChoice, plugins).runtime
    opened: Runtime = Builder(plugins)(spec, folder)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))  # the runtime checked it
    if not allow_failed:
        opened_variant = opened.variant if isinstance(opened, VariantRuntime) else None
        check_proof(folder, manifest, opened_variant, spec.name)
    processor = Processor.load(folder)
    processor.encoded = encoded_spec(manifest)
    return opened, processor, plugins.as_recorded(manifest.get("plugins", []))


def describe_encoded(spec: EncodedSpec) -> dict[str, Any]:
    """Return the entry of a manifest that `encoded_spec` reads."""
    return {"shape": list(spec.shape), "ids": None if spec.ids is None else list(spec.ids)}


def encoded_spec(manifest: Mapping[str, Any]) -> EncodedSpec | None:
    """Return the form in which images can be given to a bundle; None where its manifest does not say it."""
    encoded = manifest.get("model", {}).get("image_target", {}).get("encoded")
    if encoded is None:
        return None
    return EncodedSpec(tuple(encoded["shape"]), encoded["ids"] and tuple(encoded["ids"]))


def check_weights(folder: Path, variant: str) -> None:
    """Compare the weights of a variant with their hashes; opening a bundle hashes all other files.

    Raises:
        BundleError: a file differs.
    """
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    for name in manifest["variants"][variant]["weights"]:
        if sha256(folder / name) != manifest["sha256"][name]:
            raise BundleError(
                f"{folder / name} differs from the manifest's hash: it is damaged, or was changed. Fetch the"
                " bundle again, or export the model again."
            )


def digest_of(manifest: Mapping[str, Any], variant: str) -> str:
    """Return the hash of a manifest's sections that describe a variant: its own, shared ones, files' hashes.

    Results (verification, builds, executions), the source and other variants may change and are not hashed.
    """
    files = {name: {*v["files"].values(), *v["weights"]} for name, v in manifest["variants"].items()}
    not_covered = set().union(*files.values()) - files[variant]
    used = manifest["variants"][variant]["files"]
    covered = {
        **{section: manifest[section] for section in ("schema", "model", "plugins", "axes", "cache")},
        "variant": {variant: manifest["variants"][variant]},
        "graphs": {
            name: _without_dtypes(graph) for name, graph in manifest["graphs"].items() if name in used
        },
        "sha256": {name: digest for name, digest in manifest["sha256"].items() if name not in not_covered},
    }
    return hashlib.sha256(json.dumps(covered, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _without_dtypes(graph: Mapping[str, Any]) -> dict[str, Any]:
    """Return a graph's description without the dtypes that differ between variants."""
    return {
        side: [
            {**tensor, "dtype": None} if isinstance(tensor, dict) and tensor.get("varies") else tensor
            for tensor in tensors
        ]
        for side, tensors in graph.items()
    }


def check_proof(folder: Path, manifest: Mapping[str, Any], variant: str | None, runtime: str) -> None:
    """Check that a variant passed `verify` and was not edited since; log if it was never verified.

    Raises:
        BundleError: its verification failed, or it was edited; says which gate failed, and how to open the
            variant all the same.
    """
    if variant is None or variant not in manifest.get("variants", {}):
        return
    verify = f"janus-modular verify {folder} --against MODEL --variant {variant}"
    verify += "" if runtime == RUNTIME else f" --runtime {runtime}"
    anyway = "; to open it as it is: --allow-failed (allow_failed=True in Python)"
    if manifest.get(DIGESTS, {}).get(variant) != digest_of(manifest, variant):
        raise BundleError(
            f"{folder / MANIFEST} describes the variant '{variant}' differently than when it was exported or"
            f" verified: it was edited since. Verify it again: {verify}{anyway}"
        )
    proofs = manifest.get("parity", {})
    keys = [variant] if runtime == RUNTIME else [variant, f"{variant} {runtime}"]
    for key in keys:
        gates = proofs.get(key, {}).get("gates", {})
        failed = [f"{name}: {result}" for name, result in gates.items() if not PASSED.fullmatch(result)]
        if key in proofs and not gates:
            failed = ["no gate was run"]
        if key in proofs and (failed or proofs[key].get("passed") is not True):
            raise BundleError(
                f"the variant '{key}' of {folder} FAILED its verification ({proofs[key].get('at')}):"
                f" {'; '.join(failed) or 'no message'}.\nExport it again, or take another variant, or"
                f" see what is wrong: {verify}{anyway}"
            )
    if keys[-1] not in proofs:
        log.warning("the variant '%s' of %s was never verified: %s", keys[-1], folder, verify)

"""Opening a bundle: an exported model, which a plugin runs. Needs neither torch nor the exporter."""

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
from janus_modular.errors import BundleError, MissingExtraError
from janus_modular.foreign import is_hub_id, path_exists
from janus_modular.interfaces import ComponentSpec, component
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.processing.processor import Processor
from janus_modular.protocols import Runtime

MANIFEST = "manifest.json"
"""What a bundle's folder has, and a checkpoint's has not."""

RUNTIME = "onnx"
"""The runtime that is taken where nobody chooses."""

DIGESTS = "digests"
"""The manifest's section of what `digest_of` returned when each variant was exported, or last verified."""

log = logging.getLogger(__name__)


@dataclass
class Running:
    """How a bundle is to be run."""

    runtime: ComponentSpec = component("runtimes")


def is_bundle(path: str | Path) -> bool:
    """Say whether a path is a bundle's folder."""
    try:
        return (Path(path).expanduser() / MANIFEST).is_file()
    except (OSError, RuntimeError):  # no file can be called so: whoever opens it has more to say
        return False


def find_bundle(path: str | Path) -> Path | None:
    """Return a bundle's folder, given by its path or as ``owner/name`` on the hub; None if it is none.

    Of the hub, huggingface_hub's cache and its offline mode (HF_HUB_OFFLINE=1) are honoured.

    Raises:
        MissingExtraError: the path is a hub id, and huggingface_hub is not installed.
        BundleError: what stood there is being replaced, or that was interrupted.
    """
    if is_bundle(path):
        return Path(path).expanduser()
    with suppress(RuntimeError):  # there is no such user: whoever opens it says so
        refuse_interrupted(Path(path).expanduser(), error=BundleError)
    if path_exists(path) or not is_hub_id(str(path)) or str(path).count("/") != 1:
        return None
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ModuleNotFoundError as error:
        what = f"'{path}' is no file or folder here; fetching it from the hub"
        raise MissingExtraError(what, "hub") from error
    try:
        hf_hub_download(str(path), MANIFEST)
        return Path(snapshot_download(str(path)))
    except (OSError, ValueError):  # all of huggingface_hub's errors; a checkpoint's opener says what is wrong
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

    The plugins are those given (or all), with names that several share meaning what the bundle recorded.
    Of what it recorded only the sampler that is used is needed: everything else is in its graphs.

    Raises:
        BundleError: the variant's verification failed, or its manifest was edited since (see
            ``allow_failed``).
        JanusError: the bundle is damaged, or the runtime, the variant or the device is not here.
    """
    plugins = plugins or default_plugins()
    folder = Path(folder).expanduser()
    chosen = {"name": runtime} if isinstance(runtime, str) else dict(runtime or {})
    chosen = {"name": RUNTIME, "device": device, **chosen}
    if variant is not None:
        chosen["variant"] = variant
    one = resolve({"runtime": chosen}, Running, plugins).runtime
    opened: Runtime = Builder(plugins)(one, folder)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))  # the runtime checked it
    if not allow_failed:
        check_proof(folder, manifest, getattr(opened, "variant", None), one.name)
    return opened, Processor.load(folder), plugins.as_recorded(manifest.get("plugins", []))


def digest_of(manifest: Mapping[str, Any], variant: str) -> str:
    """Return the hash of what a manifest says of a variant: its record, what all share, hashes of files.

    Results (what was verified, built, executed), where the model came from, and other variants are left out,
    so that these may come and go.
    """
    files = {name: {*one["files"].values(), *one["weights"]} for name, one in manifest["variants"].items()}
    others = set().union(*(of for name, of in files.items() if name != variant)) - files[variant]
    graphs = manifest["variants"][variant]["files"]
    covered = {
        **{section: manifest[section] for section in ("schema", "model", "plugins", "axes", "cache")},
        "variant": {variant: manifest["variants"][variant]},
        "graphs": {name: _without_dtypes(one) for name, one in manifest["graphs"].items() if name in graphs},
        "sha256": {name: digest for name, digest in manifest["sha256"].items() if name not in others},
    }
    return hashlib.sha256(json.dumps(covered, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _without_dtypes(graph: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the dtypes of slots that vary: written are those of the bundle's first variant."""
    return {
        side: [
            {**slot, "dtype": None} if isinstance(slot, dict) and slot.get("varies") else slot
            for slot in slots
        ]
        for side, slots in graph.items()
    }


def check_proof(folder: Path, manifest: Mapping[str, Any], variant: str | None, runtime: str) -> None:
    """Refuse a variant that `verify` found wrong, or that was edited; log that it was never verified.

    Raises:
        BundleError: either holds; with the gate that failed, and how to open the variant all the same.
    """
    if variant is None or variant not in manifest.get("variants", {}):
        return
    verify = f"janus-modular verify {folder} --against MODEL --variant {variant}"
    verify += "" if runtime == RUNTIME else f" --runtime {runtime}"
    anyway = "; to open it as it is: --allow-failed (allow_failed=True in Python)"
    if manifest.get(DIGESTS, {}).get(variant) != digest_of(manifest, variant):
        raise BundleError(
            f"{folder / MANIFEST} says something else of the variant '{variant}' than when it was exported or"
            f" verified: it was edited since. Verify it again: {verify}{anyway}"
        )
    proofs = manifest.get("parity", {})
    keys = [variant] if runtime == RUNTIME else [variant, f"{variant} {runtime}"]
    for key in keys:
        if key in proofs and proofs[key].get("passed") is not True:
            failed = [
                f"{gate}: {found}"
                for gate, found in proofs[key].get("gates", {}).items()
                if not re.fullmatch(r"\d+ passed", found)
            ]
            raise BundleError(
                f"the variant '{key}' of {folder} FAILED its verification ({proofs[key].get('at')}):"
                f" {'; '.join(failed) or 'no gate says why'}.\nExport it again, or take another variant, or"
                f" see what is wrong: {verify}{anyway}"
            )
    if keys[-1] not in proofs:
        log.warning("the variant '%s' of %s was never verified: %s", keys[-1], folder, verify)

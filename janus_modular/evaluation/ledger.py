"""The ledger: a JSONL file with a line per result, so that an interrupted evaluation continues.

The first line has the settings and the model. A ledger of other settings or of another model is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_modular.atomic_writes import temporary_path
from janus_modular.bundles import MANIFEST, digest_of, find_bundle
from janus_modular.errors import EvaluationError
from janus_modular.foreign import reason
from janus_modular.locking import locked
from janus_modular.protocols import VariantRuntime

if TYPE_CHECKING:
    from janus_modular.janus import Janus

VERSION = 1


class Ledger:
    """Results by key, each written when it is known. Make one with `open_ledger`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, dict[str, Any]] = {}

    def append(self, result: dict[str, Any]) -> None:
        """Write a result, which has a ``key``, to the end of the file."""
        self._write(result)
        self.results[result["key"]] = result

    def known(self, key: str, prompt_hash: str) -> dict[str, Any] | None:
        """Return the result of a key, or None.

        Raises:
            EvaluationError: the result is that of another prompt.
        """
        result = self.results.get(key)
        if result is not None and result.get("prompt_sha256") != prompt_hash:
            raise EvaluationError(
                f"{self.path}: '{key}' has the result of another prompt or image; expected that of the"
                " same. The data changed since: choose another --out."
            )
        return result

    def read(self, header: Mapping[str, Any]) -> None:
        """Read the results of an earlier evaluation, or begin the file; drop a line that was cut by a kill.

        Raises:
            EvaluationError: the ledger is damaged, or of other settings.
        """
        written = {"ledger": VERSION, **json.loads(json.dumps(header))}
        content = self.path.read_bytes() if self.path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:
            with write_errors(self.path), self.path.open("r+b") as file:
                file.truncate(len(complete))
        if not complete:
            self._write(written)
            return
        first, *lines = complete.splitlines()
        self._compare(self._parsed(first, 1), written)
        for number, line in enumerate(lines, 2):
            result = self._parsed(line, number)
            if not isinstance(result.get("key"), str):
                raise self._damaged(number, "found no key")
            self.results[result["key"]] = result

    def _write(self, line: Mapping[str, Any]) -> None:
        with write_errors(self.path), self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._damaged(number, "found no JSON") from error
        if not isinstance(parsed, dict):
            raise self._damaged(number, f"found a {type(parsed).__name__}")
        return parsed

    def _damaged(self, number: int, problem: str) -> EvaluationError:
        return EvaluationError(
            f"{self.path}, line {number}: {problem}; expected a JSON object as `eval` writes it. Remove the"
            " line, or choose another --out."
        )

    def _compare(self, written: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        differences = [
            f"{name}: found {written.get(name)!r:.200}, expected {expected.get(name)!r:.200}"
            for name in dict.fromkeys([*expected, *written])
            if written.get(name) != expected.get(name)
        ]
        if differences:
            raise EvaluationError(
                f"{self.path} is the ledger of another evaluation:\n  "
                + "\n  ".join(differences)
                + "\nUse the same settings and model, or choose another --out."
            )


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an error of the file system while ``path`` is written into one that says how to continue.

    Raises:
        EvaluationError: the body raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise EvaluationError(
            f"{path} could not be written: {reason(error)}. Free the disk or choose another --out; the same"
            " command continues the evaluation."
        ) from error


@contextmanager
def open_ledger(out: Path, header: Mapping[str, Any]) -> Iterator[Ledger]:
    """Yield the ledger of the folder ``out``, which has one writer at a time.

    Raises:
        EvaluationError: another process writes it, or it is of other settings.
    """
    ledger = Ledger(out / "ledger.jsonl")
    with locked(temporary_path(ledger.path, "lock"), ledger.path, error=EvaluationError):
        ledger.read(header)
        yield ledger


def sha256_of(*texts: str | bytes) -> str:
    """Return the SHA-256 of texts and bytes, each with its length."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def identity_of(janus: Janus, model: str, runtime: str | None) -> dict[str, Any]:
    """Return what identifies a model in a ledger: the hash of its weights, dtype, runtime and variant."""
    variant = janus.runtime.variant if isinstance(janus.runtime, VariantRuntime) else None
    if folder := find_bundle(model):
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        digest = digest_of(manifest, variant or next(iter(manifest["variants"])))
        return {"sha256": digest, "dtype": None, "runtime": runtime or "onnx", "variant": variant}
    import torch

    hashed = hashlib.sha256()
    for name, tensor in sorted(janus.model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    dtype = next(janus.model.backbone.parameters()).dtype  # type: ignore[attr-defined]
    return {
        "sha256": hashed.hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
        "runtime": "torch",
        "variant": None,
    }

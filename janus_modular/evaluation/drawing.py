"""Draws the prompts of a benchmark into its folders; each image has a line in the ledger."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from janus_modular.answers import Drawings
from janus_modular.atomic_writes import atomic_replace, write_text
from janus_modular.errors import EvaluationError
from janus_modular.evaluation.benchmarks import BenchmarkPrompt
from janus_modular.evaluation.ledger import Ledger, open_ledger, sha256_of, write_errors
from janus_modular.evaluation.results import Results, batched
from janus_modular.evaluation.schema import EvalConfig
from janus_modular.foreign import name_in_errors, sha256
from janus_modular.janus import Janus


def draw_prompts(
    janus: Janus,
    prompts: Sequence[BenchmarkPrompt],
    config: EvalConfig,
    out: Path,
    identity: Mapping[str, Any],
    on_progress: Callable[[int, int], None],
) -> Results:
    """Draw the prompts whose images are not in the ledger in ``out``; return the numbers of images.

    Raises:
        EvaluationError: the ledger is that of another evaluation, or an image has changed since it was
            written.
        PromptError: a setting is unknown, or a prompt fills the context.
    """
    n = config.images_per_prompt
    settings = asdict(janus.image_settings(config.settings))
    with open_ledger(out, _header(config, settings, identity)) as ledger:
        pending = [prompt for prompt in prompts if not _is_drawn(prompt, out, ledger, n)]
        done = len(prompts) - len(pending)
        for batch in batched(pending, max(1, config.batch_size // n)):
            on_progress(done, len(prompts))
            numbers = [number for prompt in batch for number in range(prompt.first, prompt.first + n)]
            texts = [prompt.text for prompt in batch]
            with name_in_errors(batch[0].files[0]):
                drawn = _draw(janus, config, texts, n, numbers)
            for index, prompt in enumerate(batch):
                images = slice(index * n, (index + 1) * n)
                encoded = [None] * n if drawn.encoded is None else drawn.encoded[images]
                _write(prompt, drawn[images], encoded, out, ledger, settings, identity)
            done += len(batch)
        on_progress(done, len(prompts))
    return Results({"all": {"prompts": len(prompts), "images": len(prompts) * n}}, settings)


def check_ledger(
    janus: Janus, config: EvalConfig, out: Path, identity: Mapping[str, Any], share: float
) -> tuple[int, list[str]]:
    """Draw a random share of a ledger's images again; return their number, and keys whose codes differ.

    Raises:
        EvaluationError: the ledger is missing or empty, that of another evaluation, or without codes.
    """
    if not (out / "ledger.jsonl").is_file():
        raise EvaluationError(f"{out} has no ledger.jsonl; expected a folder that `eval` drew into.")
    settings = asdict(janus.image_settings(config.settings))
    with open_ledger(out, _header(config, settings, identity)) as ledger:
        results = list(ledger.results.values())
    if not results or any(result.get("codes_sha256") is None for result in results):
        raise EvaluationError(f"{ledger.path} has no hashes of codes to compare: nothing can be checked.")
    chosen = random.sample(results, ceil(share * len(results)))
    differing = []
    for batch in batched(chosen, config.batch_size):
        texts = [result["prompt"] for result in batch]
        encoded = _draw(janus, config, texts, 1, [result["number"] for result in batch]).encoded or []
        differing += [
            result["key"]
            for result, codes in zip(batch, encoded, strict=True)
            if hash_of(codes) != result["codes_sha256"]
        ]
    return len(chosen), differing


def hash_of(codes: NDArray[Any]) -> str:
    """Return the SHA-256 of codes: of type, shape and values, as little-endian int64 or float32."""
    values = codes.astype("<i8" if codes.dtype.kind in "iu" else "<f4")
    return sha256_of(f"{values.dtype.str} {values.shape}", np.ascontiguousarray(values).tobytes())


def _header(config: EvalConfig, settings: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    n = config.images_per_prompt
    return {"evaluate": config.evaluate, "n": n, "settings": dict(settings), "model": dict(identity)}


def _draw(janus: Janus, config: EvalConfig, texts: Sequence[str], n: int, numbers: Sequence[int]) -> Drawings:
    """Return ``n`` images of each text, with the noise of their numbers: the same in any batch."""
    return janus.draw(texts, n, batch_size=config.batch_size, **config.settings, numbers=numbers)


def _key(prompt: BenchmarkPrompt, index: int) -> str:
    return prompt.files[index] if len(prompt.files) > 1 else f"{prompt.files[0]} {index}"


def _is_drawn(prompt: BenchmarkPrompt, out: Path, ledger: Ledger, n: int) -> bool:
    """Return True if all images of a prompt are in the ledger, and on disk as they were written."""
    for index in range(n):
        result = ledger.known(_key(prompt, index), sha256_of(prompt.text))
        if result is None:
            return False
        file = out / prompt.files[min(index, len(prompt.files) - 1)]
        if not file.is_file():
            return False
        if sha256(file) != result["png_sha256"]:
            raise EvaluationError(
                f"{file} has changed since it was drawn; expected the hash in {ledger.path}. Remove the file"
                " to draw it again."
            )
    return True


def _write(
    prompt: BenchmarkPrompt,
    images: Sequence[Image.Image],
    encoded: Sequence[NDArray[Any] | None],
    out: Path,
    ledger: Ledger,
    settings: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> None:
    """Write the images of a prompt, and then their lines of the ledger."""
    for name, text in prompt.metadata.items():
        with write_errors(out / name):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(out / name, text)
    is_grid = len(prompt.files) < len(images)
    drawn = [Drawings(images, []).grid(gap=0)] if is_grid else images
    hashes = [_write_png(out / file, image) for file, image in zip(prompt.files, drawn, strict=True)]
    for index, codes in enumerate(encoded):
        ledger.append(
            {
                "key": _key(prompt, index),
                "prompt": prompt.text,
                "prompt_sha256": sha256_of(prompt.text),
                **{name: settings.get(name) for name in ("seed", "guidance", "temperature")},
                "number": prompt.first + index,
                **{name: identity[name] for name in ("dtype", "runtime", "variant")},
                "codes_sha256": None if codes is None else hash_of(codes),
                "png_sha256": hashes[0 if is_grid else index],
            }
        )


def _write_png(file: Path, image: Image.Image) -> str:
    """Write an image atomically; return the SHA-256 of the file."""
    content = BytesIO()
    image.save(content, "PNG")
    with write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replace(file, error=EvaluationError) as temporary:
            temporary.write_bytes(content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()

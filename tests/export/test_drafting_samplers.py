"""Samplers that check drafts, in bundles: the codes of drawing one by one, and the words of torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.verify import verify
from janus_modular import BundleError, PromptError
from janus_modular.checkpoints import convert
from janus_modular.config import load, resolve
from janus_modular.janus import Janus

QUESTIONS = [("what what what what", []), ("a longer question, no image", []), ("which?", [])]


@pytest.fixture(scope="module")
def torches(tiny_checkpoint: Path) -> Janus:
    return Janus.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def bundled(tiny_bundle: Path) -> Janus:
    return Janus.from_pretrained(tiny_bundle, runtime={"name": "onnx", "threads": 1})


def drafting(janus: Janus) -> Janus:
    """Return the same model with the samplers that check drafts."""
    again = Janus(janus.runtime, janus.processor, janus.plugins)
    return again.use_samplers(text="prompt-lookup", image="parallel")


@pytest.fixture(autouse=True)
def own_samplers_again(torches: Janus, bundled: Janus) -> Any:
    yield
    for janus in (torches, bundled):
        janus.use_samplers(text="text", image="autoregressive")


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_onnx_runtime_draws_the_codes_of_drawing_one_by_one(
    torches: Janus, bundled: Janus, codes_of: Callable[..., Any], guidance: float, temperature: float
) -> None:
    for seed in range(3 if temperature else 1):
        settings = {"guidance": guidance, "temperature": temperature, "seed": seed}
        expected, _ = codes_of(torches, **settings)
        np.testing.assert_array_equal(codes_of(bundled, **settings)[0], expected)
        codes, _ = codes_of(drafting(bundled), **settings)
        np.testing.assert_array_equal(codes, expected)
        bundled.use_samplers(text="text", image="autoregressive")


def test_onnx_runtime_continues_a_prefix(
    torches: Janus, bundled: Janus, codes_of: Callable[..., Any]
) -> None:
    expected, _ = codes_of(torches, seed=7, prefix=[3, 60, 0, 7, 12])
    codes, _ = codes_of(drafting(bundled), seed=7, prefix=[3, 60, 0, 7, 12], window=6, drafts="left")
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0])
def test_onnx_runtime_answers_as_torch_does(torches: Janus, bundled: Janus, temperature: float) -> None:
    settings = {"max_tokens": 24, "temperature": temperature, "seed": 5}
    expected = torches.chat_batch(QUESTIONS, **settings)
    assert drafting(bundled).chat_batch(QUESTIONS, **settings) == expected


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_engines_draw_the_codes_of_drawing_one_by_one(
    torches: Janus,
    machine: Any,
    built_bundle: Path,
    codes_of: Callable[..., Any],
    target: str,
    guidance: float,
) -> None:
    janus = Janus.from_pretrained(built_bundle, runtime=target).use_samplers(image="parallel")
    settings = {"guidance": guidance, "seed": 7, "batch_size": 1}
    expected, _ = codes_of(torches, **settings)
    codes, _ = codes_of(janus, **settings)
    np.testing.assert_array_equal(codes, expected)


def test_engines_answer_as_torch_does(torches: Janus, machine: Any, built_bundle: Path) -> None:
    janus = Janus.from_pretrained(built_bundle, runtime="tensorrt").use_samplers(text="prompt-lookup")
    settings = {"max_tokens": 16, "seed": 5, "window": 2}
    expected = torches.chat_batch(QUESTIONS, max_tokens=16, seed=5)
    assert janus.chat_batch(QUESTIONS, **settings) == expected


def test_passes_keep_their_addresses(machine: Any, built_bundle: Path) -> None:
    """What `take` copies lies elsewhere each time; graphs are captured once, and no memory is added."""
    janus = Janus.from_pretrained(built_bundle, runtime="tensorrt").use_samplers(image="parallel")
    session = janus.runtime.open(64)
    prompt = janus.processor.draw_prompt("a")
    sampler, settings = janus._image_sampler({"window": 2, "guidance": 1.0})
    steps = sampler(session, [prompt], settings)
    for _ in range(4):
        next(steps)
    captured, calls = machine.counted("capture"), len(session.sampler_calls)
    for _ in range(3):
        next(steps)
    assert (machine.counted("capture"), len(session.sampler_calls)) == (captured, calls)


def test_more_images_than_an_engine_was_built_for_raise(machine: Any, built_bundle: Path) -> None:
    janus = Janus.from_pretrained(built_bundle, runtime="tensorrt").use_samplers(image="parallel")
    with pytest.raises(PromptError, match=r"images: 15 at once.* built for 1 to 8.*a smaller window"):
        janus.draw("a", 1, window=16)


def test_a_bundle_without_the_graph_or_the_grid_raises(tiny_bundle: Path) -> None:
    janus = Janus.from_pretrained(tiny_bundle, variant="fp32").use_samplers(image="parallel")
    manifest = janus.runtime.bundle.manifest
    assert manifest["model"]["sizes"].pop("grid") == [4, 4]
    with pytest.raises(PromptError, match="export the model again, or set drafts=left"):
        janus.draw("a", 1)
    assert len(janus.draw("a", 1, drafts="left")) == 1
    del manifest["variants"]["fp32"]["files"]["embed_codes"]
    janus = Janus(type(janus.runtime)(janus.runtime.config, tiny_bundle), janus.processor, janus.plugins)
    del janus.use_samplers(image="parallel").runtime.bundle.manifest["variants"]["fp32"]["files"][
        "embed_codes"
    ]
    with pytest.raises(BundleError, match=r"no graph 'embed_codes' .* Export it again with: janus-modular"):
        janus.draw("a", 1)


@pytest.mark.slow
def test_a_bundle_with_these_samplers_is_verified(tmp_path: Path, tiny_checkpoint: Path) -> None:
    names = ["text_sampler=prompt-lookup", "image_sampler=parallel"]
    convert(tiny_checkpoint, tmp_path / "model", overrides=names)
    export(tmp_path / "model", tmp_path / "bundle", resolve(load("export/portable"), ExportConfig))
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["model"]["image_sampler"] == "parallel"
    [report] = verify(tmp_path / "bundle", tmp_path / "model", variants=["fp32"])
    assert report.passed

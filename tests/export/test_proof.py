"""Variants that failed or were edited open only with `allow_failed`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from janus_export.bundle.bundle import BundleError, load_bundle, write_manifest
from janus_modular import Janus
from janus_modular.bundles import DIGESTS, digest_of
from janus_modular.cli.app import app

Manifest = dict[str, Any]
PASSED = {"passed": True, "how": "here", "at": "2026-01-01 00:00 UTC", "gates": {"rows": "5 passed"}}
FAILED = {
    **PASSED,
    "passed": False,
    "gates": {"checker": "7 passed", "rows": "a row alone: nan, wanted <= 1e-04"},
}


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def edit(folder: Path, change: Callable[[Manifest], Any]) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    change(manifest)
    write_manifest(folder, manifest)
    return folder


def open_(folder: Path, **options: Any) -> Janus:
    return Janus.from_pretrained(folder, device="cpu", runtime={"name": "onnx", "threads": 1}, **options)


def test_a_variant_that_was_never_verified_opens_with_a_line(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_(copied)
    [line] = caplog.messages
    assert "variant 'fp32'" in line
    assert f"janus-modular verify {copied} --against MODEL --variant fp32" in line


def test_a_variant_that_passed_opens_without_a_word(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(copied, lambda manifest: manifest["parity"].update({"fp32": PASSED, "cpu-int4": FAILED}))
    open_(copied)
    assert caplog.messages == []


def test_a_variant_that_failed_opens_only_with_allow_failed(copied: Path) -> None:
    edit(copied, lambda manifest: manifest["parity"].update({"fp32": PASSED, "cpu-int4": FAILED}))
    with pytest.raises(BundleError, match=r"'cpu-int4' .*FAILED.*: rows: a row alone: nan") as raised:
        open_(copied, variant="cpu-int4")
    assert "checker" not in str(raised.value)
    assert open_(copied, variant="cpu-int4", allow_failed=True).runtime.variant == "cpu-int4"


@pytest.mark.parametrize("result", ["a row alone: nan, wanted <= 1e-04", "0 passed"])
def test_a_record_that_says_passed_beside_a_failed_gate_is_a_failure(copied: Path, result: str) -> None:
    edit(
        copied, lambda m: m["parity"].update(fp32=PASSED | {"gates": {"checker": "7 passed", "rows": result}})
    )
    with pytest.raises(BundleError, match=rf"'fp32' .*FAILED.*: rows: {result[:8]}"):
        open_(copied)


@pytest.mark.parametrize(
    "words", [["chat", "hello", "--max-tokens", "2"], ["draw", "a", "-n", "1"], ["bench"]]
)
def test_commands_refuse_it_and_take_it_with_an_option(
    copied: Path, words: list[str], tmp_path: Path
) -> None:
    edit(copied, lambda manifest: manifest["parity"].update({"fp32": FAILED}))
    command, *rest = words
    line = [command, str(copied), *rest]
    line += ["-o", str(tmp_path / "out.png")] if command == "draw" else []
    line += ["--tokens", "1", "--rounds", "1", "--threads", "1"] if command == "bench" else []
    refused = CliRunner().invoke(app, line)
    assert refused.exit_code == 2
    assert "FAILED" in refused.output
    assert "--allow-failed" in refused.output
    assert CliRunner().invoke(app, [*line, "--allow-failed"]).exit_code == 0


EDITS: dict[str, Callable[[Manifest], Any]] = {
    "context": lambda m: m["model"].update(context=m["model"]["context"] - 1),
    "pad_id": lambda m: m["model"].update(pad_id=m["model"]["pad_id"] + 1),
    "suppressed_ids": lambda m: m["model"].update(suppressed_ids=[*m["model"]["suppressed_ids"], 1]),
    "text_sampler": lambda m: m["model"].update(text_sampler="autoregressive"),
    "guided": lambda m: m["model"]["rows"].update(guided=3),
    "a size of a plugin's": lambda m: m["model"]["sizes"].update(steps=7),
    "the cache's form": lambda m: m["cache"].update(form="rows, heads, width, capacity"),
    "an axis": lambda m: m["axes"]["rows"].update(max=10**6),
    "a plugin": lambda m: m["plugins"][0].update(dist="acme"),
    "quantization": lambda m: m["variants"]["fp32"].update(
        quantization=m["variants"]["cpu-int4"]["quantization"]
    ),
    "a hash": lambda m: m["sha256"].update({"processor.json": "0" * 64}),
}


@pytest.mark.parametrize("edited", EDITS)
@pytest.mark.parametrize("verified", [False, True])
def test_an_edited_manifest_is_refused(copied: Path, edited: str, verified: bool) -> None:
    if verified:
        edit(copied, lambda manifest: manifest["parity"].update(fp32=PASSED))
    edit(copied, EDITS[edited])
    with pytest.raises(BundleError, match=r"edited since|has changed"):
        open_(copied)


def test_records_of_other_variants_may_change(copied: Path) -> None:
    def take_out(manifest: Manifest) -> None:
        files = {
            *manifest["variants"]["cpu-int4"]["files"].values(),
            *manifest["variants"]["cpu-int4"]["weights"],
        }
        del manifest["variants"]["cpu-int4"]
        kept = {
            name
            for one in manifest["variants"].values()
            for name in (*one["files"].values(), *one["weights"])
        }
        for name in files - kept:
            del manifest["sha256"][name], manifest["bytes"][name]

    before = {name: digest_of(load_bundle(copied).manifest, name) for name in ("fp32", "cpu-int8")}
    edit(copied, take_out)
    assert before == {name: digest_of(load_bundle(copied).manifest, name) for name in before}
    open_(copied, variant="cpu-int8")


def test_a_variant_without_a_digest_is_refused(copied: Path) -> None:
    edit(copied, lambda manifest: manifest[DIGESTS].pop("fp32"))
    with pytest.raises(BundleError, match="edited since"):
        open_(copied)


def wrong(*path: str | int, value: Any) -> Callable[[Manifest], None]:
    """Put ``value`` where a path leads, and sign it, as if that had been exported."""

    def change(manifest: Manifest) -> None:
        inner: Any = manifest
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        manifest[DIGESTS] = {name: digest_of(manifest, name) for name in manifest["variants"]}

    return change


BACKBONE = ("graphs", "backbone")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (wrong(*BACKBONE, "aliases", value=[]), r"backbone\.aliases has 0 pairs, the graph writes 4"),
        (wrong(*BACKBONE, "aliases", 0, value=["hidden", "x"]), "the graph writes 4 outputs in place"),
        (wrong(*BACKBONE, "inputs", 1, "name", value="position"), "inputs has position int64"),
        (wrong(*BACKBONE, "inputs", 2, "dtype", value="uint8"), "mask uint8 .*the graph mask bool"),
        (wrong(*BACKBONE, "inputs", 0, "shape", 2, value=32), r"x float32 \(rows, tokens, 32\)"),
        (wrong(*BACKBONE, "outputs", 0, "shape", 1, value="capacity"), r"hidden float32 \(rows, capacity"),
        (wrong("graphs", "sample_text", "outputs", value=[]), r"sample_text\.outputs has 0 in another order"),
        (wrong("graphs", "sample_image", "inputs", 2, "name", value="temperature"), "the graph guidance"),
        (wrong("model", "hidden_size", value=32), r"model\.hidden_size is 32, backbone has 64"),
        (wrong("model", "vocab_size", value=3), r"model\.vocab_size is 3, sample_text has"),
        (
            wrong("model", "image_target", "height", value=8),
            r"image_target\.height and width are 8 and 32, decode_image has",
        ),
        (wrong("model", "image_input", "positions", value=1), r"positions is 1, understand has"),
        (wrong("cache", "layers", value=9), r"cache\.layers is 9, backbone has 2"),
        (wrong("axes", "rows", "min", value=99), r"axes\.rows is .*expected min <= typical <= max"),
        (wrong("variants", "fp32", "dtype", value="float16"), "float16 .*the graph .*float32"),
    ],
)
def test_a_manifest_that_says_something_else_than_its_graphs_is_refused(
    copied: Path, change: Callable[[Manifest], None], found: str
) -> None:
    edit(copied, change)
    with pytest.raises(BundleError, match=found):
        load_bundle(copied)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [path, *(leaf for key, inner in pairs for leaf in leaves(inner, (*path, key)))]
    return [path]


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**70), st.floats(allow_nan=False), st.text(max_size=9),
    st.just([]), st.just({}), st.just([1]), st.just({"x": 1}),
)  # fmt: skip


def use(janus: Janus) -> tuple[str, bytes]:
    [image] = janus.draw("a", seed=3)
    return janus.chat("what?", max_tokens=4), np.asarray(image).tobytes()


@pytest.fixture(scope="module")
def hunted(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, Any]:
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("hunted") / "bundle")
    edit(folder, lambda manifest: manifest["parity"].update(fp32=PASSED))
    return folder, json.loads((folder / "manifest.json").read_text("utf-8")), use(open_(folder))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_changed_in_a_manifest_it_is_refused_or_makes_no_difference(
    hunted: tuple[Path, Manifest, Any], data: st.DataObject, caplog: pytest.LogCaptureFixture
) -> None:
    folder, sound, expected = hunted
    manifest = deepcopy(sound)
    path = data.draw(st.sampled_from(leaves(sound)[1:]))
    inner: Any = manifest
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[path[-1]] = data.draw(VALUES)
    else:
        del inner[path[-1]]
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        try:
            got = use(open_(folder))
        except BundleError:
            return
    assert got == expected

"""Sizes of bundles on disk: bytes per variant, modes left out of an export, pruning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from janus_export.bundle.bundle import Bundle, load_bundle
from janus_export.bundle.external_data import references
from janus_export.bundle.modes import MODES, graphs_of, modes_of
from janus_export.bundle.pruning import prune
from janus_export.bundle.sizes import checkpoint_bytes, parse_bytes, variant_size
from janus_export.config import ExportConfig
from janus_export.errors import BundleError, ExportError
from janus_export.onnx_export.export import export
from janus_modular.cli.app import app
from janus_modular.janus import Janus


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def on_disk(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("manifest.json", ".lock")
    }


def needs(bundle: Bundle, variant: str) -> set[str]:
    """The files that a variant's graphs lead to."""
    graphs = bundle.manifest["variants"][variant]["files"].values()
    return {*graphs, *(one.location for file in graphs for one in references(bundle.folder / file))}


@pytest.mark.parametrize("variant", ["fp32", "cpu-int8", "cpu-int4"])
def test_a_variant_needs_no_byte_that_only_others_use(tiny_bundle: Path, variant: str):
    bundle = load_bundle(tiny_bundle)
    size = variant_size(bundle, variant)
    files = on_disk(tiny_bundle)
    common = {name for name in files if not name.endswith((".onnx", ".safetensors"))}
    assert size.total == sum(files[name] for name in needs(bundle, variant) | common)
    for graph, file in bundle.manifest["variants"][variant]["files"].items():
        tensors = references(tiny_bundle / file)
        used = {one.location for one in tensors}
        assert size.graphs[graph] == files[file] + sum(files[name] for name in used)
        # Alignment and headers aside, every byte of those files is one that the graph points to.
        pointed = {(one.location, one.offset): one.length or 0 for one in tensors}
        headers = sum(8 + int.from_bytes((tiny_bundle / name).read_bytes()[:8], "little") for name in used)
        assert sum(pointed.values()) + headers == sum(files[name] for name in used)


def test_four_bits_take_less_than_half_precision_would(tiny_bundle: Path, tiny_checkpoint: Path):
    bundle = load_bundle(tiny_bundle)
    weights = {name: variant_size(bundle, name).weights for name in bundle.variants}
    checkpoint = checkpoint_bytes(bundle.manifest)
    assert checkpoint == (tiny_checkpoint / "model.safetensors").stat().st_size
    assert weights["cpu-int4"] < weights["cpu-int8"] < weights["fp32"] / 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("500MB", 500_000_000), ("64KiB", 1 << 16), ("7B", 7)],
)
def test_sizes_have_units(text: str, size: int):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["2", "", "GB", "-2GB", "2 gb", "2G", "1e9B", "nanGB", "0GB", "2GB!", "٢GB", "9" * 400 + "GB"]
)
def test_other_sizes_are_refused(text: str):
    with pytest.raises(ValueError, match="expected a positive number and a unit of B, KB, MB, GB"):
        parse_bytes(text)


def test_modes_take_the_graphs_that_they_need_and_no_others():
    roles = {"velocity": "other", "decode_latents": "decode"}  # of any generation path
    names = ("understand", "embed", "backbone", "sample_text", *roles)
    assert graphs_of(MODES, names) == names
    assert graphs_of(["text"], names) == ("embed", "backbone", "sample_text")
    records = {name: {"role": roles[name]} if name in roles else {} for name in names}
    for modes in (["text"], ["text", "understanding"], ["drawing"], ["text", "drawing"], list(MODES)):
        assert modes_of({name: records[name] for name in graphs_of(modes, names)}) == modes


def test_a_bundle_for_drawing_draws_and_says_that_it_does_not_answer(drawing_bundle: Path):
    bundle = load_bundle(drawing_bundle)
    assert bundle.modes == bundle.manifest["modes"] == ["drawing"]
    drawing = {"sample_image", "embed_codes", "decode_image", "tokenize_image"}
    assert set(bundle.graphs) == {"embed", "backbone", *drawing}
    [image] = Janus.from_pretrained(drawing_bundle).draw("a cat", seed=1, guidance=2)
    assert image.size == (32, 32)
    with pytest.raises(BundleError, match=r"Its modes are drawing, and this graph is for text\."):
        Janus.from_pretrained(drawing_bundle).chat("Hello?", max_tokens=2)


def test_weight_files_are_not_larger_than_max_file_size(drawing_bundle: Path):
    sizes = [path.stat().st_size for path in (drawing_bundle / "weights").iterdir()]
    assert max(sizes) <= 64_000
    assert len(sizes) > len(load_bundle(drawing_bundle).graphs)
    load_bundle(drawing_bundle).verify_weights()


def test_a_tensor_that_no_file_has_room_for_is_an_error(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Any
):
    from janus_export.onnx_export import export as exporting

    declare = exporting.declare
    monkeypatch.setattr(
        exporting, "declare", lambda *a, **k: [one for one in declare(*a, **k) if one.name == "embed"]
    )
    with pytest.raises(
        ExportError, match=r"max_file_size: 1KB is too small: 'backbone\..*takes [0-9,]+ bytes"
    ):
        export(tiny_checkpoint, tmp_path / "bundle", ExportConfig(max_file_size="1KB"))


@pytest.mark.parametrize("keep", [["cpu-int4"], ["fp32", "cpu-int8"]])
def test_pruning_variants_leaves_the_files_that_the_others_need(copied: Path, keep: list[str]):
    before = load_bundle(copied)
    before.record("parity", "cpu-int4", {"passed": True, "how": "x", "at": "y", "gates": {}})
    needed = {name for variant in keep for name in needs(before, variant)}
    prune(copied, variants=keep)
    bundle = load_bundle(copied)
    bundle.verify_weights()
    assert bundle.variants == [name for name in before.variants if name in keep]
    assert set(bundle.manifest["parity"]) == {"cpu-int4"} & set(keep)
    found = {name for name in on_disk(copied) if name.endswith((".onnx", ".safetensors"))}
    assert found == needed
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]
    assert all(path.stat().st_nlink == 1 for path in copied.rglob("*") if path.is_file())


def test_a_pruned_bundle_answers_as_before_and_its_source_stays(tiny_bundle: Path, tmp_path: Path):
    before = on_disk(tiny_bundle)
    target = prune(tiny_bundle, variants=["cpu-int4"], only=["understanding"], target=tmp_path / "small")
    assert on_disk(tiny_bundle) == before
    asked = ("Hello?",)
    whole = Janus.from_pretrained(tiny_bundle, variant="cpu-int4").chat(*asked, max_tokens=4)
    assert Janus.from_pretrained(target).chat(*asked, max_tokens=4) == whole
    assert load_bundle(target).modes == ["text", "understanding"]
    with pytest.raises(
        BundleError, match=r"Its modes are text, understanding, and this graph is for drawing\."
    ):
        Janus.from_pretrained(target).draw("a cat")


def test_a_bundle_pruned_to_drawing_draws_as_before(tiny_bundle: Path, tmp_path: Path):
    target = prune(tiny_bundle, variants=["cpu-int4"], only=["drawing"], target=tmp_path / "small")
    pruned, whole = (
        Janus.from_pretrained(folder, variant="cpu-int4").draw("a cat", seed=1, guidance=2)
        for folder in (target, tiny_bundle)
    )
    assert [image.tobytes() for image in pruned] == [image.tobytes() for image in whole]


def test_results_go_with_the_modes_that_they_are_of(copied: Path):
    load_bundle(copied).record("parity", "fp32", {"passed": True, "how": "x", "at": "y", "gates": {}})
    pruned = CliRunner().invoke(app, ["bundle", "prune", str(copied), "--only", "text"])
    assert load_bundle(copied).manifest["parity"] == {}
    assert f"removed. Verify again: janus-modular verify {copied} --against CHECKPOINT" in pruned.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variants": ["cpu-int3"]}, "has no variant 'cpu-int3'. Did you mean 'cpu-int"),
        ({"only": ["draw"]}, "has no mode 'draw'. Did you mean 'drawing'"),
        ({}, "has nothing to remove: name fewer than its variants (fp32, cpu-int8, cpu-int4)"),
        ({"variants": ["fp32", "cpu-int8", "cpu-int4"]}, "has nothing to remove"),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_changes_nothing(
    copied: Path, options: dict[str, list[str]], says: str
):
    before = on_disk(copied)
    with pytest.raises(BundleError) as caught:
        prune(copied, **options)
    assert says in str(caught.value)
    assert on_disk(copied) == before


def test_a_mode_that_was_left_out_cannot_be_kept(drawing_bundle: Path, tmp_path: Path):
    with pytest.raises(BundleError, match="cannot keep text: it has drawing"):
        prune(drawing_bundle, only=["text", "drawing"], target=tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["there", "bundle/inside"])
def test_pruning_writes_into_no_folder_that_is_there(copied: Path, tmp_path: Path, place: str):
    (tmp_path / "there").mkdir()
    with pytest.raises(BundleError, match=r"Choose (another folder|a folder beside it)\."):
        prune(copied, variants=["fp32"], target=tmp_path / place)
    load_bundle(copied)


def test_modes_that_graphs_are_not_enough_for_are_refused(copied: Path):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["modes"] = ["text"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r'modes are \["text"\]; its graphs support'):
        load_bundle(copied)


def test_the_commands_print_sizes_beside_the_checkpoints(copied: Path, tiny_checkpoint: Path):
    run = CliRunner().invoke
    facts = json.loads(run(app, ["inspect", str(copied), "--json"]).stdout)
    assert facts["modes"] == list(MODES)
    assert facts["checkpoint_bytes"] == (tiny_checkpoint / "model.safetensors").stat().st_size
    sizes = {one["variant"]: one["bytes"] for one in facts["variants"]}
    assert sizes == {name: variant_size(load_bundle(copied), name).total for name in sizes}
    text = run(app, ["inspect", str(copied)]).stdout
    assert "of_checkpoint" in text
    pruned = run(app, ["bundle", "prune", str(copied), "--variants", "fp32,cpu-int4", "--only", "drawing"])
    assert (pruned.exit_code, pruned.stderr) == (0, "")  # no results were removed
    assert load_bundle(copied).variants == ["fp32", "cpu-int4"]
    assert load_bundle(copied).modes == ["drawing"]
    refused = run(app, ["bundle", "prune", str(copied), "--variants", "fp16"])
    assert refused.exit_code != 0

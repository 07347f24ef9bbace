"""A bundle that differs from its manifest is an error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest

from janus_export.bundle.bundle import BundleError, load_bundle, write_manifest
from janus_export.bundle.external_data import references
from janus_export.runtimes.ort.runtime import OnnxConfig, OnnxRuntime
from janus_modular import Janus, PluginError
from janus_modular.checkpoints.opening import open_lazily
from janus_modular.cli.info import gather
from janus_modular.errors import CheckpointError
from janus_modular.foreign import sha256
from janus_modular.safetensors_headers import byte_ranges

Break = Callable[[Path, dict[str, Any]], None]
LONG = "a" * 5000


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_a_fresh_bundle_loads_and_names_its_graphs(tiny_bundle: Path):
    bundle = load_bundle(tiny_bundle)
    bundle.verify_weights()
    drawing = ["sample_image", "embed_codes", "decode_image", "tokenize_image"]
    assert list(bundle.graphs) == ["understand", "embed", "backbone", "sample_text", *drawing]
    assert bundle.path("backbone", "cpu-int4").name == "backbone.cpu-int4.onnx"
    assert bundle.path("decode_image", "cpu-int4").name == "decode_image.cpu-int4.onnx"  # in fp16


def test_the_manifest_is_as_the_published_schema_says(tiny_bundle: Path):
    schema = json.loads(files("janus_export").joinpath("bundle.schema.json").read_text())
    jsonschema.validate(manifest_of(tiny_bundle), schema, cls=jsonschema.Draft202012Validator)


def test_the_manifest_says_of_graphs_what_onnx_finds_in_them(tiny_bundle: Path):
    bundle = load_bundle(tiny_bundle)
    names = {"float32": "FLOAT", "int64": "INT64", "bool": "BOOL", "uint8": "UINT8"}
    for variant in bundle.variants:
        for graph, record in bundle.graphs.items():
            found = onnx.load(bundle.path(graph, variant), load_external_data=False).graph
            for said, values in ((record["inputs"], found.input), (record["outputs"], found.output)):
                assert [spec["name"] for spec in said] == [value.name for value in values]
                for spec, value in zip(said, values, strict=True):
                    tensor = value.type.tensor_type
                    assert onnx.TensorProto.DataType.Name(tensor.elem_type) == names[spec["dtype"]]
                    assert spec["shape"] == [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]


def test_a_contract_has_the_dtype_of_its_variant(copied: Path):
    manifest = manifest_of(copied)
    manifest["variants"]["fp32"]["dtype"] = "float16"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    inputs = load_bundle(copied, check_graphs=False).contract("sample_image", "fp32")["inputs"]
    assert {tensor["name"]: tensor["dtype"] for tensor in inputs} == {
        "hidden": "float16", "noise": "float32", "guidance": "float32", "temperature": "float32",
    }  # fmt: skip


def test_references_are_those_that_onnx_reads(tiny_bundle: Path):
    bundle = load_bundle(tiny_bundle)
    for graph in bundle.graphs:
        path = bundle.path(graph, "cpu-int4")
        told = {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in onnx.load(path, load_external_data=False).graph.initializer
            if tensor.external_data
        }
        assert {one.tensor: (one.location, one.offset, one.length) for one in references(path)} == {
            name: (entry["location"], int(entry["offset"]), int(entry["length"]))
            for name, entry in told.items()
        }


def test_weights_are_named_by_their_hash_and_lie_aligned(tiny_bundle: Path):
    for path in (tiny_bundle / "weights").iterdir():
        assert path.stem == sha256(path)
        for name, (offset, length) in byte_ranges(path).items():
            assert length % 64 or not offset % 64, name


def missing_graph(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "decode_image.fp32.onnx").unlink()


def missing_weights(folder: Path, manifest: dict[str, Any]) -> None:
    shutil.rmtree(folder / "weights")


def short_weights(folder: Path, manifest: dict[str, Any]) -> None:
    path = next((folder / "weights").iterdir())
    path.write_bytes(path.read_bytes()[:-1])


def changed_graph(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / "embed.fp32.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def newer_schema(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["schema"] += 1


def older_schema(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["schema"] = 2


def oldest_schema(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["schema"] = 1


def no_schema(folder: Path, manifest: dict[str, Any]) -> None:
    del manifest["schema"]


def unlisted_file(folder: Path, manifest: dict[str, Any]) -> None:
    for section in ("sha256", "bytes"):
        del manifest[section]["decode_image.fp32.onnx"]


def changed(*keys: str, value: Any) -> Break:
    """Put ``value`` where ``keys`` lead in the manifest."""

    def change(folder: Path, manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


def without(*keys: str) -> Break:
    """Take out of the manifest what ``keys`` lead to."""

    def change(folder: Path, manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change


def parent_path(folder: Path, manifest: dict[str, Any]) -> None:
    repoint(folder, manifest, "../secret")


def absolute_path(folder: Path, manifest: dict[str, Any]) -> None:
    repoint(folder, manifest, "/etc/passwd")


def other_file(folder: Path, manifest: dict[str, Any]) -> None:
    repoint(folder, manifest, "tokenizer.json")


def placed(**place: str) -> Break:
    """Let a tensor lie elsewhere in its file."""
    return lambda folder, manifest: repoint(folder, manifest, None, **place)


def linked_out(folder: Path, manifest: dict[str, Any]) -> None:
    path = next((folder / "weights").iterdir())
    path.rename(folder.parent / path.name)
    path.symlink_to(folder.parent / path.name)


def repoint(folder: Path, manifest: dict[str, Any], location: str | None, **place: str) -> None:
    """Let a graph take a tensor from elsewhere, with a hash that fits."""
    path = folder / "embed.fp32.onnx"
    graph = onnx.load(path, load_external_data=False)
    for entry in graph.graph.initializer[0].external_data:
        if entry.key == "location" and location:
            entry.value = location
        entry.value = place.get(entry.key, entry.value)
    path.write_bytes(graph.SerializeToString())
    manifest["sha256"][path.name], manifest["bytes"][path.name] = sha256(path), path.stat().st_size


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (missing_graph, "lacks decode_image.fp32.onnx"),
        (missing_weights, "lacks weights/"),
        (short_weights, "bytes, the manifest says"),
        (changed_graph, "embed.fp32.onnx has changed"),
        (newer_schema, "is of schema 5, this version reads schema 4. Upgrade"),
        (
            older_schema,
            "is of schema 2, this version reads schema 4. Export it again with: janus-mod",
        ),
        (
            oldest_schema,
            "is of schema 1, this version reads schema 4. Export it again with: janus-mod",
        ),
        (no_schema, "is of schema None"),
        (unlisted_file, "has no hash for decode_image.fp32.onnx"),
        (
            changed("variants", "fp32", value=["decode_image.fp32.onnx"]),
            'variants.fp32 is ["decode_image.fp32.onnx"], expected object',
        ),
        (changed("model", value={}), "is malformed: model lacks context, hidden_size, vocab_size"),
        (changed("model", "context", value="many"), 'model.context is "many", expected integer'),
        (changed("model", "context", value=True), "model.context is true, expected integer"),
        (changed("model", "hidden_size", value=0), "model.hidden_size is 0, expected 1 at least"),
        (changed("variants", value={}), "variants is empty"),
        (
            changed("variants", "fp32", "dtype", value="int3"),
            'variants.fp32.dtype is "int3", expected one of float32',
        ),
        (changed("graphs", value={}), "variants.fp32 has files of backbone, decode_image, embed"),
        (changed("graphs", "decode_image", value={}), "graphs.decode_image lacks inputs, outputs, aliases"),
        (changed("axes", value={}), "graphs.understand has lengths called images, which axes lacks"),
        (without("plugins"), "plugins is missing"),
        (
            changed("requires", "onnxruntime", value="abc"),
            'requires.onnxruntime is "abc", expected a version',
        ),
        (changed("requires", value={}), "requires lacks onnxruntime"),
        (changed("requires", "onnxruntime", value=">=1.25"), "expected a version such as 1.25"),
        (changed("requires", "onnxruntime", value="9" * 300), "expected a version such as 1.25"),
        (
            changed("requires", "tensorrt", value="11.0"),
            'requires has "tensorrt", which is unknown to this version',
        ),
        (parent_path, "points to '../secret', which is not inside it"),
        (absolute_path, "points to '/etc/passwd', which is not inside it"),
        (other_file, "in 'tokenizer.json', which the manifest does not list"),
        (placed(offset="9999999999"), "beyond the end of weights/"),
        (placed(length="9999999999"), "beyond the end of weights/"),
        (placed(length="-7"), "has the length '-7', expected a number of bytes"),
        (placed(offset="abc"), "has the offset 'abc', expected a number of bytes"),
        (linked_out, "is a link out of the bundle"),
    ],
)
def test_a_damaged_bundle_is_an_error_with_a_hint(copied: Path, damage: Break, says: str):
    manifest = manifest_of(copied)
    damage(copied, manifest)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as caught:
        load_bundle(copied)
    assert says in str(caught.value)
    assert any(
        cure in str(caught.value) for cure in ("janus-modular export MODEL", "pip install", "cp --rec")
    )


def test_a_tensor_whose_bytes_are_too_few_is_an_error_of_the_bundle(copied: Path):
    manifest = manifest_of(copied)
    repoint(copied, manifest, None, length="3")
    write_manifest(copied, manifest)
    runtime = OnnxRuntime(OnnxConfig("fp32", "cpu"), copied)
    with pytest.raises(BundleError, match=r"does not load .*embed\.fp32\.onnx: .*inspect .* --hashes"):
        runtime.graph("embed")


def test_changed_weights_of_equal_size_are_detected_with_hashes(copied: Path):
    path = max((copied / "weights").iterdir(), key=lambda one: one.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    bundle = load_bundle(copied)
    with pytest.raises(BundleError, match="has changed"):
        bundle.verify_weights()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path, content: str):
    if content:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match="Export it again"):
        load_bundle(tmp_path)


def test_errors_about_folders_that_are_no_bundle_say_what_they_are(tiny_checkpoint: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    for path, says in (
        (
            tiny_checkpoint,
            rf"no manifest.json. It looks like .*: janus-modular export {tiny_checkpoint} BUNDLE",
        ),
        (
            tmp_path,
            r"no manifest.json. Give the folder that was written by: janus-modular export MODEL BUNDLE",
        ),
        (tmp_path / "notes.txt", r"is a file, .* Give the folder that was written by"),
        (
            tmp_path / "nowhere",
            r"there is no folder '.*nowhere'\. Check the path, or write a bundle there: janus",
        ),
    ):
        with pytest.raises(BundleError, match=says):
            load_bundle(path)


def test_a_bundle_in_place_of_a_checkpoint_is_an_error(tiny_bundle: Path):
    says = f"{tiny_bundle} is a bundle, expected the checkpoint that it was exported from"
    with pytest.raises(CheckpointError, match=says):
        open_lazily(tiny_bundle)
    with pytest.raises(CheckpointError, match=says):
        gather(str(tiny_bundle), [])


def test_results_are_noted_on_disk(copied: Path):
    load_bundle(copied).record("executed", "fp32", {"backbone": 1e-6})
    assert load_bundle(copied).manifest["executed"] == {"fp32": {"backbone": 1e-6}}


def test_a_bundle_is_read_and_inspected_without_torch_or_onnx(tiny_bundle: Path):
    code = (
        "import sys; from janus_modular.cli.app import app\n"
        f"app(['inspect', {str(tiny_bundle)!r}, '--json'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *printed, loaded = done.stdout.strip().splitlines()
    assert loaded == "[]"
    facts = json.loads("\n".join(printed))
    assert [one["variant"] for one in facts["variants"]] == ["fp32", "cpu-int8", "cpu-int4"]
    quantized = 14 + 6 + 1  # of the backbone, of the encoder, the table
    assert [one["quantized"] for one in facts["variants"]] == [0, quantized, quantized]
    assert "past_key_*" in facts["graphs"][2]["takes"]
    [ours] = facts["plugins"]
    assert ours.startswith(f"janus-modular {version('janus-modular')} (")
    assert "understanding_encoders:vit" in ours


def test_a_bundle_records_the_plugins_of_its_components_and_samplers(tiny_bundle: Path):
    recorded = {(one["slot"], one["name"]): one["dist"] for one in manifest_of(tiny_bundle)["plugins"]}
    assert {("backbones", "hf"), ("generation", "autoregressive"), ("heads", "mlp")} <= set(recorded)
    assert {name for slot, name in recorded if slot.endswith("_samplers")} == {"text", "autoregressive"}
    assert set(recorded.values()) == {"janus-modular"}


def test_a_loop_that_is_not_here_is_named_where_it_is_used_and_other_parts_are_not_needed(copied: Path):
    manifest = manifest_of(copied)
    for one in manifest["plugins"]:
        if one["name"] in ("vit", "autoregressive"):
            one |= {"name": f"acme-{one['name']}", "dist": "acme-parts", "version": "0.2"}
    manifest["model"]["image_sampler"] = "acme-autoregressive"
    write_manifest(copied, manifest)
    janus = Janus.from_pretrained(copied, allow_failed=True)
    assert janus.chat("what?", max_tokens=2) is not None
    with pytest.raises(PluginError, match=r"called 'acme-autoregressive'\.\n.*pip install acme-parts==0\.2"):
        janus.draw("a cat")


@pytest.mark.parametrize(
    "path",
    [
        ("variants", LONG), ("variants", "fp32", "files", "decode_image"), ("graphs", LONG), ("axes", LONG),
        ("sha256", LONG), ("model", "text_sampler"), ("requires", LONG), ("schema",),
    ],
    ids=lambda path: ".".join(path)[:40],
)  # fmt: skip
def test_a_long_name_is_refused_and_not_repeated_whole(copied: Path, path: tuple[str, ...]):
    manifest = manifest_of(copied)
    changed(*path, value=LONG)(copied, manifest)
    if path[0] == "sha256":
        manifest["bytes"][LONG] = 1
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as caught:
        load_bundle(copied)
    assert len(str(caught.value).replace(str(copied), "")) < 1000
    assert "aaaa" in str(caught.value)


def test_long_names_in_a_graph_are_not_repeated_whole(copied: Path):
    manifest = manifest_of(copied)
    for location, place, says in (
        (LONG, {}, "which the manifest does not list"),
        (f"../{LONG}", {}, "which is not inside it"),
        ("a\0aaaa", {}, "which is not inside it"),
        (None, {"offset": "9" * 5000}, "expected a number of bytes"),
    ):
        repoint(copied, manifest, location, **place)
        write_manifest(copied, manifest)
        with pytest.raises(BundleError, match=says) as caught:
            load_bundle(copied)
        assert len(str(caught.value).replace(str(copied), "")) < 1000

"""From checkpoint to bundle: the same numbers, standard operators, nothing lost when interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

from janus_export.bundle.bundle import Bundle, load_bundle
from janus_export.config import ExportConfig, QuantizeConfig
from janus_export.errors import BundleError, ExportError
from janus_export.onnx_export import export as exporting
from janus_export.onnx_export.export import export
from janus_export.onnx_export.weights import detach, pointers
from janus_modular import ConfigError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.model.model import JanusModel

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of its own: onnx refuses files with hard links, which other tests make to the shared one."""
    return load_bundle(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("own") / "bundle"))


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Iterator[JanusModel]:
    with torch.no_grad():
        yield ModelAssembly.from_checkpoint(tiny_checkpoint).model


def run(bundle: Bundle, graph: str, **inputs: Any) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(bundle.path(graph, "fp32")))
    return session.run(None, {name: np.asarray(value) for name, value in inputs.items()})


def pixels(n: int) -> np.ndarray:
    return RNG.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def test_portable_graphs_are_standard_opset_24_and_pass_the_checker(bundle: Bundle):
    for graph in bundle.graphs:
        path = bundle.path(graph, "fp32")
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert [(one.domain, one.version) for one in model.opset_import] == [("", 24)]
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions


def test_only_rounded_graphs_hold_an_operator_that_is_not_standard(bundle: Bundle):
    model = onnx.load(bundle.path("backbone", "cpu-int4"), load_external_data=False)
    strange = {(node.domain, node.op_type) for node in model.graph.node if node.domain}
    assert strange == {("com.microsoft", "MatMulNBits")}
    assert not any(node.op_type == "Gemm" for node in model.graph.node)
    model = onnx.load(bundle.path("decode_image", "cpu-int4"), load_external_data=False)
    assert not any(node.domain for node in model.graph.node)


def test_graphs_contain_no_weights_and_no_local_paths(bundle: Bundle):
    for graph in bundle.graphs:
        for variant in bundle.variants:
            path = bundle.path(graph, variant)
            model = onnx.load(path, load_external_data=False)
            inline = [one for one in model.graph.initializer if not one.external_data]
            assert all(one.ByteSize() < 1024 for one in inline)
            assert b".py" not in path.read_bytes()


def test_weights_are_those_of_the_checkpoint_bit_for_bit_and_tied_ones_once(
    bundle: Bundle, tiny_checkpoint: Path
):
    theirs, written = load_file(tiny_checkpoint / "model.safetensors"), list[str]()
    for name in bundle.manifest["variants"]["fp32"]["weights"]:
        for key, ours in load_file(bundle.folder / name).items():
            np.testing.assert_array_equal(ours, theirs[key])
            written.append(key)
    assert len(written) == len(set(written))
    assert not any("lm_head" in key for key in written)


def test_an_empty_weight_is_stored_in_the_graph():
    """DINOv3 without register tokens has one. A file's 0 bytes ONNX Runtime cannot read."""
    weights = {"model.none": (1, 0, 4), "model.some": (1, 2, 4)}
    values = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in weights.items()
    ]
    joined = ir.node("Concat", values, {"axis": 1})
    graph = ir.Graph(
        [], joined.outputs, nodes=[joined], initializers=values, opset_imports={"": 24}, name="joins"
    )
    model = ir.Model(graph, ir_version=10)
    detach(model, {"none": "none", "some": "some"}, "F32")
    assert [pointer for _, pointer in pointers(model)] == [("F32", "some")]
    np.testing.assert_array_equal(values[0].const_value.numpy(), np.zeros((1, 0, 4), np.float32))


def test_linear_layers_are_gemms_on_weights_as_they_lie(bundle: Bundle):
    graph = onnx.load(bundle.path("backbone", "fp32"), load_external_data=False).graph
    ops = [node.op_type for node in graph.node]
    assert ops.count("Gemm") == 14
    assert "MatMul" not in ops
    assert ops.count("Shape") <= 3  # of positions and mask, and of what goes through all layers


def test_norms_are_one_operator_to_onnx_runtime(bundle: Bundle, tmp_path: Path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that what it optimised is for this machine
    onnxruntime.InferenceSession(str(bundle.path("backbone", "cpu-int4")), options)
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    ops = [node.op_type for node in optimized.graph.node]
    assert ops.count("SimplifiedLayerNormalization") == 5  # two in each of two layers, and the last
    assert not {"Pow", "ReduceMean", "Sqrt", "Reciprocal"} & set(ops)


def test_understanding_and_codes_are_torchs(bundle: Bundle, model: JanusModel):
    given = pixels(3)
    (found,) = run(bundle, "understand", pixels=given)
    expected = model.understanding(torch.from_numpy(given)).numpy()
    scale = np.abs(expected).max()  # float32 sums in another order are off by a share of the largest number
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)
    (codes,) = run(bundle, "tokenize_image", pixels=given)
    np.testing.assert_array_equal(codes, model.generation.targets(torch.from_numpy(given)))
    drawn, magnitude = run(bundle, "decode_image", codes=codes)
    assert np.isfinite(magnitude).all()
    images = model.generation.decode_image(torch.from_numpy(codes)).numpy()
    assert np.abs(drawn.astype(int) - images).max() <= 1  # truncated to bytes: rounding may tip it over


def test_embeddings_are_torchs(bundle: Bundle, model: JanusModel):
    tokens = RNG.integers(0, 320, (3, 5))
    (found,) = run(bundle, "embed", tokens=tokens)
    np.testing.assert_array_equal(found, model.backbone.embed(torch.from_numpy(tokens)))


@pytest.mark.parametrize("rows", [2, 4])
def test_the_next_codes_are_torchs_with_and_without_guidance(bundle: Bundle, model: JanusModel, rows: int):
    inputs = {
        "hidden": RNG.standard_normal((rows, 64), np.float32),
        "noise": RNG.exponential(size=(2, 64)).astype(np.float32),
        "guidance": np.float32(3),
        "temperature": np.float32(0.7),
    }
    found = run(bundle, "sample_image", **inputs)
    expected = model.generation.sample_image(*(torch.as_tensor(one) for one in inputs.values()))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (9, 0.8)])
def test_the_next_words_are_torchs(bundle: Bundle, model: JanusModel, top_k: int, top_p: float):
    inputs = {
        "hidden": RNG.standard_normal((3, 64), np.float32),
        "noise": RNG.exponential(size=(3, 320)).astype(np.float32),
        "temperature": np.float32(0.7),
        "top_k": np.int64(top_k),
        "top_p": np.float32(top_p),
    }
    found = run(bundle, "sample_text", **inputs)
    suppressed_ids = torch.tensor(bundle.manifest["model"]["suppressed_ids"], dtype=torch.int64)
    expected = model.sample_text(*(torch.as_tensor(one) for one in inputs.values()), suppressed_ids)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5)


class StoppedError(Exception):
    """Stands in for a user who presses Ctrl-C, or a machine that goes down."""


def stopping_after(graphs: int) -> Any:
    def on_progress(what: str, done: int, total: int) -> None:
        if what == "graphs" and done == graphs:
            raise StoppedError

    return on_progress


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Export two of the graphs only; return the names of those that were lowered."""
    lowered: list[str] = []
    declare, to_onnx = exporting.declare, exporting.to_onnx

    def counted(graph: Any, mode: Any) -> Any:
        lowered.append(graph.name)
        return to_onnx(graph, mode)

    def two(*args: Any, **kwargs: Any) -> Any:
        return [one for one in declare(*args, **kwargs) if one.name in ("embed", "sample_image")]

    monkeypatch.setattr(exporting, "declare", two)
    monkeypatch.setattr(exporting, "to_onnx", counted)
    monkeypatch.setattr(exporting.manifest, "describe_cache", lambda graphs: {"form": "none", "layers": 1})
    return lowered


@pytest.mark.slow
def test_an_interrupted_export_leaves_the_old_bundle_and_goes_on_where_it_stopped(
    tiny_checkpoint: Path, tmp_path: Path, quick: list[str]
):
    target = tmp_path / "bundle"
    export(tiny_checkpoint, target)
    before = (target / "manifest.json").read_bytes()
    config = ExportConfig(rows=4)
    with pytest.raises(StoppedError):
        export(tiny_checkpoint, target, config, on_progress=stopping_after(1))
    assert (target / "manifest.json").read_bytes() == before
    load_bundle(target).verify_weights()
    quick.clear()
    export(tiny_checkpoint, target, config)
    assert quick == ["sample_image"]
    assert load_bundle(target).manifest["axes"]["rows"]["max"] == 4
    assert [one.name for one in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.slow
def test_what_was_finished_for_other_settings_or_damaged_since_is_not_used(
    tiny_checkpoint: Path, tmp_path: Path, quick: list[str]
):
    target = tmp_path / "bundle"
    for change in ("settings", "damage"):
        with pytest.raises(StoppedError):
            export(tiny_checkpoint, target, on_progress=stopping_after(1))
        if change == "damage":
            (tmp_path / ".bundle.export" / "lowered" / "embed.fp32.onnx").write_bytes(b"")
        quick.clear()
        with pytest.raises(StoppedError):
            export(tiny_checkpoint, target, ExportConfig(rows=4 if change == "settings" else 8),
                   on_progress=stopping_after(2))  # fmt: skip
        assert quick == ["embed", "sample_image"]


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_bundle_and_says_so(
    tiny_checkpoint: Path, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "bundle"
    export(tiny_checkpoint, target)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_stream", full)
    with pytest.raises(BundleError, match=r"No space left.*Existing files are unchanged"):
        export(tiny_checkpoint, target, ExportConfig(rows=4))
    load_bundle(target).verify_weights()


def test_nothing_is_replaced_that_is_no_bundle(tiny_checkpoint: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="is no bundle, so it is not replaced"):
        export(tiny_checkpoint, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_checkpoint_that_lacks_a_weight_is_refused_before_any_work(tiny_checkpoint: Path, tmp_path: Path):
    from safetensors.numpy import save_file

    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_checkpoint.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["generation.head.vision_head.bias"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ExportError, match=r"lacks 1 weights.*vision_head\.bias"):
        export(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("variants=[cpu-int3]", "variants: there is no variant 'cpu-int3'. Did you mean 'cpu-int"),
        ("variants=[]", "variants: empty; expected at least one. Known: fp32"),
        ("variants=[]", "variants: empty"),
        ("rows=0", "rows: 0; expected 1 to 4096"),
        ("rows=1000000000000", "rows: 1e+12; expected 1 to 4096"),
        ("images=4097", "images: 4097; expected 1 to 4096"),
        ("capacity=-1", "capacity: -1; expected 2 at least"),
        ("capacity=1", "capacity: 1; expected 2 at least"),
        ("images=0", "images: 0; expected 1 to 4096"),
        ("max_file_size=-1GB", "max_file_size: '-1GB'; expected a positive number"),
        ("max_file_size=99999999999GB", "max_file_size: '99999999999GB'; expected a positive number"),
        ("quantize.graphs=[]", "quantize.graphs: empty, but a variant is quantised"),
        ("quantize.block_size=24", "quantize.block_size: 24; expected a power of two, 16 to 256"),
        ("quantize.block_size=1048576", "quantize.block_size: 1048576; expected a power of two, 16 to 256"),
        ("quantize.accuracy_level=9", "quantize.accuracy_level: 9; expected 0 to 4"),
        ("variants=[cpu-int4, cpu-int4]", "variants: 'cpu-int4' is named 2 times; expected once"),
        ("quantize.bits={backbone: 5}", "quantize.bits: 5 of 'backbone'; expected 4 or 8"),
        (
            "quantize.bits={decode_image: 8}",
            "quantize.bits: 'decode_image' is not quantised; name it in quantize.graphs too",
        ),
        ("storage=bf16", "storage: 'bf16'; expected fp16 or fp32"),
        ("only=[draw]", "only: no mode is called 'draw'. Did you mean 'drawing'? Modes: text, understanding"),
        (
            "max_file_size=2",
            "max_file_size: '2'; expected a positive number and a unit of B, KB, MB, GB, KiB",
        ),
        ("max_file_size=2gb", "max_file_size: '2gb'; expected a positive number and a unit"),
        ("max_file_size=0MB", "max_file_size: '0MB'; expected a positive number and a unit"),
    ],
)
def test_settings_that_make_no_sense_say_what_would(change: str, says: str):
    with pytest.raises(ConfigError, match=r"^the config has an error:") as caught:
        resolve(load("export/cpu", [change]), ExportConfig)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["quantize.graphs=[embed]"], "quantize.graphs: has no effect: no variant of fp32 quantises"),
        (["quantize.block_size=64"], "quantize.block_size: has no effect: no variant of fp32 quantises"),
        (["quantize.bits={backbone: 8}"], "quantize.bits: has no effect: no variant of fp32 quantises"),
        (["storage=fp32"], "storage: fp32 has no effect: no variant of fp32 is cpu-int8 or cpu-int4"),
        (
            ["variants=[trt-int4]", "quantize.accuracy_level=1"],
            "quantize.accuracy_level: has no effect: no variant of trt-int4 multiplies by MatMulNBits",
        ),
        (
            ["variants=[cpu-int4]", "only=[drawing]", "quantize.graphs=[backbone, sample_text]"],
            "quantize.graphs: 'sample_text' is not exported with only=drawing",
        ),
    ],
)
def test_settings_that_change_nothing_are_refused(changes: list[str], says: str):
    with pytest.raises(ConfigError, match=r"^the config has an error:") as caught:
        resolve(load("export/portable", changes), ExportConfig)
    assert says in str(caught.value)


@pytest.mark.slow  # all graphs are lowered before it is known
def test_a_graph_in_which_nothing_can_be_quantised_is_refused(tiny_checkpoint: Path, tmp_path: Path):
    """Its one table has 8 columns: fewer than a block."""
    config = ExportConfig(variants=["cpu-int4"], quantize=QuantizeConfig(graphs=["embed", "decode_image"]))
    with pytest.raises(ExportError, match="names decode_image, in which cpu-int4 can quantise nothing"):
        export(tiny_checkpoint, tmp_path / "bundle", config)


def test_invalid_settings_are_reported_all_at_once():
    with pytest.raises(ConfigError, match="has 3 errors") as caught:
        resolve(load("export/cpu", ["rows=0", "images=0", "quantize.accuracy_level=5"]), ExportConfig)
    assert [one.path for one in caught.value.errors] == ["rows", "images", "quantize.accuracy_level"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"graphs": ["backbon"]}, r"graphs: no graph is called 'backbon'\. Did you mean 'backbone'\?"),
        ({"bits": {"draw": 8}, "graphs": ["draw"]}, "'draw'. It is called 'decode_image' now. Graphs: unde"),
    ],
)
def test_a_graph_that_the_model_lacks_is_an_error_before_anything_is_compiled(
    tiny_checkpoint: Path, tmp_path: Path, settings: dict[str, Any], says: str
):
    config = ExportConfig(variants=["cpu-int4"], quantize=QuantizeConfig(**settings))
    with pytest.raises(ExportError, match=says):
        export(tiny_checkpoint, tmp_path / "bundle", config)


def test_a_capacity_beyond_the_context_is_refused_before_anything_is_written(
    tiny_checkpoint: Path, model: JanusModel, tmp_path: Path
):
    context = model.backbone.context
    says = rf"capacity: 100000; expected {context} at most, the model's context"
    with pytest.raises(ExportError, match=says):
        export(tiny_checkpoint, tmp_path / "bundle", ExportConfig(capacity=100_000))
    assert not list(tmp_path.iterdir())
    assert ExportConfig(capacity=context).ranges(context).capacity.typical == context


def test_a_capacity_that_is_left_out_is_the_context_where_that_is_short():
    assert ExportConfig().ranges(512).capacity.typical == 512
    assert ExportConfig().ranges(4096).capacity.typical == 1024


def test_the_source_is_recorded_without_its_contents(tiny_bundle: Path, tiny_checkpoint: Path):
    source = json.loads((tiny_bundle / "manifest.json").read_text())["source"]
    assert source["format"] == "janus-modular"
    assert source["files"]["model.safetensors"][0] == (tiny_checkpoint / "model.safetensors").stat().st_size

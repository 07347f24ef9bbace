"""Graphs lowered for TensorRT compute the same as the portable graphs, and TensorRT parses them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tensorrt_rtx as trt
import torch

from janus_export.bundle.axes import Ranges
from janus_export.bundle.bundle import load_bundle
from janus_export.bundle.engines import Profile
from janus_export.errors import ExportError
from janus_export.onnx_export.graphs import declare
from janus_export.onnx_export.trace import to_onnx
from janus_export.tensorrt_build.builder import EngineOptions, build_engine
from janus_export.tensorrt_build.lowering import lower, write_out_softcaps
from janus_export.tensorrt_build.profiles import Lengths, profiles
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig

CAPACITY, ROWS, TOKENS = 24, 3, 5
LENGTHS = {"rows": (1, 2, 4), "tokens": (1, 8, CAPACITY), "capacity": (CAPACITY,) * 3, "images": (1, 1, 2)}
ORDER = EngineOptions(
    ["8.9"], [Profile("prefill", LENGTHS), Profile("decode", {**LENGTHS, "tokens": (1, 1, 1)})]
)
QUIET = onnxruntime.SessionOptions()
QUIET.log_severity_level = 3  # it warns of caches that are not written in place, which numpy's are not

FAMILIES: dict[str, dict[str, Any]] = {
    "llama with heads of 64": {"model_type": "llama", "head_dim": 64},
    "gemma2, which caps its scores": {
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": 4,
        "query_pre_attn_scalar": 16,
    },
    "cohere, whose rotary table is repeated": {"model_type": "cohere"},
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(family, marks=[] if family.startswith("gemma2") else [pytest.mark.slow])
        for family in FAMILIES
    ],
)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone of a family as a portable graph, with its weights inside."""
    config = resolve(load("model/tiny"), ModelConfig)
    config.backbone.config.config = {**SIZES, **FAMILIES[request.param]}
    torch.manual_seed(0)
    model = ModelAssembly.from_config(config).model
    model.eval()
    ranges = Ranges.of(context=64, rows=4, capacity=CAPACITY)
    graph = next(one for one in declare(model, ranges) if one.name == "backbone")
    path = tmp_path_factory.mktemp("family") / "backbone.onnx"
    ir.save(to_onnx(graph, nullcontext()), path)  # type: ignore[arg-type]  # nothing is faked
    return path


def run(path: Path, inputs: dict[str, Any]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(path), QUIET).run(None, inputs)


def chance(path: Path) -> dict[str, Any]:
    """Make inputs for a backbone whose rows are of different lengths."""
    lengths = {"rows": ROWS, "tokens": TOKENS, "capacity": CAPACITY}
    at = np.array([4, 0, 9])
    positions = at[:, None] + np.arange(TOKENS)
    known = {
        "write_index": at,
        "positions": positions,
        "mask": np.arange(CAPACITY) <= positions[:, None, :, None],
    }
    rng = np.random.default_rng(0)
    inputs = onnxruntime.InferenceSession(str(path), QUIET).get_inputs()
    return {
        one.name: known.get(
            one.name,
            rng.standard_normal([lengths.get(size, size) for size in one.shape]).astype(np.float32),
        )
        for one in inputs
    }


def test_a_lowered_backbone_says_the_same(backbone: Path, tmp_path: Path):
    inputs = chance(backbone)
    lowered = lower(backbone, capacity=CAPACITY)
    ir.save(lowered, tmp_path / "lowered.onnx")
    for one, other in zip(run(backbone, inputs), run(tmp_path / "lowered.onnx", inputs), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)  # the same operators, in the same order
    for value in (*lowered.graph.inputs, *lowered.graph.outputs):
        assert "capacity" not in str(value.shape)


def test_a_backbone_in_float32_becomes_an_engine(backbone: Path, tmp_path: Path):
    built = build_engine(
        trt, lower(backbone, capacity=CAPACITY), backbone, tmp_path / "backbone.engine", ORDER
    )
    assert built.bytes == (tmp_path / "backbone.engine").stat().st_size > 1_000_000
    assert built.seconds > 0


def attention(path: Path, *, softcap: float, mask: bool = True) -> Path:
    """Write a graph of one attention, four heads over two of keys, as it would be exported."""
    shapes = {"q": ["B", 4, "T", 8], "k": ["B", 2, 6, 8], "v": ["B", 2, 6, 8], "m": ["B", 1, "T", 6]}
    names = ["q", "k", "v", *(["m"] if mask else [])]
    kinds = {name: onnx.TensorProto.BOOL if name == "m" else onnx.TensorProto.FLOAT for name in names}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Attention", names, ["y"], scale=0.5, softcap=softcap)],
        "attention",
        [onnx.helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in names],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shapes["q"])],
    )
    opset = [onnx.helper.make_opsetid("", 24)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


@pytest.mark.parametrize("mask", [True, False])
def test_capped_attention_written_out_says_the_same(tmp_path: Path, mask: bool):
    path = attention(tmp_path / "attention.onnx", softcap=2.0, mask=mask)
    model = ir.load(path)
    write_out_softcaps(model)
    assert "Attention" not in {node.op_type for node in model.graph}
    ir.save(model, tmp_path / "written_out.onnx")
    rng = np.random.default_rng(0)
    inputs: dict[str, Any] = {
        name: 3 * rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("q", (2, 4, 3, 8)), ("k", (2, 2, 6, 8)), ("v", (2, 2, 6, 8)))
    }
    if mask:
        inputs["m"] = np.tri(6, dtype=np.bool_)[None, None, 3:].repeat(2, 0)
    [expected], [found] = run(path, inputs), run(tmp_path / "written_out.onnx", inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # float32, sums of 8 and 6
    plain = attention(tmp_path / "plain.onnx", softcap=0.0, mask=mask)
    assert np.abs(run(plain, inputs)[0] - expected).max() > 0.01  # the cap does something
    lengths = {"B": (1, 2, 4), "T": (1, 3, 6)}
    build_engine(
        trt, model, path, tmp_path / "y.engine", EngineOptions(["8.9"], [Profile("default", lengths)])
    )


def test_an_input_that_nothing_reads_is_an_error(tiny_gpu_bundle: Path, tmp_path: Path):
    bundle = load_bundle(tiny_gpu_bundle)
    source = bundle.path("embed", "fp16")
    model = ir.load(source)
    model.graph.inputs.append(ir.val("extra", ir.DataType.FLOAT, [1]))
    ir.save(model, tmp_path / "embed.fp16.onnx")
    with pytest.raises(ExportError, match=r"embed.fp16.onnx does not use its input extra"):
        lower(tmp_path / "embed.fp16.onnx", capacity=CAPACITY)
    # Past that check: TensorRT only warns of it, and builds.
    order = EngineOptions(["8.9"], profiles(bundle.manifest, "embed", Lengths(8, CAPACITY)))
    with pytest.raises(
        ExportError, match=r"embed.fp16.onnx cannot be built as an engine.\nUnused Input: extra"
    ):
        build_engine(trt, model, source, tmp_path / "embed.engine", order)


def test_what_the_parser_refuses_is_named_with_what_it_reads(tiny_bundle: Path, tmp_path: Path):
    source = load_bundle(tiny_bundle).path("backbone", "cpu-int4")
    with pytest.raises(ExportError, match=r"backbone.cpu-int4.onnx uses com.microsoft::MatMulNBits"):
        lower(source, capacity=CAPACITY)
    with pytest.raises(ExportError, match=r"(?s)parser rejects backbone.*node \S+ \(\w+ of .*\): "):
        build_engine(trt, ir.load(source), source, tmp_path / "backbone.engine", ORDER)


def test_what_the_builder_refuses_is_passed_on(tiny_gpu_bundle: Path, tmp_path: Path):
    """Lengths of a profile from large to small."""
    source = load_bundle(tiny_gpu_bundle).path("embed", "fp16")
    wrong = Profile("default", {"rows": (4, 2, 1), "tokens": (1, 1, 1)})
    with pytest.raises((ExportError, ValueError)):
        build_engine(
            trt, lower(source, capacity=24), source, tmp_path / "x.engine", EngineOptions(["8.9"], [wrong])
        )


def test_a_full_disk_is_an_error(tiny_gpu_bundle: Path):
    source = load_bundle(tiny_gpu_bundle).path("embed", "fp16")
    order = EngineOptions(["8.9"], [Profile("default", {"rows": (1, 2, 4), "tokens": (1, 1, 4)})])
    with pytest.raises(OSError, match="No space left"):
        build_engine(trt, lower(source, capacity=24), source, Path("/dev/full"), order)

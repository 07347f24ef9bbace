"""A bundle as a Triton repository: Triton's protocol buffer reads it, a stand-in of its API runs it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from PIL import Image
from typer.testing import CliRunner

from janus_export.errors import BundleError
from janus_export.triton.repository import write_repository
from janus_modular.cli.app import app
from janus_modular.janus import Janus

STAND_IN = """
import base64, json, sys, threading
from types import ModuleType, SimpleNamespace

REFUSED = ("torch", "transformers", "onnx")
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import numpy as np

triton = ModuleType("triton_python_backend_utils")
class Tensor:
    def __init__(self, name, values):
        self.name, self.values = name, values
    def as_numpy(self):
        return self.values
class InferenceResponse:
    def __init__(self, output_tensors, error=None):
        self.output_tensors, self.error = output_tensors, error
class TritonError(Exception):
    pass
triton.Tensor, triton.InferenceResponse, triton.TritonError = Tensor, InferenceResponse, TritonError
triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
triton.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
sys.modules["triton_python_backend_utils"] = triton

class Sender:
    def __init__(self):
        self.responses, self.ended, self.cancelled = [], threading.Event(), False
    def is_cancelled(self):
        return self.cancelled
    def send(self, response=None, flags=0):
        assert not self.ended.is_set()
        if response is not None:
            self.responses.append(response)
        if flags == 1:
            self.ended.set()

def request(inputs):
    sender = Sender()
    decoded = {name: [base64.b64decode(value) for value in values] for name, values in inputs.items()}
    tensors = {name: Tensor(name, np.array(values, np.object_)) for name, values in decoded.items()}
    return SimpleNamespace(inputs=tensors, get_response_sender=lambda: sender, sender=sender)

repository, config, *sent = json.loads(sys.stdin.read())
sys.path.insert(0, f"{repository}/1")
from model import TritonPythonModel
model = TritonPythonModel()
model.initialize({"model_repository": repository, "model_version": "1", "model_config": json.dumps(config)})
requests = [request(inputs) for inputs in sent]
assert model.execute(requests) is None
for one in requests:
    assert one.sender.ended.wait(100)
stats = model.engine.stats()
assert stats.running == stats.waiting == stats.answer_rows == stats.draw_rows == 0
model.finalize()
def described(response):
    if response.error:
        return str(response.error)
    return {t.name: [base64.b64encode(value).decode() for value in t.values] for t in response.output_tensors}
print(json.dumps([[described(response) for response in one.sender.responses] for one in requests]))
"""


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    done = CliRunner().invoke(
        app, ["triton", str(tiny_bundle), str(folder), "--variant", "fp32", "--rows", "4"]
    )
    assert done.exit_code == 0, done.output
    return folder


def read_config(folder: Path) -> Any:
    pytest.importorskip("tritonclient.grpc", reason="the messages of Triton: pip install tritonclient[grpc]")
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), model_config_pb2.ModelConfig())


def test_tritons_protocol_buffer_reads_the_configurations(repository: Path):
    names = {folder.name for folder in repository.iterdir()}
    assert names == {"janus", "understand", "tokenize_image", "decode_image"}
    configs = {name: read_config(repository / name) for name in names}
    assert {config.name for config in configs.values()} == names
    assert configs["janus"].model_transaction_policy.decoupled
    assert configs["janus"].parameters["rows"].string_value == "4"
    assert [tensor.name for tensor in configs["janus"].input if not tensor.optional] == ["prompt"]


def test_graphs_are_chosen_by_their_roles(flow_bundle: Path, tmp_path: Path):
    folders = write_repository(flow_bundle, tmp_path / "models", variant="fp32")
    assert folders.keys() == {"janus", "understand", "decode_latents"}


@pytest.mark.parametrize("graph", ["understand", "tokenize_image", "decode_image"])
def test_a_graph_has_the_tensors_of_its_configuration(repository: Path, graph: str):
    """ONNX Runtime, which Triton loads it in, reads the copied graph, and says what its tensors are."""
    config = read_config(repository / graph)
    session = onnxruntime.InferenceSession(str(repository / graph / "1" / config.default_model_filename))
    dtypes = {"TYPE_UINT8": "tensor(uint8)", "TYPE_INT64": "tensor(int64)", "TYPE_FP32": "tensor(float)"}
    data_type = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    for declared, actual in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert len(declared) == len(actual)
        for tensor, real in zip(declared, actual, strict=True):
            sizes = [] if tensor.HasField("reshape") else list(tensor.dims)
            assert (tensor.name, sizes) == (real.name, list(real.shape[1:]))
            assert dtypes[data_type[tensor.data_type].name] == real.type
    assert config.max_batch_size >= 1
    assert config.HasField("dynamic_batching")


def text(*values: str | bytes) -> list[str]:
    return [base64.b64encode(v if isinstance(v, bytes) else v.encode()).decode() for v in values]


def test_the_python_model_answers_and_draws_without_torch(repository: Path, tiny_bundle: Path):
    image = Image.new("RGB", (40, 30), "orange")
    file = BytesIO()
    image.save(file, "PNG")
    config = {"parameters": {k: {"string_value": v} for k, v in
              (("bundle", "bundle"), ("variant", "fp32"), ("rows", "4"))}}  # fmt: skip
    requests = [
        {"prompt": text("which?"), "images": text(file.getvalue()), "settings": text('{"max_tokens": 9}')},
        {
            "mode": text("draw"),
            "prompt": text("a cat"),
            "settings": text('{"n": 2, "seed": 4, "guidance": 2, "partial_images": 1}'),
        },
        {"prompt": text("a"), "settings": text('{"heat": 1}')},
        {"prompt": text("a"), "mode": text("sing")},
        {"prompt": text("a"), "settings": text('{"deadline": "soon"}')},
    ]
    sent = json.dumps([str(repository / "janus"), config, *requests])
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN], input=sent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer, drawing, *errors = json.loads(done.stdout.splitlines()[-1])
    janus = Janus.from_pretrained(tiny_bundle, variant="fp32")
    values = [
        {name: [base64.b64decode(v) for v in vs] for name, vs in r.items()} for r in (*answer, *drawing)
    ]
    events = [json.loads(value["event"][0]) for value in values]
    answered = values[len(answer) - 1]["text"][0].decode()
    assert answered == janus.chat("which?", [image], max_tokens=9)
    assert events[len(answer) - 1]["settings"]["max_tokens"] == 9
    assert [event["type"] for event in events[len(answer) :]] == [
        "partial_image",
        "partial_image",
        "finished",
    ]
    expected = janus.draw("a cat", 2, seed=4, guidance=2)
    for data, drawn in zip(values[-1]["images"], expected, strict=True):
        pixels = np.asarray(Image.open(BytesIO(data)), int)
        assert np.abs(pixels - np.asarray(drawn, int)).max() <= 1  # decoded in another batch
    assert events[-1]["settings"]["guidance"] == 2
    for [error], words in zip(errors, ("no such setting", "chat or draw", "deadline"), strict=True):
        assert words in error


def test_a_repository_is_never_overwritten(repository: Path, tiny_bundle: Path, tmp_path: Path):
    with pytest.raises(BundleError, match="exists"):
        write_repository(tiny_bundle, repository)
    with pytest.raises(BundleError, match="has no variant 'fp64'"):
        write_repository(tiny_bundle, tmp_path / "new", variant="fp64")
    assert [*tmp_path.iterdir()] == []

"""lmms-eval resolves this project's model by its entry point, and evaluates it on a task.

lmms-eval has many dependencies, and is in no extra: `pip install lmms-eval janus-modular[torch]` in an
environment of its own, in which these tests run too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from janus_modular import Janus, PromptError
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig

pytestmark = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")

RUN = """
import json, sys
from datasets import Dataset
from lmms_eval import models
from lmms_eval.api.instance import Instance

folder, image = sys.argv[1:]
resolved = models.MODEL_REGISTRY_V2.resolve("janus_modular")
model = models.get_model("janus_modular").create_from_arg_string(
    f"pretrained={folder},dtype=float32", {"batch_size": 2, "device": "cpu"}
)
rows = [{"question": q} for q in ("What is this?", "<image>\\nColour?", "And this?")]
model.task_dict = {"task": {"test": rows}}
options = {"until": ["\\n"], "max_new_tokens": 6, "temperature": 0, "do_sample": False, "num_beams": 1}
requests = [
    Instance(
        request_type="generate_until",
        arguments=(row["question"], dict(options), lambda row: [image], i, "task", "test"),
        idx=0,
        metadata={"task": "task", "doc_id": i, "repeats": 1},
    )
    for i, row in enumerate(rows)
]
print(json.dumps([resolved.class_path, model.generate_until(requests)]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms") / "model"
    torch.manual_seed(0)
    save(ModelAssembly.from_config(resolve(load("tiny"), ModelConfig)), folder)
    Image.new("RGB", (40, 30), "orange").save(folder.parent / "cat.png")
    return folder


def test_the_model_is_resolved_by_lmms_eval_and_answers(model: Path) -> None:
    """In a process of its own, as the console command; answers are those of `chat` with the same images."""
    image = str(model.parent / "cat.png")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(model), image], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    path, answers = json.loads(result.stdout.splitlines()[-1])
    assert path == "janus_plugins.harness.answering_model.AnsweringModel"
    janus = Janus.from_pretrained(model, device="cpu", dtype="float32")
    questions = ["What is this?", "\nColour?", "And this?"]
    expected = [str(janus.chat(text, [image], max_tokens=6, stop=["\n"])) for text in questions]
    assert answers == expected


def test_markers_and_settings() -> None:
    from janus_plugins.harness.answering_model import question, sampler_settings

    image = Image.new("RGB", (4, 4))
    [message] = question("A <image> and <image>.", [image, image])
    assert [getattr(segment, "text", "image") for segment in message.content] == [
        *("A ", "image"),
        *(" and ", "image", "."),
    ]
    with pytest.raises(PromptError, match=r"has 1 <image> and 2 images"):
        question("A <image>.", [image, image])
    assert sampler_settings({"temperature": 0.7, "top_p": 0.9, "do_sample": True, "until": "."}) == {
        "max_tokens": 1024,
        "temperature": 0.7,
        "stop": ["."],
        "top_p": 0.9,
    }
    assert sampler_settings({"temperature": 0.7, "do_sample": False})["temperature"] == 0
    for options in ({"num_beams": 4}, {"repetition_penalty": 1.2}):
        with pytest.raises(ValueError, match=r"num_beams|repetition_penalty"):
            sampler_settings(options)

"""A component whose package is not installed: the error names component and package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from janus_modular import ComponentConfig, ComponentSpec, MissingExtraError
from janus_modular.errors import JanusError, MissingPackageError
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import Plugins
from janus_modular.registry import Entry

WHO = "the backbone 'packed' of acme 1.0 needs "


def raising(error: ImportError) -> Callable[[Any], Any]:
    def factory(config: Any) -> Any:
        raise error

    return factory


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (
            ModuleNotFoundError("No module named 'torchao'", name="torchao"),
            MissingPackageError,
            "the package 'torchao', which is not installed: pip install torchao",
        ),
        (
            ModuleNotFoundError("No module named 'a.b'", name="a.b"),
            MissingPackageError,
            "the package 'a', which is not installed: pip install a",
        ),
        (
            ImportError("Using `bitsandbytes` requires bitsandbytes: `pip install -U bitsandbytes`\nmore"),
            MissingPackageError,
            "a package that cannot be imported: Using `bitsandbytes` requires bitsandbytes: "
            "`pip install -U bitsandbytes`",
        ),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), MissingExtraError, "the extra 'lora'"),
    ],
)
def test_a_factory_that_lacks_a_package(error: ImportError, kind: type[JanusError], said: str) -> None:
    entry = Entry("packed", raising(error), ComponentConfig, "acme 1.0", "backbones")
    with pytest.raises(kind) as caught:
        entry.make(ComponentConfig(), build=lambda part: part)
    assert str(caught.value).startswith(WHO + said)


def test_an_attention_that_is_not_installed(plugins: Plugins) -> None:
    options = plugins.entry("backbones", "hf").config
    sizes = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    part = ComponentSpec("backbones", "hf", options(config=sizes, attention="flash_attention_2"))
    with pytest.raises(MissingPackageError, match=r"the backbone 'hf' of janus-modular .* needs a package"):
        ModelBuilder(plugins)(part)


LACKING = ("peft", "sklearn", "tensorboard")
CONFIG = {
    "model": {"backbone": {"name": "lora", "base": "hf"}},
    "learn": ["backbone"],
    "sources": {"digits": {"name": "digits", "task": "read"}},
    "mixture": {"digits": 1},
    "schedule": {"steps": 1},
    "output": "run",
    "trackers": ["jsonl", "tensorboard"],
}


@pytest.mark.parametrize("lacking", [LACKING, (*LACKING, "torch")])
def test_a_training_config_names_all_missing_extras_at_once(lacking: tuple[str, ...], tmp_path: Path) -> None:
    """In a process of its own, whose plugins were not loaded before the packages were taken away."""
    (tmp_path / "mine.yaml").write_text(json.dumps(CONFIG), "utf-8")
    commands = (
        ["train", "mine.yaml"],
        ["train", "mine.yaml", "--dry-run"],
        ["config", "validate", "mine.yaml"],
    )
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({lacking!r}))  # as if they were not installed\n"
        "from typer.testing import CliRunner\nfrom janus_modular.cli.app import app\n"
        f"for words in {commands!r}:\n"
        "    done = CliRunner().invoke(app, words)\n"
        "    print(done.exit_code, done.stderr, end='END')\n"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    *outputs, last = done.stdout.split("END")
    assert (len(outputs), last) == (3, "")
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].startswith("2 the config has ")
    for path, extra in (("sources.digits", "demo"), ("trackers[1]", "train"), ("model.backbone", "lora")):
        assert any(
            f"  {path}.name: " in line and f"needs the extra '{extra}'" in line
            for line in outputs[0].splitlines()
        )
    [install] = [line for line in outputs[0].splitlines() if "pip install" in line]
    assert sorted(re.search(r"\[(.*)\]", install)[1].split(",")) == ["demo", "lora"]  # demo includes train
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "lacking", "extras"),
    [
        (["serve", "bundle"], ("fastapi", "onnxruntime"), ["runtime", "serve"]),
        (["serve", "bundle", "--runtime", "tensorrt-rtx"], ("greenlet", "tensorrt_rtx"), ["rtx", "serve"]),
        (["serve", "checkpoint"], ("torch", "uvicorn"), ["serve", "torch"]),
        (["serve", "owner/name"], ("torch", "uvicorn"), ["serve"]),  # not here: perhaps a bundle
        (["ui", "checkpoint"], ("gradio", "torch", "fastapi"), ["torch", "ui"]),  # ui includes serve
        (["ui", "http://127.0.0.1:1"], ("gradio", "torch", "onnxruntime"), ["ui"]),
    ],
)
def test_a_server_names_all_missing_extras_at_once(
    words: list[str], lacking: tuple[str, ...], extras: list[str], tmp_path: Path
) -> None:
    for folder in ("bundle", "checkpoint"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}", "utf-8")
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({lacking!r}))  # as if they were not installed\n"
        f"sys.argv[1:] = {words!r}\nfrom janus_modular.cli.app import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"'{words[0]}' needs the extra" in done.stderr, done.stderr
    assert sorted(re.search(r"pip install 'janus-modular\[(.*?)\]", done.stderr)[1].split(",")) == extras


@pytest.mark.parametrize("words", [["chat", "no-bundle", "hi"], ["draw", "no-bundle", "a cat"]])
def test_a_misspelt_path_is_named_where_torch_is_missing(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None  # as if it were not installed\n"
        f"sys.argv[1:] = {words!r}\nfrom janus_modular.cli.app import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no file or folder 'no-bundle'" in done.stderr
    assert "torch" not in done.stderr

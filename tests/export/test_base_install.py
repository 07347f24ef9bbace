"""A bundle answers and draws in an installation without torch and transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NOT_INSTALLED = ("torch", "transformers", "safetensors", "onnx", "onnx_ir", "onnxscript")
"""What a server does without."""

NOT_IMPORTED = (*NOT_INSTALLED, "huggingface_hub")
"""What it never loads; tokenizers requires the last, to fetch files, and so brings it there."""

PROGRAM = f"""
import sys
NOT_IMPORTED = {NOT_IMPORTED!r}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NOT_IMPORTED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
if "--refuse" in sys.argv:
    sys.argv.remove("--refuse")
    sys.meta_path.insert(0, Refuse())
from janus_modular.cli.app import app
try:
    app(sys.argv[1:])
finally:
    print(sorted(name for name in sys.modules if name.partition(".")[0] in NOT_IMPORTED))
"""


def command(python: Path | str, folder: Path, *words: object) -> str:
    """Run a command of ours in a folder; return what it prints before the list of modules, which is empty."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JANUS_"))}
    line = [str(python), "-c", PROGRAM, *map(str, words)]
    done = subprocess.run(
        line, cwd=folder, env=clean | {"COLUMNS": "200"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said, _, loaded = done.stdout.rstrip("\n").rpartition("\n")
    assert loaded == "[]"
    return said


def asks_and_draws(python: Path | str, folder: Path, bundle: Path, *options: str) -> tuple[str, bytes]:
    """Ask about an image and draw one; return what came of it."""
    Image.new("RGB", (40, 30), "orange").save(folder / "cat.png")
    answer = command(
        python, folder, *options, "chat", bundle, "which?", "--image", "cat.png", "--max-tokens", 9, "--json"
    )
    command(python, folder, *options, "draw", bundle, "a cat", "-n", 2, "-o", "drawn.png")
    with Image.open(folder / "drawn.png") as image:
        assert image.size == (68, 32)
        assert image.text["prompt"] == "a cat"
        assert image.text["variant"] == "fp32"  # that was drawn by, though nobody named it
        return json.loads(answer)["answer"], image.tobytes()


def test_chat_and_draw_import_nothing_that_a_server_lacks(tiny_bundle: Path, tmp_path: Path):
    asks_and_draws(sys.executable, tmp_path, tiny_bundle, "--refuse")


def test_a_checkpoint_says_what_it_needs_there(tiny_checkpoint: Path, tmp_path: Path):
    line = [sys.executable, "-c", PROGRAM, "--refuse", "draw", str(tiny_checkpoint), "a cat"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'janus-modular[torch]'" in done.stderr


TORCH = ("torch", "transformers", "safetensors", "huggingface_hub", "gguf", "accelerate")
ONNX = ("onnx", "onnx_ir", "onnxscript")


@pytest.mark.parametrize(
    ("words", "lacking", "said"),
    [
        (["export", "m", "b"], (*TORCH, *ONNX), "'export' needs the extra 'export'"),
        (["export", "m", "b"], TORCH, "'export' needs the extra 'export'"),
        (["build", "b", "--target", "tensorrt-rtx"], (*TORCH, *ONNX), "needs the extra 'rtx'"),
        (
            ["build", "b", "--target", "tensorrt"],
            (*TORCH, *ONNX),
            "'gpu': pip uninstall -y onnxruntime && pip",
        ),
        (["demo", "--out", "demo"], (*TORCH, "sklearn", "matplotlib"), "'demo' needs the extra 'demo': pip"),
        (["demo", "--out", "demo"], ("matplotlib",), "'demo' needs the extra 'demo': pip"),
        (["verify", "b", "--against", "m"], (*TORCH, *ONNX), "'verify' needs the extra 'export'"),
        (
            ["verify", "b", "--against", "m"],
            ("onnxruntime",),
            "'verify' needs the extra 'runtime': pip install 'janus-modular[runtime]';"
            " with an NVIDIA GPU, instead: pip uninstall -y onnxruntime &&"
            " pip install 'janus-modular[gpu]'\n",
        ),
        (
            ["verify", "b", "--against", "m"],
            (*TORCH, *ONNX, "onnxruntime"),
            "'verify' needs the extras 'export' and 'runtime': pip install 'janus-modular[export,runtime]';"
            " with an NVIDIA GPU, instead: pip uninstall -y onnxruntime &&"
            " pip install 'janus-modular[export,gpu]'\n",
        ),
        (
            ["verify", "b", "--against", "m", "--runtime", "tensorrt-rtx"],
            (*ONNX, "onnxruntime", "tensorrt_rtx"),
            "'verify' needs the extras 'export', 'runtime' and 'rtx': pip install"
            " 'janus-modular[export,runtime,rtx]';",
        ),
        (
            ["verify", "b", "--against", "m", "--runtime", "tensorrt"],
            ("tensorrt",),
            "'verify' needs the extra 'gpu': pip uninstall",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_command_names_its_own_extra(words: list[str], lacking: tuple[str, ...], said: str, tmp_path: Path):
    """Not that of the first package that is missing: who has `rtx` lacks torch, and needs `export`.

    onnxruntime's distribution is here, so the line for its other build removes it first.
    """
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({lacking!r}))  # as if they were not installed\n"
        f"from janus_modular.cli.app import app\napp({words!r})"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr


def test_engines_are_built_without_torch_and_onnx_runtime(tiny_gpu_bundle: Path, tmp_path: Path):
    bundle = shutil.copytree(tiny_gpu_bundle, tmp_path / "bundle")
    words = ["build", str(bundle), "--target", "tensorrt-rtx", "--sm", "8.9", "--graph", "embed", "--quiet"]
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({(*TORCH, 'onnxruntime')!r}))\n"
        f"from janus_modular.cli.app import app\napp({words!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (bundle / "engines/fp16.tensorrt-rtx.sm89/embed.engine").is_file()


def test_a_bundle_without_a_runtime_names_both(tiny_bundle: Path, tmp_path: Path):
    code = (
        "import sys\nsys.modules['onnxruntime'] = None\n"
        f"from janus_modular.cli.app import app\napp(['draw', {str(tiny_bundle)!r}, 'a cat'])"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "janus-modular[runtime]" in done.stderr
    assert "janus-modular[gpu]" in done.stderr


@pytest.mark.slow
def test_the_extra_runtime_is_enough(tiny_bundle: Path, tmp_path: Path):
    """A fresh environment, the wheel with this one extra, and nothing of ours beside it."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[runtime]"]
    done = subprocess.run(list(map(str, install)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    packages = {line.partition("==")[0].lower().replace("-", "_") for line in listed.stdout.split()}
    assert {"onnxruntime", "tokenizers", "janus_modular"} <= packages
    assert not packages & set(NOT_INSTALLED)
    there = tmp_path / "there"
    here = tmp_path / "here"
    there.mkdir()
    here.mkdir()
    assert asks_and_draws(python, there, tiny_bundle) == asks_and_draws(sys.executable, here, tiny_bundle)

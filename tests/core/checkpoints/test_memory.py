"""The anonymous memory that saving and loading checkpoints takes; memory-mapped files do not count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

PROBE = """
import re, sys, threading
from pathlib import Path
import torch

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

class Peak:
    def __enter__(self):
        self.start = self.peak = anonymous()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while not self.over.wait(0.001):
            self.peak = max(self.peak, anonymous())
    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        self.growth = max(self.peak, anonymous()) - self.start

torch.set_num_threads(1)
"""

DECODER = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "vocab_size": 16_000,
}
LARGEST = 16_000 * 512 * 4
SLACK = 12_000_000  # Python's own objects, and pages of the allocator that are not given back


def run(script: str, *arguments: object) -> list[int]:
    """Run a script after the probe, in a process of its own; return the numbers that it prints."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in result.stdout.split()]


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model of about 240 MB, and a tiny one that warms a process up."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("made", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    from janus_modular.checkpoints import ModelAssembly, save
    from janus_modular.config import resolve
    from janus_modular.config.schema import ModelConfig

    root = tmp_path_factory.mktemp("memory")
    for name, backbone in (("small", {}), ("large", DECODER | {"num_key_value_heads": 8, "head_dim": 64})):
        save(ModelAssembly.from_config(resolve(made.tiny(**backbone), ModelConfig)), root / name)
    return root


@pytest.mark.slow
def test_loading_costs_the_model_and_no_more(folder: Path) -> None:
    size, growth = run(
        """
from janus_modular.checkpoints import ModelAssembly
root = Path(sys.argv[1])
ModelAssembly.from_checkpoint(root / "small")
with Peak() as peak:
    model = ModelAssembly.from_checkpoint(root / "large").model
print(sum(p.numel() * p.element_size() for p in model.parameters()), peak.growth)
""",
        folder,
    )
    assert size > 200_000_000
    assert growth <= size + LARGEST + SLACK


@pytest.mark.slow
def test_converting_costs_a_shard_and_saving_a_tensor(folder: Path) -> None:
    converted, saved = run(
        """
from janus_modular.checkpoints import convert, ModelAssembly, save
root = Path(sys.argv[1])
convert(root / "small", root / "small-half", dtype=torch.bfloat16)
with Peak() as peak:
    convert(root / "large", root / "half", dtype=torch.bfloat16, max_shard_size=50_000_000)
print(peak.growth)
opened = ModelAssembly.from_checkpoint(root / "half")
with Peak() as peak:
    save(opened, root / "again")
print(peak.growth)
""",
        folder,
    )
    assert converted <= 50_000_000 + LARGEST + SLACK
    assert saved <= LARGEST + SLACK


def test_opening_weights_costs_nothing(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.zeros(5_000_000) for i in range(5)}  # 100 MB
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "b.bin")
    growth = run(
        """
from janus_modular.weights.files import open_weights
for path in sys.argv[1:]:
    with Peak() as peak:
        weights = open_weights(Path(path))
        total = sum(weights[name].sum().item() for name in weights)
    print(peak.growth)
""",
        tmp_path / "a.safetensors",
        tmp_path / "b.bin",
    )
    assert max(growth) <= SLACK

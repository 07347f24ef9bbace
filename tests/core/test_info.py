"""``info``: parameters against the published counts, and what a checkpoint says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from janus_modular.assemble import assemble
from janus_modular.checkpoints import native
from janus_modular.cli.info import gather, millions
from janus_modular.config import load, resolve
from janus_modular.errors import CheckpointError, ConfigError
from janus_modular.schema import ModelConfig

# In millions, per module: counted on the published models.
PUBLISHED = {
    "janus_pro_1b": (303.689, 6.296, 0.131, 71.883, 4.215, 37.767, 1442.941 + 209.715),
    "janus_pro_7b": (303.689, 20.980, 0.131, 71.883, 16.818, 83.907, 6490.935 + 419.430),
}
PATHS = (
    "understanding.encoder",
    "understanding.adaptor",
    "generation",
    "generation.tokenizer",
    "generation.adaptor",
    "generation.head",
    "backbone",
)


class NoProcessor:
    def save(self, folder: Path) -> None:
        """Write nothing."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_models(name: str):
    counted = {row["path"]: row["parameters"] / 1e6 for row in gather(name, [])["components"]}
    assert counted == pytest.approx(dict(zip(PATHS, PUBLISHED[name], strict=True)), abs=1e-3)  # three digits


def test_a_checkpoint_says_its_layout_dtypes_and_plugins(tmp_path: Path):
    model = assemble(resolve(load("tiny"), ModelConfig))
    native.save(model, NoProcessor(), tmp_path / "model", dtype=torch.bfloat16)
    facts = gather(str(tmp_path / "model"), [])
    assert facts["layout"].startswith("a checkpoint in the native layout")
    assert facts["dtypes"]["bfloat16"] >= facts["parameters"] > 0
    assert facts["plugins"] == ["janus-modular 0.1.0"]
    with pytest.raises(ConfigError, match="overrides change configs only"):
        gather(str(tmp_path / "model"), ["a=1"])


def test_a_folder_of_no_known_layout_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        gather(str(tmp_path), [])


def test_a_hub_id_is_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'nobody/nothing' is no file or folder here, and the hub"):
        gather("nobody/nothing", [])
    with pytest.raises(ConfigError, match="Did you mean 'model/tiny'"):
        gather("model/tyni", [])


@pytest.mark.parametrize(("numbers", "said"), [(72, "72"), (1500, "0.002 M"), (1442941000, "1,442.941 M")])
def test_a_few_numbers_are_not_said_in_millions(numbers: int, said: str):
    assert millions(numbers) == said

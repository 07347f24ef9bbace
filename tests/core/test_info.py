"""``info``: parameters against the published counts, and what a checkpoint says of itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from janus_modular.checkpoints import ModelAssembly, native
from janus_modular.checkpoints.opening import detect_format
from janus_modular.cli.app import app
from janus_modular.cli.info import gather, millions
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import CheckpointError, ConfigError, JanusError
from janus_modular.janus import Janus
from janus_modular.plugins import EntryPointInfo, Plugins

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


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_models(name: str):
    counted = {row["path"]: row["parameters"] / 1e6 for row in gather(name, [])["components"]}
    assert counted == pytest.approx(dict(zip(PATHS, PUBLISHED[name], strict=True)), abs=1e-3)  # three digits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    native.save(ModelAssembly.from_config(resolve(load("tiny"), ModelConfig)), folder)
    return folder


@pytest.fixture
def edited(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of a checkpoint, to be made one that cannot be opened."""
    return Path(shutil.copytree(saved, tmp_path / "edited"))


def test_info_prints_format_dtypes_and_plugins(tmp_path: Path):
    native.save(
        ModelAssembly.from_config(resolve(load("tiny"), ModelConfig)),
        tmp_path / "model",
        dtype=torch.bfloat16,
    )
    facts = gather(str(tmp_path / "model"), [])
    assert facts["format"].startswith("a checkpoint in the native format")
    assert facts["dtypes"]["bfloat16"] >= facts["parameters"] > 0
    assert (facts["plugins"], facts["installed"]) == (["janus-modular 0.1.0"], {})
    with pytest.raises(ConfigError, match="overrides change configs only"):
        gather(str(tmp_path / "model"), ["a=1"])


def test_info_prints_the_recorded_plugins_and_what_is_installed_in_their_place(edited: Path):
    def older(config: dict[str, Any]) -> None:
        for item in config["plugins"]:
            item.update({"dist": "acme"} if item["slot"] == "heads" else {"version": "0.0.9"})

    edit_json("config.json", older)(edited)
    facts = gather(str(edited), [])
    assert facts["plugins"] == ["acme 0.1.0", "janus-modular 0.0.9"]
    now = ["janus-modular 0.1.0"]
    assert facts["installed"] == {"acme 0.1.0": now, "janus-modular 0.0.9": now}
    printed = CliRunner().invoke(app, ["info", str(edited)]).stdout
    assert "needs janus-modular 0.0.9 (installed: 0.1.0)\n" in printed
    assert "needs acme 0.1.0 (installed: janus-modular 0.1.0)\n" in printed


def test_a_folder_of_no_known_format_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        gather(str(tmp_path), [])


def test_a_format_that_cannot_be_used_is_named_beside_the_known_ones(tmp_path: Path, plugins: Plugins):
    formats = (
        EntryPointInfo("formats", "acme", "acme_new", "acme-new", "0.2", api=2),
        EntryPointInfo("formats", "off", "acme_off", "acme-off", "0.2"),
    )
    everything = Plugins([*plugins.entry_points, *formats], disabled=["acme-off"])
    with pytest.raises(CheckpointError, match="of no known format") as error:
        detect_format(tmp_path, {"model_type": "acme"}, everything)
    assert "format 'acme' of acme-new 0.2 cannot be loaded: it is written for version 2" in str(error.value)
    assert "format 'off' of acme-off 0.2 is disabled by JANUS_DISABLE_PLUGINS=acme-off" in str(error.value)


def test_a_hub_id_is_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'nobody/nothing' is no file or folder here, and the hub"):
        gather("nobody/nothing", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no file or folder 'runs/mina'; .*Did you mean 'runs/mine'"):
        gather("runs/mina", [])
    (tmp_path / "models/mine").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"The folder 'models' is here\. Did you mean 'models/mine'"):
        gather("models/mina", [])
    with pytest.raises(ConfigError, match="Did you mean 'model/tiny'"):
        gather("model/tyni", [])


@pytest.mark.parametrize(
    ("numbers", "expected"), [(72, "72"), (1500, "0.002 M"), (1442941000, "1,442.941 M")]
)
def test_small_counts_are_printed_in_full(numbers: int, expected: str):
    assert millions(numbers) == expected


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / name).read_text("utf-8"))
        change(record)
        (folder / name).write_text(json.dumps(record), "utf-8")

    return edit


NORM = "understanding.encoder.stem.0.bias"
EDITS = {
    "int8 weights": edit_weights(lambda w: w.update({NORM: w[NORM].to(torch.int8)})),
    "complex weights": edit_weights(lambda w: w.update({NORM: w[NORM].to(torch.complex64)})),
    "another shape": edit_weights(lambda w: w.update({NORM: w[NORM][:-1].clone()})),
    "a weight is missing": edit_weights(lambda w: w.pop(NORM)),
    "a weight too many": edit_weights(lambda w: w.update({"backbone.model.norm.bias": torch.ones(3)})),
    "quantised": edit_json("config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})),
    "a base that is quantised": edit_json(
        "config.json",
        lambda c: c["model"]["backbone"]["config"].update(
            quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}
        ),
    ),
    "another context": edit_json("processor.json", lambda p: p.update(context=p["context"] + 1)),
    "another image size": edit_json("processor.json", lambda p: p["drawing"].update(num_tokens=5)),
    "no processor": lambda folder: (folder / "processor.json").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_info_raises_the_errors_of_opening(edit: Callable[[Path], None], edited: Path):
    gather(str(edited), [])
    edit(edited)
    with pytest.raises(JanusError) as opening:
        ModelAssembly.from_checkpoint(edited)
    with pytest.raises(JanusError) as info:
        gather(str(edited), [])
    assert str(info.value) == str(opening.value)


@pytest.mark.parametrize("sampler", ["nope", "autoregressive", "acme:text"])
def test_an_unusable_text_sampler_is_reported(sampler: str, edited: Path):
    edit_json("config.json", lambda c: c["model"].update(text_sampler=sampler))(edited)
    with pytest.raises(JanusError) as chat:
        Janus.from_pretrained(edited).chat("What?")
    assert gather(str(edited), [])["unusable"] == {"chat": str(chat.value)}


EMBEDDINGS = "backbone.model.model.embed_tokens.weight"  # `tiny` ties its output weights to them


def test_info_says_why_more_numbers_are_stored_than_the_model_has_parameters(edited: Path):
    model = ModelAssembly.from_checkpoint(edited).model
    values = model.state_dict(keep_vars=True).values()
    buffers = sum(value.numel() for value in values if not isinstance(value, nn.Parameter))
    stored = gather(str(edited), [])["stored"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert stored == {"parameters": parameters, "buffers": buffers, "tied_copies": 0, "unused": 0}
    assert buffers > 0  # the statistics of the codes
    edit_weights(lambda w: w.update({"backbone.model.lm_head.weight": w[EMBEDDINGS].clone()}))(edited)
    facts = gather(str(edited), [])
    assert facts["stored"] == stored | {"tied_copies": model.get_parameter(EMBEDDINGS).numel()}
    assert sum(facts["stored"].values()) == sum(facts["dtypes"].values())


def test_info_prints_the_shares_of_the_stored_numbers(saved: Path):
    printed = CliRunner().invoke(app, ["info", str(saved)]).stdout
    buffers = gather(str(saved), [])["stored"]["buffers"]
    assert "(tied weights counted once)" in printed
    assert f"{millions(buffers)} are buffers (state that is not trained)" in printed
    assert "copies" not in printed
    assert "stored numbers" not in CliRunner().invoke(app, ["info", "tiny"]).stdout


def test_a_path_that_does_not_exist_is_not_called_a_config(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"there is no file or folder '.*/nothing'; expected a checkpoint"
    ):
        gather(str(tmp_path / "nothing"), [])


@pytest.mark.parametrize("name", ["tiny", "model/tiny", "train/janus_pro/stage1"])
@pytest.mark.parametrize("command", ["chat NAME hi", "draw NAME hi", "convert NAME NEW", "export NAME NEW"])
def test_a_config_in_place_of_a_model_is_an_error_about_its_missing_weights(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, command.replace("NAME", name).split())
    assert done.exit_code == 2
    assert f"'{name}' is a config, which has no weights; expected a model" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_with_the_name_of_a_config_is_a_model(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "tiny")
    assert Janus.from_pretrained("tiny", device="cpu").model


def test_the_folder_of_a_training_run_says_where_its_model_is(saved: Path, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "run" / "model")
    with pytest.raises(CheckpointError, match=r"no config\.json; .*The model of this run is .*/run/model\.$"):
        ModelAssembly.from_checkpoint(tmp_path / "run")

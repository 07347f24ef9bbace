"""Checkpoints record the plugins of their samplers: a missing sampler is an error where it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from janus_modular.checkpoints import ModelAssembly, convert, save
from janus_modular.errors import JanusError, PluginError
from janus_modular.janus import Janus
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.processing.processor import Processor

Make = Callable[..., tuple[JanusModel, Processor]]


def without_the_image_sampler() -> Plugins:
    entries = default_plugins().entry_points
    return Plugins(
        entry for entry in entries if (entry.slot, entry.name) != ("image_samplers", "autoregressive")
    )


def of_acme(folder: Path) -> None:
    """Write into a checkpoint that its image sampler is of another distribution."""
    record = json.loads((folder / "config.json").read_text())
    for entry in record["plugins"]:
        if (entry["slot"], entry["name"]) == ("image_samplers", "autoregressive"):
            entry |= {"dist": "acme-samplers", "version": "0.2"}
    (folder / "config.json").write_text(json.dumps(record))


def recorded_samplers(folder: Path) -> dict[str, str]:
    plugins = json.loads((folder / "config.json").read_text())["plugins"]
    return {entry["name"]: entry["dist"] for entry in plugins if entry["slot"].endswith("_samplers")}


def test_a_missing_sampler_is_an_error_with_a_hint_where_it_is_used(make: Make, tmp_path: Path) -> None:
    save(make(), tmp_path / "model")
    assert recorded_samplers(tmp_path / "model") == {
        "text": "janus-modular",
        "autoregressive": "janus-modular",
    }
    of_acme(tmp_path / "model")
    janus = Janus.from_pretrained(tmp_path / "model", plugins=without_the_image_sampler())
    janus.chat("what?", max_tokens=2)
    with pytest.raises(PluginError, match=r"called 'autoregressive'\.\n.*pip install acme-samplers==0\.2"):
        janus.draw("a cat")


def test_a_missing_sampler_stays_recorded(make: Make, tmp_path: Path) -> None:
    save(make(), tmp_path / "model")
    of_acme(tmp_path / "model")
    plugins = without_the_image_sampler()
    save(
        ModelAssembly.from_checkpoint(tmp_path / "model", plugins=plugins),
        tmp_path / "again",
        plugins=plugins,
    )
    convert(tmp_path / "model", tmp_path / "converted", plugins=plugins)
    for name in ("again", "converted"):
        assert recorded_samplers(tmp_path / name) == {
            "text": "janus-modular",
            "autoregressive": "acme-samplers",
        }


def test_a_checkpoint_that_records_no_samplers_opens(make: Make, tmp_path: Path) -> None:
    save(make(), tmp_path / "model")
    path = tmp_path / "model/config.json"
    record = json.loads(path.read_text())
    record["plugins"] = [entry for entry in record["plugins"] if not entry["slot"].endswith("_samplers")]
    path.write_text(json.dumps(record))
    assert len(Janus.from_pretrained(tmp_path / "model").draw("a cat")) == 1
    janus = Janus.from_pretrained(tmp_path / "model", plugins=without_the_image_sampler())
    with pytest.raises(PluginError, match="no image sampler is called 'autoregressive'"):
        janus.draw("a cat")
    janus.save_pretrained(tmp_path / "again")  # nobody knows whose it is
    assert recorded_samplers(tmp_path / "again") == {"text": "janus-modular"}


@pytest.mark.parametrize(
    ("file", "edit", "expected"),
    [
        (
            "config.json",
            lambda record: [entry.update(slot="sampling_loops") for entry in record["plugins"]],
            "'text_samplers' or 'image_samplers' now",
        ),
        (
            "config.json",
            lambda record: record["model"].update(text_loop=record["model"].pop("text_sampler")),
            "text_loop.*It is called 'text_sampler' now",
        ),
        (
            "processor.json",
            lambda record: record.update(picture_tokens=record.pop("image_tokens")),
            "picture_tokens: It is called 'image_tokens' now",
        ),
        (
            "processor.json",
            lambda record: record.update(never_said=record.pop("suppress_tokens")),
            "never_said: It is called 'suppress_tokens' now",
        ),
    ],
)
def test_names_of_the_version_before_are_errors_with_the_new_ones(
    make: Make, tmp_path: Path, file: str, edit: Callable[[dict[str, Any]], object], expected: str
) -> None:
    save(make(), tmp_path / "model")
    path = tmp_path / "model" / file
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    with pytest.raises(JanusError, match=expected):
        Janus.from_pretrained(tmp_path / "model")

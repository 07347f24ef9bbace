"""Checkpoints record whose their sampling loops are: one that is missing is named by who asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from janus_modular.checkpoints import convert, open_checkpoint, save
from janus_modular.errors import PluginError
from janus_modular.janus import Janus
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.processing.processor import Processor

Make = Callable[..., tuple[JanusModel, Processor]]


def without_the_drawing_loop() -> Plugins:
    here = default_plugins().entry_points
    return Plugins(one for one in here if (one.slot, one.name) != ("sampling_loops", "autoregressive"))


def of_acme(folder: Path) -> None:
    """Write into a checkpoint that somebody else offered its drawing loop."""
    record = json.loads((folder / "config.json").read_text())
    for one in record["plugins"]:
        if (one["slot"], one["name"]) == ("sampling_loops", "autoregressive"):
            one |= {"dist": "acme-loops", "version": "0.2"}
    (folder / "config.json").write_text(json.dumps(record))


def loops_recorded(folder: Path) -> dict[str, str]:
    plugins = json.loads((folder / "config.json").read_text())["plugins"]
    return {one["name"]: one["dist"] for one in plugins if one["slot"] == "sampling_loops"}


def test_a_loop_that_is_missing_is_named_with_the_cure_by_who_uses_it(make: Make, tmp_path: Path) -> None:
    save(*make(), tmp_path / "model")
    assert loops_recorded(tmp_path / "model") == {"text": "janus-modular", "autoregressive": "janus-modular"}
    of_acme(tmp_path / "model")
    janus = Janus.from_pretrained(tmp_path / "model", plugins=without_the_drawing_loop())
    janus.chat("what?", max_tokens=2)
    with pytest.raises(PluginError, match=r"called 'autoregressive'\.\n.*pip install acme-loops==0\.2"):
        janus.draw("a cat")


def test_a_loop_that_is_missing_stays_recorded(make: Make, tmp_path: Path) -> None:
    save(*make(), tmp_path / "model")
    of_acme(tmp_path / "model")
    plugins = without_the_drawing_loop()
    save(*open_checkpoint(tmp_path / "model", plugins=plugins), tmp_path / "again", plugins=plugins)
    convert(tmp_path / "model", tmp_path / "converted", plugins=plugins)
    for name in ("again", "converted"):
        assert loops_recorded(tmp_path / name) == {"text": "janus-modular", "autoregressive": "acme-loops"}


def test_a_checkpoint_that_records_no_loops_opens(make: Make, tmp_path: Path) -> None:
    save(*make(), tmp_path / "model")
    path = tmp_path / "model/config.json"
    record = json.loads(path.read_text())
    record["plugins"] = [one for one in record["plugins"] if one["slot"] != "sampling_loops"]
    path.write_text(json.dumps(record))
    assert len(Janus.from_pretrained(tmp_path / "model").draw("a cat")) == 1
    janus = Janus.from_pretrained(tmp_path / "model", plugins=without_the_drawing_loop())
    with pytest.raises(PluginError, match="no sampling loop is called 'autoregressive'"):
        janus.draw("a cat")
    janus.save_pretrained(tmp_path / "again")  # nobody knows whose it is
    assert loops_recorded(tmp_path / "again") == {"text": "janus-modular"}

"""Third-party samplers: registration, selection in the config, and errors if they violate the protocol."""

from __future__ import annotations

from importlib.metadata import Distribution
from pathlib import Path

import numpy as np
import pytest
import torch

from janus_modular import PluginError, Plugins
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import CheckError
from janus_modular.janus import Janus
from janus_modular.plugins.entry_points import installed
from janus_modular.testing import SamplingExample, checks_of, run_check
from janus_modular.testing.examples import NumpySession, prompt

SAMPLERS = """
from dataclasses import dataclass
import numpy as np
from janus_modular import ImageSamplerSettings, TextSamplerSettings, hookimpl

def pixels(shades):
    return np.stack([np.full((3, 4, 4), shade, np.uint8) for shade in shades])

def numbered(session, prompts, settings):
    yield 1, 1
    return pixels(settings.numbers or range(settings.first, settings.first + len(prompts)))

def silent(session, prompts, settings):
    yield None

def unfinished(session, prompts, settings):
    yield 1, 1

def ids(session, prompts, settings):
    yield np.zeros(len(prompts), np.int64)

def columns(session, prompts, settings):
    yield np.zeros((len(prompts), 1), np.int64)

@hookimpl
def register_image_samplers(registry):
    for sampler in (numbered, silent, unfinished, ids):
        registry.add(sampler.__name__, sampler, ImageSamplerSettings)

@hookimpl
def register_text_samplers(registry):
    for sampler in (ids, columns, silent):
        registry.add(sampler.__name__, sampler, TextSamplerSettings)
"""


@pytest.fixture(scope="module")
def model() -> Janus:
    torch.manual_seed(0)
    return Janus.of(ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig)))


@pytest.fixture
def third_party(plugins: Plugins, tmp_path: Path) -> Plugins:
    (tmp_path / "acme_samplers.py").write_text(SAMPLERS)
    plugins.add_file(tmp_path / "acme_samplers.py")
    return plugins


@pytest.fixture
def janus(model: Janus, third_party: Plugins) -> Janus:
    return Janus.of(model.assembly, third_party)  # in a runtime of its own


def drawn_shades(janus: Janus, sampler: str, **options: object) -> list[int]:
    janus.runtime.image_sampler = sampler
    return [int(np.asarray(image)[0, 0, 0]) for image in janus.draw("a", **options)]


def test_each_batch_of_images_gets_its_numbers(janus: Janus) -> None:
    assert drawn_shades(janus, "numbered", n=3, batch_size=2) == [0, 1, 2]
    assert drawn_shades(janus, "numbered", n=3, batch_size=2, first=5) == [5, 6, 7]
    assert drawn_shades(janus, "numbered", n=3, batch_size=2, numbers=[7, 3, 9]) == [7, 3, 9]


def test_the_config_chooses_the_image_sampler(third_party: Plugins, tmp_path: Path) -> None:
    """The checkpoint keeps the choice; without one, the generation path names its sampler."""
    assert (
        Janus.of(ModelAssembly.from_config(resolve(load("tiny"), ModelConfig))).runtime.image_sampler
        == "autoregressive"
    )
    config = resolve(load("tiny", ["image_sampler=numbered"], third_party), ModelConfig, third_party)
    janus = Janus.of(ModelAssembly.from_config(config, third_party), third_party)
    assert int(np.asarray(janus.draw("a", first=4)[0])[0, 0, 0]) == 4
    janus.save_pretrained(tmp_path / "model")
    again = Janus.from_pretrained(tmp_path / "model", plugins=third_party)
    assert int(np.asarray(again.draw("a", first=6)[0])[0, 0, 0]) == 6


@pytest.mark.parametrize(
    ("sampler", "found"),
    [
        ("silent", r"yielded None; expected \(steps done, steps in all\)"),
        ("unfinished", r"returned None; expected pixels \(1, 3, H, W\)"),
        ("ids", r"yielded an array \(1,\) of int64; expected \(steps done"),
    ],
)
def test_a_broken_image_sampler_is_named(janus: Janus, sampler: str, found: str) -> None:
    with pytest.raises(CheckError, match=f"the image sampler '{sampler}' {found}"):
        drawn_shades(janus, sampler)


@pytest.mark.parametrize(
    ("sampler", "found"),
    [
        ("columns", r"yielded an array \(2, 1\) of int64; expected integer ids \(2,\)"),
        ("silent", "yielded None"),
    ],
)
def test_a_broken_text_sampler_is_named(janus: Janus, sampler: str, found: str) -> None:
    janus.runtime.text_sampler = sampler
    with pytest.raises(CheckError, match=f"the text sampler '{sampler}' {found}"):
        janus.chat_batch([("a", ()), ("b", ())])


@pytest.mark.parametrize(
    ("slot", "check", "sampler", "outcome"),
    [
        ("text_samplers", "yields_token_ids", "text", "passed"),
        ("text_samplers", "yields_token_ids", "ids", "passed"),
        ("text_samplers", "yields_token_ids", "columns", "failed"),
        ("image_samplers", "returns_images", "autoregressive", "passed"),
        ("image_samplers", "returns_images", "numbered", "passed"),
        ("image_samplers", "returns_images", "silent", "failed"),
        ("image_samplers", "returns_images", "unfinished", "failed"),
    ],
)
def test_checks_find_a_broken_protocol(
    third_party: Plugins, slot: str, check: str, sampler: str, outcome: str
) -> None:
    entry = third_party.entry(slot, sampler)
    settings = entry.config(max_tokens=3) if slot == "text_samplers" else entry.config()
    example = SamplingExample(settings, [prompt(1, 2), prompt(3)], NumpySession)
    [chosen] = [candidate for candidate in checks_of(slot) if candidate.name == check]
    assert run_check(chosen, lambda: (entry.factory, example), slot=slot).outcome == outcome


def test_a_plugin_of_the_former_slot_is_an_error_that_names_the_new_slots(tmp_path: Path) -> None:
    folder = tmp_path / "acme_loops-0.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-loops\nVersion: 0.2\n")
    group = "[janus_modular.v1.sampling_loops]\nbeam = acme_loops\n"
    (folder / "entry_points.txt").write_text(group)
    plugins = Plugins(installed([Distribution.at(folder)]))
    with pytest.raises(PluginError, match=r"acme-loops 0\.2.*'text_samplers' or 'image_samplers' now"):
        plugins.entry("text_samplers", "beam")
    (tmp_path / "former.py").write_text(
        "from janus_modular import hookimpl\n@hookimpl\ndef register_sampling_loops(registry): ...\n"
    )
    with pytest.raises(PluginError, match="'register_text_samplers' or 'register_image_samplers' now"):
        plugins.add_file(tmp_path / "former.py")

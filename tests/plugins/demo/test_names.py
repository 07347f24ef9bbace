"""A run on named images: its evaluation by hand, and the whole of it in a few steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from janus_modular import DataError
from janus_modular.config import load, resolve
from janus_modular.errors import ConfigError, TrainingError
from janus_plugins.demo import phases
from janus_plugins.demo.names import NamedResults, own_ranks, word_overlap
from janus_plugins.demo.run import run_demo
from janus_plugins.demo.schema import DemoConfig
from janus_plugins.sources.emoji import HELD_OUT, Emoji, EmojiConfig

CATEGORIES = ("Food & Drink", "Animals & Nature", "Smileys & Emotion")
COLOURS = ("red", "green", "blue", "black")


def plain(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), colour) for colour in colours]


def test_a_drawing_of_its_own_image_is_the_nearest_and_one_of_another_is_not() -> None:
    ranks = own_ranks(plain("darkred", "lime", "red", "black"), plain(*COLOURS))
    assert ranks.tolist() == [0, 0, 3, 0]  # red is at a distance to blue and green, which black is nearer to


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Red apple.", 1.0),
        ("apple red", 1.0),
        ("green apple", 0.5),
        ("apple", 2 / 3),
        ("", 0.0),
        ("pear", 0.0),
    ],
)
def test_the_overlap_of_words_is_their_f1(answer: str, score: float) -> None:
    assert word_overlap(answer, "red apple") == pytest.approx(score)


def test_metrics_of_a_perfect_model_and_of_chance() -> None:
    names = ["red square", "green disc", "blue star", "black moon"]
    perfect = NamedResults(names, plain(*COLOURS), [], [f"{n}." for n in names], [], plain(*COLOURS))
    metrics = perfect.metrics()
    assert metrics["read_exactly"] == metrics["words_read"] == metrics["drawn_nearest"] == 1
    assert metrics["drawn_closer"] == 1
    assert metrics["chance_words_read"] == 0  # no two names share a word
    assert metrics["chance_drawn_nearest"] == 0.25


@pytest.fixture
def emoji_folder(tmp_path: Path) -> Path:
    """Return a folder as the package emoji-datasource-twitter has it, of 30 images in two colours."""
    folder = tmp_path / "package"
    (folder / "img/twitter/64").mkdir(parents=True)
    records = []
    for i in range(30):
        colour, name = ("red", f"RED THING {i}") if i % 2 else ("blue", f"BLUE THING {i}")
        Image.new("RGBA", (64, 64), colour).save(folder / f"img/twitter/64/{i}.png")
        records.append({"name": name, "image": f"{i}.png", "category": CATEGORIES[i % 3]})
    (folder / "emoji.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def quick_names(emoji_folder: Path) -> dict[str, Any]:
    """Return the shipped run with four of its stages and few steps."""
    names = ("tokenizer", "encoder", "stage1", "stage2")
    stages = tuple(f"stages.{name}" for name in names)
    image = f"{emoji_folder}/img/twitter/64/1.png"
    overrides = [
        *(f"{name}.schedule.steps=2" for name in stages),
        *(f"{name}.schedule.warmup=0" for name in stages),
        *(f"{name}.batch=6" for name in stages[:3]),
        "stages.stage2.batch=20",
        "model.understanding.encoder.layers=1",
        "model.backbone.config.num_hidden_layers=1",
        "model.backbone.config.hidden_size=48",
        "model.generation.tokenizer.channels=[8, 8, 8, 8]",
        "model.generation.tokenizer.num_codes=8",
        "model.generation.tokenizer.continuous_steps=1",
        "common.validation.every=1",
        "common.validation.samples=2",
        "common.validation.prompts=['Draw: red thing.']",
        f"common.validation.questions=[{{text: What is this?, images: ['{image}']}}]",
        "common.validation.max_tokens=4",
        "processes=1",
        "count=3",
    ]
    raw = load("demo/emoji", overrides)
    raw["stages"] = {name: raw["stages"][name] for name in names}
    sources = [raw["images"], raw["held_out"], raw["trained"], *raw["sources"].values()]
    for source in [*sources, *raw["common"]["validation"]["sources"].values()]:
        source["path"] = str(emoji_folder)
    return raw


@pytest.mark.slow
def test_report(quick_names: dict[str, Any], tmp_path: Path) -> None:
    report = run_demo(resolve(quick_names, DemoConfig), tmp_path / "run", quiet=True)
    metrics = {name for name in report if not name.startswith("settings.")}
    assert {"trained_read_exactly", "held_out_drawn_nearest", "held_out_chance_drawn_nearest"} <= metrics
    assert report["trained_chance_drawn_nearest"] == pytest.approx(1 / 3, abs=1e-4)
    page = (tmp_path / "run/report.html").read_text("utf-8")
    links = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert links
    assert all(link.startswith("data:image/") for link in links)
    steps = [f"{stage}, step {step}" for stage in ("stage1", "stage2") for step in (1, 2)]
    assert list(dict.fromkeys(re.findall(r"stage\d, step \d", page))) == steps  # in the order of training
    assert "Held out names" in page
    with Image.open(tmp_path / "run/drawings.png") as drawn:
        assert drawn.width > 300


def test_an_error_of_a_process_ends_the_demo(
    quick_names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **options: bool) -> None:
            commands.append(command)
            assert "OMP_NUM_THREADS" in env

        def wait(self) -> int:
            return 1

    monkeypatch.setattr(phases.subprocess, "Popen", Process)
    with pytest.raises(TrainingError, match="tokenizer: a process of 2 has ended with an error"):
        run_demo(resolve(quick_names | {"processes": 2}, DemoConfig), tmp_path / "run", quiet=True)
    assert commands[0][1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.proof
def test_two_processes_train_the_stages(quick_names: dict[str, Any], tmp_path: Path) -> None:
    one = run_demo(resolve(quick_names, DemoConfig), tmp_path / "one", quiet=True)
    two = run_demo(resolve(quick_names | {"processes": 2}, DemoConfig), tmp_path / "two", quiet=True)
    assert two["psnr_db"] == pytest.approx(one["psnr_db"], abs=0.05)
    losses = []
    for run in ("one", "two"):
        lines = (tmp_path / run / "phases/stage2/metrics.jsonl").read_text("utf-8").splitlines()
        losses.append([line["loss/image"] for line in map(json.loads, lines) if "loss/image" in line])
    assert len(losses[0]) > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # sums in another order


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trained": None}, "expected one of the two"),
        ({"classifier": {"batch": 3}}, "expected one of the two"),
        ({"processes": 0}, "processes 0, 1 drawings: expected at least 1 of each"),
    ],
)
def test_settings_that_do_not_fit_are_an_error(
    change: dict[str, Any], message: str, quick_names: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(quick_names | change, DemoConfig)


def test_one_name_in_ten_is_held_out(emoji_folder: Path) -> None:
    train, test = (
        Emoji(EmojiConfig(path=str(emoji_folder), split=split, size=8)) for split in ("train", "test")
    )
    assert len(test) == 30 // HELD_OUT
    assert sorted([*train.names, *test.names]) == sorted(
        record["name"].lower() for record in json.loads((emoji_folder / "emoji.json").read_text())
    )
    assert all(image.getpixel((4, 4)) == ((255, 0, 0) if "red" in name else (0, 0, 255))
               for image, name in zip(test.images, test.names, strict=True))  # fmt: skip


def test_categories_select_names_and_an_unknown_category_is_an_error(emoji_folder: Path) -> None:
    def names(*categories: str) -> set[str]:
        splits = [
            Emoji(EmojiConfig(path=str(emoji_folder), split=split, size=8, categories=[*categories]))
            for split in ("train", "test")
        ]
        assert len(splits[1]) == len(names_of(splits)) // HELD_OUT
        return names_of(splits)

    def names_of(splits: list[Emoji]) -> set[str]:
        return {name for split in splits for name in split.names}

    assert names("Food & Drink") == {f"{'red' if i % 2 else 'blue'} thing {i}" for i in range(0, 30, 3)}
    assert names() == names(*CATEGORIES)
    with pytest.raises(
        DataError, match=r"found Drinks; expected some of Animals & Nature, Food & Drink, Smil"
    ):
        names("Food & Drink", "Drinks")


def test_a_sample_depends_on_its_index_and_its_chance_alone(emoji_folder: Path) -> None:
    source = Emoji(EmojiConfig(path=str(emoji_folder), task="read", shift=3))
    one, again, other = (source.sample(4, np.random.default_rng(seed)) for seed in (1, 1, 5))
    pictures = [sample.messages[0].content[0].image.tobytes() for sample in (one, again, other)]  # type: ignore[union-attr]
    assert pictures[0] == pictures[1] != pictures[2]
    assert one.messages[1].content[0].text == f"{source.names[4]}."  # type: ignore[union-attr]


def test_a_folder_without_the_package_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected the npm package emoji-datasource-twitter.*make emoji"):
        Emoji(EmojiConfig(path=str(tmp_path)))

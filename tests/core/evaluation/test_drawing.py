"""Drawings of benchmarks: the names of their files, continuing, and drawing again to compare codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from janus_modular import Janus
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import EvaluationError
from janus_modular.evaluation.benchmarks import read_prompts
from janus_modular.evaluation.drawing import check_ledger, hash_of
from janus_modular.evaluation.run import read_data, run_evaluation
from janus_modular.evaluation.schema import EvalConfig


@pytest.fixture
def janus() -> Janus:
    torch.manual_seed(0)
    return Janus.of(ModelAssembly.from_config(resolve(load("tiny"), ModelConfig)))


@pytest.fixture
def lists(tmp_path: Path) -> dict[str, Path]:
    """Return the prompt list of each benchmark."""
    metadata = [{"tag": "single_object", "include": [], "prompt": text} for text in ("a cat", "a dog")]
    (tmp_path / "geneval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metadata))
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg/COCOval2014_1.txt").write_text("a cat\n")
    (tmp_path / "dpg/partiprompts7.txt").write_text("a dog")
    (tmp_path / "color_val.txt").write_text("a red cat\n\na dog\ttest\n")
    (tmp_path / "wise.json").write_text('[{"prompt_id": 7, "Prompt": "a cat", "Category": "x"}]')
    names = {
        "geneval": "geneval.jsonl",
        "dpg-bench": "dpg",
        "t2i-compbench": "color_val.txt",
        "wise": "wise.json",
    }
    return {name: tmp_path / file for name, file in names.items()}


def files_in(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


FILES = {
    "geneval": [
        "images/00000/metadata.jsonl",
        "images/00000/samples/0000.png",
        "images/00000/samples/0001.png",
        "images/00001/metadata.jsonl",
        "images/00001/samples/0000.png",
        "images/00001/samples/0001.png",
        "ledger.jsonl",
    ],
    "dpg-bench": ["images/COCOval2014_1.png", "images/partiprompts7.png", "ledger.jsonl"],
    "t2i-compbench": [
        "ledger.jsonl",
        "samples/a dog_000002.png",
        "samples/a dog_000003.png",
        "samples/a red cat_000000.png",
        "samples/a red cat_000001.png",
    ],
    "wise": ["images/7.png", "ledger.jsonl"],
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_each_benchmark(
    name: Any, janus: Janus, lists: dict[str, Path], tmp_path: Path, identity: dict[str, Any]
):
    config = EvalConfig(name, str(lists[name]), n=2 if name in ("geneval", "t2i-compbench") else None)
    out = tmp_path / "out"
    run_evaluation(janus, read_data(config), config, out, identity)
    assert files_in(out) == FILES[name]
    if name == "geneval":
        written = (out / "images/00001/metadata.jsonl").read_text()
        assert json.loads(written) == {"tag": "single_object", "include": [], "prompt": "a dog"}


def test_images_are_those_of_draw(
    janus: Janus, lists: dict[str, Path], tmp_path: Path, identity: dict[str, Any]
):
    settings = {"guidance": 2.0, "seed": 3}
    config = EvalConfig("geneval", str(lists["geneval"]), n=3, settings=settings, batch_size=2)
    out = tmp_path / "out"
    run_evaluation(janus, read_data(config), config, out, identity)
    expected = janus.draw("a dog", 3, batch_size=2, **settings)
    assert expected.encoded is not None
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()][4:]
    for number, (image, codes, line) in enumerate(zip(expected, expected.encoded, lines, strict=True)):
        assert line["key"] == f"images/00001/samples/{number:04d}.png"
        assert Image.open(out / line["key"]).tobytes() == image.tobytes()
        assert line["codes_sha256"] == hash_of(codes)
        assert (line["prompt"], line["number"], line["seed"], line["guidance"]) == ("a dog", number, 3, 2.0)
        assert (line["dtype"], line["runtime"], line["variant"]) == ("float32", "torch", None)
    assert len({line["codes_sha256"] for line in lines}) == 3


def test_the_grid_of_dpg_bench_has_no_gaps(
    janus: Janus, lists: dict[str, Path], tmp_path: Path, identity: dict[str, Any]
):
    config = EvalConfig("dpg-bench", str(lists["dpg-bench"]))
    run_evaluation(janus, read_data(config), config, tmp_path / "out", identity)
    grid = Image.open(tmp_path / "out/images/COCOval2014_1.png")
    assert grid.size == (64, 64)
    for index, image in enumerate(janus.draw("a cat", 4)):
        x, y = index % 2 * 32, index // 2 * 32
        assert grid.crop((x, y, x + 32, y + 32)).tobytes() == image.tobytes()


def test_drawing_continues_after_an_interruption(
    janus: Janus,
    lists: dict[str, Path],
    tmp_path: Path,
    identity: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
):
    config = EvalConfig("geneval", str(lists["geneval"]), n=2, batch_size=2)
    data = read_data(config)
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_evaluation(janus, data, config, whole, identity)
    draw, drawn = janus.draw, list[Any]()

    def interrupted(prompts: Any, *args: Any, **settings: Any) -> Any:
        if drawn == [["a cat"]]:
            raise KeyboardInterrupt
        drawn.append(prompts)
        return draw(prompts, *args, **settings)

    monkeypatch.setattr(janus, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(janus, data, config, out, identity)
    drawn[:] = []
    run_evaluation(janus, data, config, out, identity)
    assert drawn == [["a dog"]]
    assert files_in(out) == files_in(whole)
    assert all((out / file).read_bytes() == (whole / file).read_bytes() for file in files_in(whole))
    (out / "images/00001/samples/0001.png").unlink()
    run_evaluation(janus, data, config, out, identity)
    assert drawn == [["a dog"], ["a dog"]]
    (out / "images/00000/samples/0001.png").write_bytes(b"edited")
    with pytest.raises(EvaluationError, match=r"0001\.png has changed since it was drawn"):
        run_evaluation(janus, data, config, out, identity)


def test_a_ledger_is_checked_by_drawing_again(
    janus: Janus, lists: dict[str, Path], tmp_path: Path, identity: dict[str, Any]
):
    config = EvalConfig("t2i-compbench", str(lists["t2i-compbench"]), n=3, batch_size=2)
    out = tmp_path / "out"
    with pytest.raises(EvaluationError, match=r"has no ledger\.jsonl"):
        check_ledger(janus, config, out, identity, 1.0)
    run_evaluation(janus, read_data(config), config, out, identity)
    assert check_ledger(janus, config, out, identity, 1.0) == (6, [])
    assert check_ledger(janus, config, out, identity, 0.4)[0] == 3
    ledger = out / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    lines[2]["codes_sha256"] = lines[1]["codes_sha256"]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert check_ledger(janus, config, out, identity, 1.0) == (6, ["samples/a red cat_000001.png"])
    config.settings["seed"] = 1
    with pytest.raises(EvaluationError, match="ledger of another evaluation"):
        check_ledger(janus, config, out, identity, 1.0)


def test_a_repeated_prompt_gets_other_images(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cat\n")
    prompts = read_prompts("t2i-compbench", tmp_path / "prompts.txt", 2)
    assert [(prompt.text, prompt.first) for prompt in prompts] == [("a cat", 0), ("a dog", 0), ("a cat", 2)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("geneval", "", "has no prompts"),
        ("geneval", '{"prompt": "x"}\n{"tag": "y"}\n', "line 2: prompt: found None"),
        ("geneval", '{"prompt": "x"}\n{\n', "line 2: .* expected a JSON object"),
        ("t2i-compbench", "\n", "has no prompts"),
        ("t2i-compbench", "a cat\na cat/dog\n", "line 2: the prompt 'a cat/dog_.*expected no /"),
        ("t2i-compbench", "a" * 250, "line 1: .* 255 bytes"),
        ("wise", "{}", "found a dict; expected a JSON array"),
        ("wise", '[{"prompt_id": 1, "Prompt": "x"}, {"Prompt": "y"}]', "object 1: prompt_id"),
        ("wise", '[{"prompt_id": 1, "Prompt": ""}]', "object 0: Prompt: found ''"),
        ("wise", '[{"prompt_id": 1, "Prompt": "x"}, {"prompt_id": 1, "Prompt": "y"}]', "written twice"),
        ("dpg-bench", "x", "is no folder"),
    ],
)
def test_bad_prompt_lists(name: str, content: str, message: str, tmp_path: Path):
    (tmp_path / "list").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        read_prompts(name, tmp_path / "list", 1)

"""The output of the dry run, and the preview of samples."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from janus_modular.cli.app import app
from janus_modular.errors import ConfigError
from janus_modular.model.batch import collate
from janus_modular.model.model import JanusModel
from janus_modular.plugins import default_plugins
from janus_modular.processing.processor import Processor
from janus_modular.training.run_setup import batch_builder, open_sources
from janus_modular.training.sample_preview import as_html, as_text, preview_step, spans


def test_previews_show_what_is_supervised(make, built: tuple[JanusModel, Processor]) -> None:
    samples = preview_step(make(), default_plugins(), n=3).samples
    assert [sample.source for sample in samples] == ["read", "draw", "text"]
    read, draw, text = ([(span.modality, span.supervised) for span in sample.spans] for sample in samples)
    assert read == [("text", False), ("image_input", False), ("text", False), ("text", True)]
    assert draw == [("text", False), ("image_target", True), ("text", False)]
    assert text == [("text", False), ("text", True)]
    assert re.fullmatch(r"\s?(red|green|blue|white)<｜end▁of▁sentence｜>", samples[0].spans[-1].text)
    assert re.fullmatch(r"draw, sample \d: \d+ positions, 16 supervised", samples[1].heading)


def test_spans_cover_every_position(make, built: tuple[JanusModel, Processor]) -> None:
    config, (model, processor) = make(), built
    builder = batch_builder(config, open_sources(config, default_plugins()), model, processor)
    for ref in builder.mixture.sample_refs(0):
        prepared = builder.prepare(ref)
        [sequence] = prepared.sequences
        divided = list(spans(sequence, processor))
        assert sum(span.positions for span in divided) == len(sequence)
        supervised = sum(span.positions for span in divided if span.supervised)
        assert supervised == builder.collate([prepared]).supervised
        collate([sequence])


def test_the_page_needs_no_other_file_and_escapes_text(make, data: Path) -> None:
    (data / "text.jsonl").write_text(json.dumps({"text": "<script>alert([red]);[/]\\</script>"}))
    preview = preview_step(make(), default_plugins(), n=5)
    page = as_html(preview, title="a & b")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<h1>a &amp; b</h1>" in page
    images = re.findall(r"src='data:image/png;base64,([^']+)'", page)
    assert len(images) == 4
    assert all(Image.open(io.BytesIO(base64.b64decode(one))).size == (32, 32) for one in images)
    assert not re.findall(r"src='(?!data:)|href=", page)
    words = as_text(next(one for one in preview.samples if one.source == "text"))
    assert "<script>alert([red]);[/]\\</script>" in words.plain  # the terminal's markup is escaped too


@pytest.fixture
def file(make, data: Path, tmp_path: Path) -> Path:
    """The config as a file, as people have it."""
    import yaml

    sources = {name: {"name": "jsonl", "path": str(data / f"{name}.jsonl")} for name in ("read", "draw")}
    sources["draw"]["task"] = "draw"
    raw = {
        "model": "tiny",
        "learn": ["generation", "backbone"],
        "sources": sources,
        "mixture": {"read": 1, "draw": 3},
        "batch": 4,
        "length": 512,
        "schedule": {"steps": 2},
        "device": "cpu",
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_dry_run_prints_everything_and_trains_nothing(file: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(file), "--dry-run"])
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    for part in ("understanding.encoder", "optimizer", "activations", "2 steps"):
        assert part in output
    assert "1 micro-batches" not in output
    assert re.search(r"draw │\s+3 │", output)
    assert re.search(r"read │\s+1 │", output)
    assert not (file.parent / "out").exists()


def test_train_and_inspect_from_the_command_line(file: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(file), "schedule.steps=1", "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(file.parent / "out" / "model")
    page = file.parent / "preview.html"
    result = CliRunner().invoke(app, ["data", "inspect", str(file), "-n", "2", "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert page.read_text("utf-8").count("<section>") == 2
    result = CliRunner().invoke(app, ["data", "inspect", str(file), "-n", "2"])
    assert "[image to draw, 16 positions]" in " ".join(result.output.split())


def test_without_a_terminal_each_log_entry_is_a_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI sets it, whose logs are no terminal
    words = ["schedule.steps=5", "log_every=2", "trackers=[jsonl]"]
    result = CliRunner().invoke(app, ["train", str(file), *words])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if ": step " in line]
    logged = list(map(json.loads, (file.parent / "out" / "metrics.jsonl").read_text().splitlines()))
    assert [entry["step"] for entry in logged] == [2, 4, 5]
    assert lines == [
        f"{file}: step {entry['step']} of 5: loss {entry['loss']:.4f}, loss/image {entry['loss/image']:.4f},"
        f" loss/text {entry['loss/text']:.4f}, source/draw {entry['source/draw']:.4f},"
        f" source/read {entry['source/read']:.4f}, lr {entry['lr']:.3g},"
        f" {entry['samples_per_second']:.3g} samples/s"
        for entry in logged
    ]
    assert "\r" not in result.stderr
    resumed = CliRunner().invoke(app, ["train", str(file), *words, "--resume"])
    assert "nothing is left to train: all 5 steps of the schedule are done. A larger " in resumed.stderr
    assert all(entry["samples"] == 4 for entry in logged)


def test_samples_and_epochs_of_each_source_are_shown(file: Path, data: Path) -> None:
    (data / "draw.jsonl").write_text(
        (data / "draw.jsonl").read_text() + '\n{"image": "none.png", "class": "x"}\n'
    )
    words = ["mixture.read=1", "mixture.draw=19", "schedule.steps=10", "bad_samples.unreadable=skip"]
    dry = CliRunner().invoke(app, ["train", str(file), *words, "--dry-run"])
    page = file.parent / "preview.html"
    preview = CliRunner().invoke(app, ["data", "inspect", str(file), *words, "-n", "9", "--out", str(page)])
    terminal = CliRunner().invoke(app, ["data", "inspect", str(file), *words, "-n", "9"])
    assert [result.exit_code for result in (dry, preview, terminal)] == [0, 0, 0], dry.output + preview.output
    for output in (dry.output, terminal.output):
        assert re.search(r"read +│ +4 │ +2 │ +0.5 │", output)
        assert re.search(r"draw +│ +5 │ +38 │ +7.6 │", output)
    html = page.read_text("utf-8")
    assert "<tr><td>draw</td><td>5</td><td>38</td><td>7.6</td></tr>" in html
    assert "<h2>read, sample" in html  # which step 0 leaves out
    assert "in place of sample 4, skipped: " in html


@pytest.mark.parametrize(
    ("words", "bad_sample"),
    [
        (["data", "inspect", "FILE", "--out", "/dev/null/preview.html"], "cannot be written: "),
        (["data", "inspect", "FILE", "--out", "nowhere/preview.html"], "there is no folder 'nowhere'"),
        (["data", "inspect", "FILE", "sources.read.on_bad=skip"], "sources.read.on_bad: unknown key"),
        (["train", "FILE", "learn=[generation.haed]"], "'generation.haed' matches nothing"),
        (["config", "validate", "FILE", "learn=[backbon]"], "Did you mean 'backbone'?"),
        (["train", "FILE", "--resume"], "nothing to resume"),
        (
            ["train", "FILE", "model.text_sampler=nope"],
            "model.text_sampler: no text sampler is called 'nope'",
        ),
        (["train", "FILE", "model.text_sampler=nope", "--dry-run"], "no text sampler is called 'nope'"),
        (["train", "FILE", "model.image_sampler=text", "--dry-run"], "model.image_sampler: no image sampler"),
        (["train", "FILE", "model=null", f"init={'x' * 5000}"], "init: there is no checkpoint 'xxx"),
        (
            ["train", "train/janus_pro/stage1", "--dry-run", "model.processor.tokenizer=bytes"],
            "YOUR/understanding.jsonl",
        ),
        (["train", "train/janus_pro/stage2", "--dry-run"], "Train the previous stage first"),
        (["data", "inspect", "FILE", "--out", "preview.pdf"], "name of an .html file"),
    ],
)
def test_user_errors_are_printed_without_a_traceback(file: Path, words: list[str], bad_sample: str) -> None:
    result = CliRunner().invoke(app, [str(file) if word == "FILE" else word for word in words])
    assert result.exit_code == 2
    assert bad_sample in " ".join(result.output.split())
    assert not (file.parent / "out" / "checkpoints").exists()


@pytest.mark.parametrize("output", ["{file}", "{file}/run", "{folder}/" + "a" * 300])
@pytest.mark.parametrize("command", [["config", "validate"], ["train", "--dry-run"], ["train", "--quiet"]])
def test_an_invalid_folder_is_an_error_before_the_run(file: Path, command: list[str], output: str) -> None:
    override = f"output={output.format(file=file, folder=file.parent)}"
    result = CliRunner().invoke(app, [*command, str(file), override])
    assert result.exit_code == 2, result.output
    assert "cannot be written: " in result.stderr
    assert "Choose another output=FOLDER" in result.stderr
    assert len(result.stderr) < 1000


@pytest.mark.skipif(
    sys.platform != "linux", reason="/proc is a folder of Linux, where root may write nothing either"
)
@pytest.mark.parametrize("command", [["config", "validate"], ["train", "--dry-run"], ["train", "--quiet"]])
def test_a_folder_where_nothing_can_be_made_is_an_error(file: Path, command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, str(file), "output=/proc/none"])
    assert result.exit_code == 2, result.output
    assert "/proc/none cannot be written: " in result.stderr
    assert "Choose another output=FOLDER" in result.stderr


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("optimizer.groups={backbon: {lr: 0.1}}", "optimizer.groups: 'backbon' fits no trained parameter"),
        ("parallel={backbon: fsdp}", "parallel: found 'backbon', which is no component"),
        ("activation_checkpointing=[backbon]", "activation_checkpointing: found 'backbon'"),
        ("compile=[backbon]", "compile: found 'backbon', which is no component"),
    ],
)
def test_validation_and_a_dry_run_refuse_what_a_run_refuses(file: Path, setting: str, problem: str) -> None:
    trained = file.parent / "trained"
    if setting.startswith("optimizer"):  # the checkpoint that a run starts from is checked too
        done = CliRunner().invoke(
            app, ["train", str(file), "schedule.steps=1", f"output={trained}", "--quiet"]
        )
        assert done.exit_code == 0, done.output
    starts = [[], ["model=null", f"init={trained / 'checkpoints/latest'}"]][: 1 + trained.exists()]
    for start in starts:
        for command in (["config", "validate"], ["train", "--dry-run"], ["train", "--quiet"]):
            result = CliRunner().invoke(app, [*command, str(file), setting, *start])
            assert result.exit_code == 2, (command, result.output)
            assert problem in " ".join(result.stderr.split())


def test_a_dry_run_refuses_the_folders_that_a_run_refuses(file: Path, data: Path) -> None:
    def refused(*words: str) -> str:
        outputs = [
            CliRunner().invoke(app, ["train", str(file), *words, *dry])
            for dry in (["--dry-run"], ["--quiet"])
        ]
        assert [result.exit_code for result in outputs] == [2, 2]
        assert len({result.stderr for result in outputs}) == 1
        return outputs[0].stderr

    assert "nothing to resume" in refused("--resume")
    assert CliRunner().invoke(app, ["train", str(file), "schedule.stop=1", "--quiet"]).exit_code == 0
    assert "holds a run already" in refused()
    assert "batch: 4 then, 5 now" in refused("--resume", "batch=5")
    result = CliRunner().invoke(app, ["train", str(file), "--resume", "--dry-run"])
    assert result.exit_code == 0, result.output
    (data / "draw.jsonl").write_text((data / "read.jsonl").read_text().replace("red", "crimson", 1))
    assert (
        "changed_data=accept" in CliRunner().invoke(app, ["train", str(file), "--resume", "--dry-run"]).stderr
    )


@pytest.mark.parametrize("words", [["train", "FILE", "--dry-run"], ["train", "FILE", "--quiet"]])
def test_sources_that_the_run_stops_before_are_named(
    file: Path, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    changes = ["schedule.steps=100", "schedule.stop=1", "mixture={read: 1, draw: 99}"]
    result = CliRunner().invoke(app, [str(file) if word == "FILE" else word for word in words] + changes)
    assert result.exit_code == 0, result.output
    assert "no sample of source 'read' is taken before schedule.stop, step 1." in caplog.text


def test_a_dry_run_is_of_the_share_of_a_process(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it accepts, training in as many processes takes; the first process prints for all."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    outputs = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        result = CliRunner().invoke(app, ["train", str(file), "--dry-run", "batch=6"])
        assert result.exit_code == 0, result.output
        outputs.append(result.stdout)
    assert re.search(r"all +│ +3 │", outputs[0])  # samples of a step
    assert outputs[1] == ""
    result = CliRunner().invoke(app, ["train", str(file), "--dry-run", "batch=5"])
    assert (result.exit_code, "cannot be divided among 2 processes" in result.stderr) == (2, True)


@pytest.mark.parametrize(("schedule", "last"), [({"steps": 4}, 3), ({"steps": 9, "stop": 2}, 1)])
def test_a_step_beyond_the_run_is_an_error(make, schedule: dict[str, int], last: int) -> None:
    config = make(schedule=schedule)
    assert preview_step(config, default_plugins(), n=1, step=last).samples
    for step in (last + 1, 10**6):
        with pytest.raises(
            ConfigError, match=f"step {step:,}: the run's last step is {last}, counted from 0"
        ):
            preview_step(config, default_plugins(), n=1, step=step)

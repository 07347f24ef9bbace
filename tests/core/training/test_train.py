from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from janus_modular import CheckpointError, ConfigError, DataError, TrainingError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.janus import Janus
from janus_modular.model.model import JanusModel
from janus_modular.plugins import default_plugins
from janus_modular.training import checkpoint_writer
from janus_modular.training.initial_model import initial_model
from janus_modular.training.objective import step_losses
from janus_modular.training.run_setup import batch_builder, open_sources
from janus_modular.training.train import train

BITWISE = {"rtol": 0, "atol": 0}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(ModelAssembly.from_checkpoint(folder).model.state_dict())


def test_training_teaches_both_tasks(make, metrics) -> None:
    """Four colours, learned by heart, and used through the public door.

    A reader who ignores the image cannot beat the ln 4 of which name it is, spread over at most 6 positions
    (five letters and the end), nor a drawer who ignores the prompt ln 4 over 16 codes: 0.23 and 0.087.
    """
    config = make(
        mixture={"read": 4, "draw": 4, "text": 0},
        batch=8,
        condition_dropout=0,
        schedule={"steps": 100, "warmup": 5},
        log_every=20,
        length="null",
    )
    folder = train(config, quiet=True)
    last = metrics(config)[-1]
    assert last["loss/text"] < math.log(4) / 6 / 2
    assert last["loss/image"] < math.log(4) / 16 / 2
    janus = Janus.from_pretrained(folder, device="cpu")
    data = Path(config.sources["read"].config.path).parent
    assert [janus.chat("Colour?", [data / f"{name}.png"]) for name in ("red", "blue")] == ["red", "blue"]
    red, blue = (np.asarray(janus.draw(name, guidance=1.0, temperature=0.01)[0]) for name in ("red", "blue"))
    assert red.shape == (32, 32, 3)
    assert not np.array_equal(red, blue)


def test_resuming_is_exact(make, metrics, tmp_path: Path) -> None:
    """Six steps at once equal three, and three more: losses and weights, to the bit."""
    whole = make(checkpoint_every=3)
    train(whole, quiet=True)
    halves = make(output=str(tmp_path / "halves"), schedule__stop=3)
    train(halves, quiet=True)
    halves = make(output=str(tmp_path / "halves"), workers=2)
    train(halves, quiet=True, resume=True)
    timings = {"steps_per_second", "samples_per_second", "tokens_per_second"}
    one, two = (
        [{k: v for k, v in line.items() if k not in timings} for line in metrics(config)]
        for config in (whole, halves)
    )
    assert one == two
    assert [line["step"] for line in one] == [1, 2, 3, 4, 5, 6]
    a, b = (weights(Path(config.output) / "model") for config in (whole, halves))
    torch.testing.assert_close(a, b, **BITWISE)


def test_packing_is_the_share_of_positions_in_use(make, metrics) -> None:
    """Recomputed from the batches of a run."""
    config = make(length="null", accumulate=2, schedule__steps=3, log_every=3)
    train(config, quiet=True)
    [line] = metrics(config)
    plugins = default_plugins()
    assembly = initial_model(config, plugins, "meta")
    builder = batch_builder(config, open_sources(config, plugins), assembly.model, assembly.processor)
    steps = [builder.build(step) for step in range(3)]
    used = sum(sum(step.tokens.values()) for step in steps)
    positions = sum(batch.tokens.numel() for step in steps for batch in step.batches)
    assert line["packing"] == pytest.approx(used / positions, rel=1e-6)
    assert line["packing"] < 1


def test_the_same_seed_gives_the_same_losses(make, metrics, tmp_path: Path) -> None:
    runs = [make(seed=seed, output=str(tmp_path / f"run{i}")) for i, seed in enumerate((1, 1, 2))]
    for config in runs:
        train(config, quiet=True)
    one, same, other = ([line["loss"] for line in metrics(config)] for config in runs)
    assert one == same
    assert one != other


def test_frozen_parameters_stay_and_trainable_ones_change(make) -> None:
    """Bit for bit, buffers and all, after steps that would move a codebook in train mode."""
    learn = ["understanding.adaptor", "generation.embedding", "generation.adaptor", "generation.head"]
    config = make(learn=learn)
    torch.manual_seed(config.seed)
    before = {
        name: tensor.clone()
        for name, tensor in ModelAssembly.from_config(config.model).model.state_dict().items()
    }
    after = weights(train(config, quiet=True))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        learns = any(name.startswith(one) for one in learn)
        assert torch.equal(tensor, after[name]) is not learns, name


def test_loaded_weights_are_reported(make, capsys, tmp_path: Path) -> None:
    config = make(schedule__stop=1)
    adaptor = ModelAssembly.from_config(config.model).model.understanding.adaptor
    file = tmp_path / "[bold]adaptor.safetensors"  # a name that is printed as it is
    save_file(adaptor.state_dict(), file)
    train(make(schedule__stop=1, model__understanding__adaptor__pretrained=json.dumps(str(file))))
    output = capsys.readouterr().err
    assert f"adaptor 'mlp': {len(adaptor.state_dict())} tensors from {file}\n" in output
    assert "PretrainedReport" not in output


def test_source_objects_replace_those_of_the_config_by_name(make, metrics) -> None:
    read = open_sources(make(), default_plugins())["read"]
    config = make(sources__read__path="nowhere.jsonl", schedule__steps=1, schedule__warmup=0)
    train(config, quiet=True, sources={"read": read})
    [logged] = metrics(config)
    assert {"source/read", "source/draw", "source/text"} <= logged.keys()
    with pytest.raises(
        ConfigError, match=r"sources\.reads: .* expected one of read, draw, text\. Did you mean"
    ):
        open_sources(config, default_plugins(), {"reads": read})


def test_losses_by_source_add_up(make, metrics) -> None:
    config = make(accumulate=2)
    train(config, quiet=True)
    plugins = default_plugins()
    assembly = ModelAssembly.from_checkpoint(Path(config.output) / "model")
    model, processor = assembly.model, assembly.processor
    builder = batch_builder(config, open_sources(config, plugins), model, processor)
    work = builder.build(3)
    losses = list(step_losses(model, work, "cpu"))
    sums: dict[str, float] = {}
    over: dict[str, float] = {}
    for loss in losses:
        for name, (total, weight) in loss.means.items():
            sums[name] = sums.get(name, 0) + float(total)
            over[name] = over.get(name, 0) + float(weight)
    whole = sum(float(loss.value.detach()) for loss in losses) * work.supervised
    for group in ("source/", "loss/"):
        names = [name for name in sums if name.startswith(group)]
        assert len(names) == {"source/": 3, "loss/": 2}[group]
        # float32 sums of a few hundred numbers
        assert sum(sums[name] for name in names) == pytest.approx(whole, rel=1e-5)
        assert sum(over[name] for name in names) == work.supervised
    line = metrics(config)[-1]
    assert line["tokens"] == line["tokens/read"] + line["tokens/draw"] + line["tokens/text"]


@pytest.mark.parametrize("change", [{"length": "null"}, {"accumulate": 3}, {"length": 128}])
def test_layout_does_not_change_the_loss(make, metrics, tmp_path: Path, change: dict[str, object]) -> None:
    """Packed, padded or in pieces: the same step. 1e-5: float32 sums in another order, over three updates."""
    one = make(schedule={"steps": 3})
    two = make(schedule={"steps": 3}, output=str(tmp_path / "two"), **change)
    train(one, quiet=True)
    train(two, quiet=True)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["supervised"] == b["supervised"]


def test_an_interrupt_leaves_a_checkpoint_to_resume_from(make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    forward = JanusModel.forward
    seen = []

    def interrupt(self, batch):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    monkeypatch.setattr(JanusModel, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config, quiet=True)
    monkeypatch.undo()
    assert [one.name for one in (Path(config.output) / "checkpoints").glob("step-*")] == ["step-0000002"]
    with pytest.raises(TrainingError, match=r"holds a run already.*--resume"):
        train(config, quiet=True)
    train(config, quiet=True, resume=True)


def test_only_the_newest_checkpoints_are_kept(make) -> None:
    config = make(checkpoint_every=1, keep=2)
    train(config, quiet=True)
    kept = sorted(one.name for one in (Path(config.output) / "checkpoints").glob("step-*"))
    assert kept == ["step-0000005", "step-0000006"]


def test_a_full_disk_leaves_the_last_checkpoint(make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(checkpoint_every=2)

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        if "step-0000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    write = checkpoint_writer.write_shard
    monkeypatch.setattr(checkpoint_writer, "write_shard", full)
    with pytest.raises(CheckpointError, match="No space left") as error:
        train(config, quiet=True)
    (note,) = error.value.__notes__
    assert "4 steps before it could not be saved" in note
    assert "resume from" in note
    assert "step-0000002" in note
    assert [one.name for one in (Path(config.output) / "checkpoints").glob("step-*")] == ["step-0000002"]
    assert not (Path(config.output) / "model").exists()


@pytest.mark.parametrize("name", ["training.json", "training.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:1000]),
        lambda file: torch.save({"step": 3}, file),
        lambda file: file.write_bytes(b""),
    ],
)
def test_a_damaged_state_is_an_error_and_the_earlier_checkpoint_works(make, name, damage, capsys) -> None:
    config = make(checkpoint_every=2, schedule={"steps": 4})
    train(config, quiet=True)
    last = Path(config.output) / "checkpoints/step-0000004"
    damage(last / name)
    config = make(schedule={"steps": 5})
    with pytest.raises(TrainingError, match=rf"step-0000004/{name} was changed or damaged.*\nRemove"):
        train(config, quiet=True, resume=True)
    (last / "training.json").unlink()
    train(config, resume=True)
    assert "step-0000002; step-0000004 cannot be resumed from: no training.json" in capsys.readouterr().err


def test_metrics_that_cannot_be_written_are_an_error(
    make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied", "metrics")

        patch.setattr("janus_plugins.trackers.jsonl.JsonlTracker.__init__", refuse)
        with pytest.raises(TrainingError, match=r"a tracker cannot start: .*metrics.*Is .* can be written"):
            train(make(), quiet=True)
    with pytest.raises(TrainingError, match=r"file cannot be written: .*Choose another output="):
        train(make(output=str(tmp_path / "file")), quiet=True)

    def full(self: object, step: int, values: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("janus_plugins.trackers.jsonl.JsonlTracker.log", full)
    with pytest.raises(TrainingError, match=r"metrics of step 1 cannot be written: .*No space left"):
        train(make(), quiet=True)


def test_resuming_with_other_settings_is_an_error(make) -> None:
    train(make(schedule__stop=2), quiet=True)
    with pytest.raises(TrainingError, match=r"batch: 5 then, 6 now .*\n.*seed: 0 then, 1 now") as error:
        train(make(batch=6, seed=1), quiet=True, resume=True)
    assert "init=" in str(error.value)


def test_a_stage_starts_from_the_previous_stage(make, tmp_path: Path) -> None:
    first = train(make(), quiet=True)
    config = make(
        model="null", init=str(first), learn=["backbone"], output=str(tmp_path / "two"), schedule={"steps": 1}
    )
    with pytest.raises(TrainingError, match="nothing to resume"):
        train(config, quiet=True, resume=True)
    second = weights(train(config, quiet=True))
    before = weights(first)
    assert torch.equal(
        second["generation.head.vision_head.weight"], before["generation.head.vision_head.weight"]
    )


def test_all_missing_data_files_are_named(make) -> None:
    config = make(sources__read__path="YOUR/read.jsonl", sources__draw__path="YOUR/draw.jsonl")
    with pytest.raises(ConfigError, match=r"sources.read: 'YOUR/read.jsonl' is no file.*\n.*sources.draw"):
        train(config, quiet=True)


def test_an_unsupervised_sample_is_named(make, data: Path) -> None:
    (data / "text.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello?"}]}\n')
    with pytest.raises(DataError, match=r"source 'text', sample 0: .*nothing"):
        train(make(), quiet=True)


def test_a_sample_that_fits_no_row_is_named(make) -> None:
    with pytest.raises(DataError, match=r"source '\w+', sample \d: .*rows of 16: raise length"):
        train(make(length=16), quiet=True)


def test_rows_longer_than_the_context_are_an_error(make) -> None:
    with pytest.raises(ConfigError, match="rows of 4096 positions; the backbone's context is 512"):
        train(make(length=4096), quiet=True)


def test_a_loss_that_is_not_finite_names_its_source(make, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = JanusModel.forward

    def poisoned(self, batch):
        output = forward(self, batch)
        of_draw = output.sources["image"] == batch.sources.index("draw")
        output.losses["image"] = output.losses["image"].masked_fill(of_draw, float("nan"))
        return output

    monkeypatch.setattr(JanusModel, "forward", poisoned)
    with pytest.raises(TrainingError, match=r"step 0: not finite: loss, loss image, source draw\."):
        train(make(), quiet=True)


def test_half_precision_keeps_float32_weights(make, metrics, tmp_path: Path) -> None:
    """2 %: bfloat16 keeps 8 bits, 0.4 %, of each number, and errors add up over the layers."""
    full = make(schedule={"steps": 2})
    half = make(schedule={"steps": 2}, output=str(tmp_path / "half"), dtype="bfloat16")
    folder = train(full, quiet=True), train(half, quiet=True)
    for a, b in zip(metrics(full), metrics(half), strict=True):
        assert a["loss"] != b["loss"]
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    assert {t.dtype for t in weights(folder[1]).values() if t.is_floating_point()} == {torch.float32}


def test_patterns_are_checked_before_weights_are_read(make, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_meta_only(config: Any, plugins: Any, device: Any, **options: Any) -> Any:
        return initial_model(config, plugins, device) if device == "meta" else pytest.fail("too late")

    monkeypatch.setattr("janus_modular.training.train.initial_model", on_meta_only)
    with pytest.raises(ConfigError, match=r"'generation\.haed' matches nothing"):
        train(make(learn=["generation.haed"]), quiet=True)

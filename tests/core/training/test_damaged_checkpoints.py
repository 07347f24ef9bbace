"""Resuming from a changed checkpoint: an error, or a bit-identical result."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from janus_modular import CheckpointError, TrainingError
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.cli.app import app
from janus_modular.training.resume import check_checkpoint
from janus_modular.training.run_folder import STATE, resumable_checkpoints
from janus_modular.training.train import train
from janus_modular.weights.checksums import FILE, verify_checksums, write_checksums
from janus_modular.weights.writing import is_checkpoint_file

from .conftest import Make

TENSORS = "training.safetensors"
MOMENT = "training/optimizer/exp_avg/"


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a copy of a run with the checkpoints of two steps, and its config."""
    kept = tmp_path_factory.mktemp("kept") / "run"

    def copied(make: Make) -> tuple[Path, Any]:
        if not kept.exists():
            train(make(output=str(kept), checkpoint_every=1, schedule__stop=2), quiet=True)
        config = make(schedule__stop=3)
        shutil.copytree(kept, config.output)
        return Path(config.output) / "checkpoints/step-0000002", config

    return copied


def flipped(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("count", [60, pytest.param(20_000, marks=pytest.mark.proof)])
def test_a_flipped_bit_is_detected_or_harmless(make: Make, run_of_two: Any, count: int) -> None:
    """What passes the check that a run makes before it goes on is what was written, byte for byte.

    But for the model card, which nothing is computed from.
    """
    checkpoint, config = run_of_two(make)
    rng = random.Random(5)
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    for _ in range(count):
        path = rng.choice(files)
        content = path.read_bytes()
        flipped(path, rng.randrange(len(content)), rng.randrange(8))
        if path.name == "README.md":
            check_checkpoint(checkpoint, config)
        else:
            with pytest.raises(TrainingError, match="--resume continues from step-0000001"):
                check_checkpoint(checkpoint, config)
        path.write_bytes(content)
    check_checkpoint(checkpoint, config)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "processor.json", STATE, TENSORS, FILE])
def test_a_changed_file_is_not_resumed_from(make: Make, run_of_two: Any, name: str) -> None:
    checkpoint, config = run_of_two(make)
    flipped(checkpoint / name, -3, 0)
    with pytest.raises(TrainingError, match=rf"{name}.*\nRemove .*step-0000002, and"):
        train(config, quiet=True, resume=True)
    shutil.rmtree(checkpoint)
    train(config, quiet=True, resume=True)


def test_an_edited_model_card_is_accepted(make: Make, run_of_two: Any) -> None:
    checkpoint, config = run_of_two(make)
    (checkpoint / "README.md").write_text("Mine.")
    (checkpoint / "notes.txt").write_text("Mine too.")
    check_checkpoint(checkpoint, config)


def the_step_before(checkpoint: Path) -> None:
    for name in (STATE, TENSORS):
        shutil.copy(checkpoint.with_name("step-0000001") / name, checkpoint / name)


def changed_state(**changes: Any) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        state = json.loads((checkpoint / STATE).read_text())
        (checkpoint / STATE).write_text(json.dumps(state | changes))

    return change


def changed_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / TENSORS)
        change(tensors)
        save_file(tensors, checkpoint / TENSORS)

    return changed


def changed_moments(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def changed(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith(f"training/optimizer/{key}/"):
                tensors[name] = change(tensor)

    return changed_tensors(changed)


def without_moments(checkpoint: Path) -> None:
    changed_tensors(lambda x: [x.pop(name) for name in [*x] if "/optimizer/" in name])(checkpoint)
    changed_state(scalars={})(checkpoint)


def without_some_moment(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.startswith(MOMENT))]


def moments_of_later(checkpoint: Path) -> None:
    scalars = json.loads((checkpoint / STATE).read_text())["scalars"]
    changed_state(scalars={name: value + 7 for name, value in scalars.items()})(checkpoint)


def moments_of_others(tensors: dict[str, torch.Tensor]) -> None:
    names = [name for name in tensors if name.startswith(MOMENT)]
    moments = [tensors[name] for name in reversed(names)]
    tensors.update(zip(names, moments, strict=True))


def cast_moments(dtype: torch.dtype) -> Callable[[Path], None]:
    return changed_moments("exp_avg", lambda moment: moment.to(dtype))


def another_step_in_the_record(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "config.json").read_text())
    record["training"]["step"] = 1
    (checkpoint / "config.json").write_text(json.dumps(record))


def weights_not_finite(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    numbers = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    save_file({**weights, **{name: tensor * float("nan") for name, tensor in numbers.items()}}, path)


def cut_short(checkpoint: Path) -> None:
    (checkpoint / TENSORS).write_bytes((checkpoint / TENSORS).read_bytes()[:5000])


def changed_record(*keys: str, value: Any) -> Callable[[Path], None]:
    def changed(checkpoint: Path) -> None:
        record = json.loads((checkpoint / "config.json").read_text())
        inner = record
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (checkpoint / "config.json").write_text(json.dumps(record))

    return changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            changed_moments("exp_avg", lambda moment: moment * float("nan")),
            "not finite, first in optimizer",
        ),
        (changed_moments("exp_avg_sq", lambda moment: moment - 1), r"exp_avg_sq of \S+ has numbers below 0"),
        (cast_moments(torch.int64), r"exp_avg of \S+ is torch.int64, expected torch.float32"),
        (cast_moments(torch.float16), r"exp_avg of \S+ is torch.float16"),
        (changed_state(parameters=["backbone"]), r"the optimizer state is of 1 parameters, expected the \d+"),
        (weights_not_finite, "the weights hold numbers that are not finite"),
        (cut_short, "damaged"),
        (changed_record("training", value=[1]), "no record of a training"),
        (changed_record("training", value=None), "no record of a training"),
        (changed_record("training", "config", value=[1]), "no record of a training"),
        (changed_record("training", "step", value=True), "is of step True"),
        (the_step_before, "it is of step 1, expected that of step-0000002"),
        (changed_state(next_step=10**9), "it is of step 1000000000, expected that of step-0000002"),
        (changed_state(next_step="2"), "of step"),
        (changed_state(next_step=True), "of step"),
        (changed_state(scalars=None), "damaged"),
        (changed_state(scalars={}), "damaged"),
        (changed_tensors(lambda x: x.update({"training/random/00000/cpu": torch.zeros(3)})), "damaged"),
        (changed_tensors(lambda x: x.update({"training/x/w": torch.zeros(3)})), "it has x/w, which this"),
        (changed_state(updated=["backbone"]), "not of the parameters that were updated: backbone"),
        (changed_tensors(without_some_moment), r"state has exp_avg_sq, step of \S+, expected exp_avg, exp"),
        (without_moments, "the optimizer state is empty, expected that of step 2"),
        (moments_of_later, r"the optimizer state of \S+ is at step 9, expected 2 at most"),
        (changed_tensors(moments_of_others), r"exp_avg of \S+ is \(.*\), expected \("),
        (another_step_in_the_record, "config.json is of step 1, expected that of step-0000002"),
    ],
)
def test_state_and_weights_are_compared_even_if_hashes_match(
    make: Make, run_of_two: Any, change: Callable[[Path], None], words: str
) -> None:
    checkpoint, config = run_of_two(make)
    change(checkpoint)
    write_checksums(checkpoint, {})
    with pytest.raises(TrainingError, match=words) as error:
        train(config, quiet=True, resume=True)
    assert "step-0000002" in str(error.value)
    assert "--resume continues from step-0000001" in str(error.value)


@pytest.mark.parametrize("count", ["2", 1.5, float("nan"), -1, True])
def test_counts_of_bad_samples_are_whole_numbers(make: Make, run_of_two: Any, count: Any) -> None:
    checkpoint, config = run_of_two(make)
    changed_record("training", "data", "bad_samples", "bad", value={"read": count})(checkpoint)
    write_checksums(checkpoint, {})
    with pytest.raises(TrainingError, match=r"record of its data is damaged.*whole number"):
        train(config, quiet=True, resume=True)


def test_a_run_that_would_end_before_its_checkpoint_is_refused(make: Make, run_of_two: Any) -> None:
    run_of_two(make)
    with pytest.raises(TrainingError, match=r"step-0000002 is beyond the last step, 1: raise schedule"):
        train(make(schedule__stop=1), quiet=True, resume=True)
    train(make(schedule__stop=2), quiet=True, resume=True)


def test_without_an_earlier_checkpoint_the_hint_is_a_new_run(make: Make, run_of_two: Any) -> None:
    checkpoint, config = run_of_two(make)
    shutil.rmtree(checkpoint.with_name("step-0000001"))
    flipped(checkpoint / TENSORS, -3, 0)
    with pytest.raises(
        TrainingError, match=rf"{TENSORS} was changed.*\nThere is no earlier checkpoint.*init="
    ) as error:
        train(config, quiet=True, resume=True)
    words = str(error.value).rpartition("from them: ")[2].split()
    changes = dict(word.split("=") for word in words) | {"output": str(checkpoint.parents[2] / "anew")}
    train(make(schedule__stop=1, **changes), quiet=True)


@pytest.mark.parametrize("lacking", [STATE, FILE])
def test_an_incomplete_checkpoint_is_skipped_and_not_counted(
    make: Make, run_of_two: Any, lacking: str
) -> None:
    """As a copy that was interrupted leaves it: the checksums are what marks a checkpoint as complete."""
    checkpoint, _ = run_of_two(make)
    (checkpoint / lacking).unlink()
    train(make(schedule__stop=3, keep=2), quiet=True, resume=True)
    names = [folder.name for folder in resumable_checkpoints(checkpoint.parents[1])]
    assert names == ["step-0000001", "step-0000003"]
    for name in names:
        (checkpoint.with_name(name) / lacking).unlink()
    with pytest.raises(TrainingError, match=f"no complete checkpoint. step-0000001 .*: no {lacking}"):
        train(make(), quiet=True, resume=True)


# On request: `info --verify`.


def test_info_verifies_on_request(make: Make, run_of_two: Any, tmp_path: Path) -> None:
    checkpoint, config = run_of_two(make)
    model = Path(config.output) / "model"
    for folder in (checkpoint, model):
        done = CliRunner().invoke(app, ["info", str(folder), "--verify"])
        assert (done.exit_code, "files are unchanged" in done.stdout) == (0, True), done.output
    assert STATE not in verify_checksums(model, is_checkpoint_file=is_checkpoint_file)
    shutil.copytree(checkpoint, tmp_path / "copy")
    flipped(tmp_path / "copy/model.safetensors", -1, 7)
    done = CliRunner().invoke(app, ["info", str(tmp_path / "copy"), "--verify"])
    assert done.exit_code == 2
    assert "model.safetensors was changed or damaged" in done.stderr
    done = CliRunner().invoke(app, ["info", "tiny", "--verify"])
    assert "expected a checkpoint" in done.stderr


def test_an_added_shard_is_detected(make: Make, built: Any, tmp_path: Path) -> None:
    save(ModelAssembly(*built), tmp_path / "model", max_shard_size=100_000)
    names = verify_checksums(tmp_path / "model", is_checkpoint_file=is_checkpoint_file)
    assert len([name for name in names if name.startswith("model-")]) > 2
    assert "model.safetensors.index.json" in names
    (tmp_path / "model/model-extra.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model-extra.safetensors is not in SHA256SUMS"):
        verify_checksums(tmp_path / "model", is_checkpoint_file=is_checkpoint_file)
    ModelAssembly.from_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    "name",
    [
        "generation.tokenizer.encoder.0.bias",  # all codes would be 0
        "generation.tokenizer.codebook",
        "understanding.encoder.stem.0.weight",
        "backbone.model.model.layers.0.mlp.down_proj.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_does_not_start_from_weights_that_are_not_finite(
    make: Make, tmp_path: Path, name: str, value: float
) -> None:
    folder = tmp_path / "start"
    save(ModelAssembly.from_config(make().model), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors")
    config = make(model="null", init=str(folder), learn=["generation.head"])
    with pytest.raises(
        CheckpointError, match=f"start: found NaN or infinity, .* in {name}\\. Start from another"
    ):
        train(config, quiet=True)
    assert not Path(config.output).exists()


@pytest.mark.parametrize("kept", [1, 2])
def test_a_ruined_checkpoint_is_named_when_the_first_step_after_a_resume_fails(make: Make, kept: int) -> None:
    """An update of an enormous learning rate is finite, and saved; no lower one can help afterwards."""
    settings = {"learn": ["backbone"], "keep": kept, "checkpoint_every": 1}
    train(make(schedule__stop=1, **settings), quiet=True)
    with pytest.raises(TrainingError, match=r"step 2: not finite: .* Lower optimizer\.lr"):
        train(make(optimizer__lr=3e37, **settings), quiet=True, resume=True)
    with pytest.raises(
        TrainingError, match=r"No update came before it, .* weights of the checkpoint"
    ) as error:
        train(make(optimizer__lr=1e-4, **settings), quiet=True, resume=True)
    note = error.value.__notes__[-1]
    if kept == 1:
        assert note.endswith("remove step-0000002; and start a new run: no earlier one is left.")
        return
    assert note.endswith("remove step-0000002; --resume continues from step-0000001.")
    shutil.rmtree(Path(make().output) / "checkpoints/step-0000002")
    train(make(optimizer__lr=1e-4, **settings), quiet=True, resume=True)

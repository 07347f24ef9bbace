"""Resuming a run: checks of the checkpoint, settings that may change, and loading the training state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from janus_modular.checkpoints.native import read_record
from janus_modular.config import flatten, to_plain
from janus_modular.errors import CheckpointError, TrainingError
from janus_modular.foreign import read_json
from janus_modular.training.engine import Engine
from janus_modular.training.engine_state import PREFIX, empty_tensors
from janus_modular.training.processes import Processes
from janus_modular.training.run_folder import STATE, resumable_checkpoints, step_name
from janus_modular.training.schema import TrainConfig
from janus_modular.weights.checksums import FILE, verify_checksums
from janus_modular.weights.writing import is_checkpoint_file

IRRELEVANT = {
    "changed_data",
    "workers",
    "worker_type",
    "device",
    "peak_flops",
    "checkpoint_every",
    "checkpoint_async",
    "keep",
    "log_every",
    "output",
    "trackers",
    "validation",
}
"""Settings that no step depends on: they may change without a message."""

CHANGEABLE = {
    "parallel",
    "activation_checkpointing",
    "compile",
    "bad_samples",
    "codes",
    "optimizer",
    "schedule",
    "ema",
    "length",
    "accumulate",
    "supervise",
    "learn_image_ends",
    "condition_dropout",
    "dtype",
}
"""Settings that steps depend on, and that may change when a run continues; so may options of sources."""

FIXED = {
    "init": "a run begins once",
    "batch": "the order of samples follows from it; to need less memory, raise accumulate",
    "mixture": "the order of samples follows from it",
    "mixture_unit": "the order of samples follows from it",
    "seed": "the order of samples follows from it",
    "sources": "the order of samples follows from their names",
    "objective": "the state of training belongs to it",
    "learn": "the optimizer's state belongs to the trainable parameters",
    "model": "the checkpoint holds the model",
    "wrap": "the checkpoint holds the model",
}
"""Settings that may not change, with the reason."""


@dataclass(frozen=True)
class Change:
    """A setting whose value differs from the value in a checkpoint, or a plugin whose files do."""

    key: str
    saved: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.saved!r} then, {self.current!r} now"

    @property
    def is_allowed(self) -> bool:
        """Return whether a run may be resumed with this change."""
        section, *path = self.key.split(".")
        is_source_option = section == "sources" and len(path) > 1 and path[1] != "name"
        return section in CHANGEABLE or is_source_option


def changed_plugins(training: Mapping[str, Any], environment: Mapping[str, Any]) -> list[Change]:
    """Return the plugins whose files are others than those that the record of a training has hashed.

    A plugin is left out that only one of the two has: the settings say which components are used.
    """
    saved, current = (
        {
            plugin["plugin"]: f"{plugin['version'] or 'no version'} (sha256 {plugin['sha256'][:12]})"
            for plugin in record.get("plugins", ())
        }
        for record in (training.get("environment", {}), environment)
    )
    return [
        Change(f"plugin {name}", saved[name], current[name])
        for name in sorted(saved.keys() & current.keys())
        if saved[name] != current[name]
    ]


def changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    """Return the differences between two plain configs, by dotted keys, without irrelevant settings."""
    before, after = flatten(saved), flatten(current)
    return [
        Change(key, before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and key.partition(".")[0] not in IRRELEVANT
    ]


def check_checkpoint(checkpoint: Path, config: TrainConfig, processes: Processes | None = None) -> None:
    """Verify the files of a checkpoint before a run is resumed from it, and that all are of one step.

    Each of several processes hashes its share of the files.

    Raises:
        TrainingError: names the file that was changed or does not fit, and how to continue without it.
    """
    share = (processes.rank, processes.world) if processes else (0, 1)
    if not checkpoint.is_dir():
        raise TrainingError(
            f"rank {share[0]} does not see {checkpoint}, which rank 0 resumes from: expected output on a disk"
            " that all machines share"
        )
    try:
        if STATE not in verify_checksums(checkpoint, is_checkpoint_file=is_checkpoint_file, share=share):
            raise CheckpointError(f"{checkpoint / STATE} is not in {FILE}.")
        training = read_record(checkpoint).get("training")
        if not isinstance(training, dict) or not isinstance(training.get("config"), dict):
            raise CheckpointError(f"{checkpoint / 'config.json'} has no record of a training.")
        step = training.get("step")
        if type(step) is not int or step_name(step) != checkpoint.name:
            raise CheckpointError(
                f"{checkpoint / 'config.json'} is of step {step!r}, expected that of {checkpoint.name}."
            )
    except (CheckpointError, OSError) as error:
        raise TrainingError(f"{error}\n{_recovery_hint(checkpoint, config)}") from error


def check_same_run(checkpoint: Path, config: TrainConfig) -> list[Change]:
    """Return the settings that differ from those of a checkpoint, where a run may be resumed with them.

    Raises:
        TrainingError: a setting differs that may not change; names each, with both values. Or the run would
            end before the checkpoint.
    """
    changes = changed_settings(read_record(checkpoint)["training"]["config"], to_plain(config))
    if not_allowed := [change for change in changes if not change.is_allowed]:
        lines = []
        for change in not_allowed:
            reason = FIXED.get(change.key.partition(".")[0])
            lines.append(f"  {change} ({reason})" if reason else f"  {change}")
        listed = "\n".join(lines)
        raise TrainingError(
            f"{checkpoint} was made with other settings:\n{listed}\n"
            f"Restore them to resume, or start a new run from its weights: {_new_run(checkpoint, config)}"
        )
    if checkpoint.name > step_name(config.schedule.num_steps):
        raise TrainingError(
            f"{checkpoint} is beyond the last step, {config.schedule.num_steps:,}: raise schedule.steps or"
            " schedule.stop to continue, or remove the later checkpoints."
        )
    return changes


def load_state(checkpoint: Path, engine: Engine[Any], config: TrainConfig) -> None:
    """Restore the state that ``checkpoint`` holds in ``engine``: of sharded tensors, this process's parts.

    Raises:
        TrainingError: the state is damaged, of another run, or of another step than the weights.
    """
    path = checkpoint / STATE
    try:
        record = read_json(path, CheckpointError)
        if step_name(record["next_step"]) != checkpoint.name:
            raise ValueError(f"it is of step {record['next_step']}, expected that of {checkpoint.name}")
        engine.load_state_dict({"record": record, "tensors": _read_tensors(checkpoint, engine)})
    except Exception as error:  # torch raises many classes over the content of a file
        problem = str(error).partition("\n")[0] or type(error).__name__
        raise TrainingError(_damaged(path, problem, config)) from error
    if names := engine.non_finite_tensors():
        problem = f"the state or the weights hold numbers that are not finite, first in {names[0]}"
        raise TrainingError(_damaged(path, problem, config))


def _read_tensors(checkpoint: Path, engine: Engine[Any]) -> dict[str, Tensor]:
    """Read this process's parts of the state's tensors, whatever processes wrote them."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    saved = {
        name: (value.size, value.properties.dtype)
        for name, value in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(PREFIX) and isinstance(value, TensorStorageMetadata)
    }
    tensors = empty_tensors(engine, saved)
    with warnings.catch_warnings(action="ignore"):  # that no other process takes part: each reads for itself
        load(
            dict[str, Any](tensors),
            storage_reader=reader,
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
    return tensors


def _damaged(state: Path, problem: str, config: TrainConfig) -> str:
    """Return the message about a state that a run cannot be resumed from."""
    return f"{state} is damaged, or of another run: {problem}\n{_recovery_hint(state.parent, config)}"


def _recovery_hint(checkpoint: Path, config: TrainConfig) -> str:
    """Return how to continue without a damaged checkpoint."""
    earlier = [
        folder for folder in resumable_checkpoints(checkpoint.parents[1]) if folder.name < checkpoint.name
    ]
    if earlier:
        return f"Remove {checkpoint}, and --resume continues from {earlier[-1].name}."
    return (
        "There is no earlier checkpoint. If its weights can be trusted, start a new run from them:"
        f" {_new_run(checkpoint, config)}"
    )


def _new_run(checkpoint: Path, config: TrainConfig) -> str:
    """Return the overrides of a new run that starts from the weights of a checkpoint."""
    wrap = " wrap=null" if config.wrap is not None else ""
    return f"model=null init={checkpoint}{wrap} output=FOLDER"

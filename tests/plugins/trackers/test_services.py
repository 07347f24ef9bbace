"""The trackers of experiment services, with the real libraries and without a network.

They are large and slow to import, and no other test needs them: `make test-all` installs them in a folder
of their own. Without a library, its test skips.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from janus_modular import MissingExtraError
from janus_modular.protocols import LogsConfig, LogsImages, LogsTexts
from janus_plugins.trackers import remote
from janus_plugins.trackers.mlflow import MlflowConfig, MlflowTracker
from janus_plugins.trackers.trackio import TrackioConfig, TrackioTracker
from janus_plugins.trackers.wandb import WandbConfig, WandbTracker

PROMPT = "a <b>red</b> cat / " + "very " * 100 + "long"
SETTINGS = {"optimizer": {"lr": 0.1, "groups": None}, "trackers": [{"name": "x"}], "learn": ["a", "b"]}


LIBRARIES = Path(__file__).parents[3] / ".cache" / "trackers"


@pytest.fixture
def _libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find libraries that `make` has installed beside the environment, whose own versions go first."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(LIBRARIES)])


PARTS = ((1, 2, 3), (2, 3, 4))
"""Steps of a run and of its resumption."""


def record(opened: Any, parts: Sequence[Sequence[int]] = PARTS) -> None:
    """Log steps, an image and an answer in each part."""
    for steps in parts:
        tracker = opened()
        assert isinstance(tracker, LogsConfig)
        assert isinstance(tracker, LogsImages)
        assert isinstance(tracker, LogsTexts)
        tracker.log_config({**SETTINGS, "seed": steps[0]})
        for step in steps:
            tracker.log(step, {"loss/text": step / 2, "lr/*.0": 1e-3})
        tracker.log_images(steps[-1], {f"validation/{PROMPT}": Image.new("RGB", (4, 3), "red")})
        tracker.log_texts(steps[-1], {"validation/answer-0": "Why?\n\n<Because>"})
        tracker.close()


def test_settings_are_flat() -> None:
    assert remote.flat_settings(SETTINGS) == {
        "optimizer.lr": 0.1,
        "optimizer.groups": None,
        "trackers.0.name": "x",
        "learn": ["a", "b"],
    }


@pytest.mark.parametrize("config", [WandbConfig, MlflowConfig, TrackioConfig])
def test_a_missing_library_is_named_when_the_config_is_read(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "find_spec", lambda name: None)
    name = config.__name__.removesuffix("Config").lower()
    with pytest.raises(MissingExtraError, match=rf"the tracker '{name}' needs .*janus-modular\[{name}\]"):
        config()


def records_of_wandb(file: Path) -> Iterator[Any]:
    """Yield the records of an offline run: a log in LevelDB's format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, position, parts = file.read_bytes(), 7, b""
    while position < len(content):
        left = 32_768 - position % 32_768
        if left < 7:
            position += left
            continue
        _, size, part = struct.unpack_from("<IHB", content, position)
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        if part in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


@pytest.mark.slow
@pytest.mark.usefixtures("_libraries")
def test_wandb_keeps_a_run_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    rows, configs, ids = [], [], set()
    for part in PARTS:  # a run is named by its second
        record(lambda: WandbTracker(WandbConfig(mode="offline", tags=["t"]), tmp_path / "mine"), [part])
        wandb.teardown()  # what it does at exit: its service has then written all
        [folder] = (tmp_path / "mine" / "wandb").glob("offline-run-*")
        [file] = folder.glob("*.wandb")
        for entry in records_of_wandb(file):
            if entry.WhichOneof("record_type") == "history":
                items = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in entry.history.item
                }
                rows.append(items)
            if entry.WhichOneof("record_type") == "run":
                ids.add((entry.run.run_id, entry.run.display_name, entry.run.project, *entry.run.tags))
                configs.append({u.key: json.loads(u.value_json) for u in entry.run.config.update})
        [page] = folder.glob("files/media/html/**/*.html")
        assert "Why?\n\n&lt;Because&gt;" in page.read_text("utf-8")
        shutil.rmtree(folder)
    [(run_id, *names)] = ids
    assert names == ["mine", "janus-modular", "t"]
    assert run_id.startswith("mine-")
    assert [(row["step"], row["loss/text"]) for row in rows if "loss/text" in row] == [
        (step, step / 2) for part in PARTS for step in part
    ]
    assert configs[-1]["optimizer"] == SETTINGS["optimizer"]
    [image, _] = [row for row in rows if "validation/images.captions" in row]
    assert image["validation/images.captions"] == [f"validation/{PROMPT}"]
    assert (image["validation/images.width"], image["validation/images.height"]) == (4, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("_libraries")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # sqlalchemy's, of how mlflow uses it
def test_mlflow_keeps_a_run_in_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record(lambda: MlflowTracker(MlflowConfig(), tmp_path / "mine"))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mine' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("janus-modular")
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["optimizer.lr"] == "0.1"
    assert run.data.params["seed"] == "1"  # of the start
    history = client.get_metric_history(run.info.run_id, "loss/text")
    values = sorted((metric.step, metric.value) for metric in history)
    assert values == [(1, 0.5), (2, 1.0), (2, 1.0), (3, 1.5), (3, 1.5), (4, 2.0)]
    assert run.data.metrics["lr/_.0"] == 1e-3
    folder = tmp_path / "mine" / "mlflow-artifacts" / run.info.run_id / "artifacts"
    assert "seed: 2" in (folder / "config.yaml").read_text("utf-8")
    assert "Why?\n\n<Because>" in (folder / "texts/step-0000004.txt").read_text("utf-8")
    images = [path for path in (folder / "images").iterdir() if path.suffix == ".png"]
    assert len(images) == 2
    with Image.open(images[0]) as image:
        assert (image.size, image.convert("RGB").getpixel((0, 0))) == ((4, 3), (255, 0, 0))


@pytest.mark.slow
@pytest.mark.usefixtures("_libraries")
def test_trackio_keeps_a_run_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    trackio = import_module("trackio")
    record(lambda: TrackioTracker(TrackioConfig(), tmp_path / "mine"))
    assert capsys.readouterr().out == ""
    [run] = trackio.sqlite_storage.SQLiteStorage.get_runs("janus-modular")
    assert run.startswith("mine-")
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("janus-modular", run)
    values = [(row["step"], row["loss/text"]) for row in rows if "loss/text" in row]
    assert sorted(values) == [(1, 0.5), (2, 1.0), (2, 1.0), (3, 1.5), (3, 1.5), (4, 2.0)]
    [image, _] = [row["validation/image-0"] for row in rows if "validation/image-0" in row]
    assert image["caption"] == f"validation/{PROMPT}"
    with Image.open(tmp_path / "trackio" / "media" / image["file_path"]) as stored:
        assert stored.size == (4, 3)
    [text, _] = [row["validation/texts"]["_value"] for row in rows if "validation/texts" in row]
    assert "Why?\n\n<Because>" in text

"""Pretrained weights of single components: found, loaded and reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn

from janus_modular.capabilities import LoadedWeights
from janus_modular.checkpoints.assembly import tokenizer_files
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import CheckpointError, ConfigError
from janus_modular.interfaces import ComponentConfig, ComponentSpec
from janus_modular.janus import Janus
from janus_modular.weights.pretrained import commit_of, load_pretrained, resolve_pretrained


def part(path: Path) -> ComponentSpec:
    return ComponentSpec("adaptors", "linear", ComponentConfig(pretrained=str(path)))


class Renamed(nn.Linear):
    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield "weight", weights["proj.kernel"].T
        yield "bias", weights["proj.offset"]


class ByItself(nn.Linear):
    def load_pretrained(self, path: Path) -> LoadedWeights:
        self.weight.data.fill_(len(path.name))
        return LoadedWeights(1, [], ["pooler.weight"])


def test_names_are_the_parts_own(tmp_path: Path) -> None:
    weight, bias = torch.randn(2, 3), torch.randn(2)
    save_file({"weight": weight, "bias": bias, "scale": bias.clone()}, tmp_path / "adaptor.safetensors")
    module = nn.Linear(3, 2)
    report = load_pretrained(module, part(tmp_path))
    assert torch.equal(module.weight, weight)
    assert (report.loaded, report.unexpected_keys) == (2, ["scale"])
    assert str(report) == f"adaptor 'linear': 2 tensors from {tmp_path}; 1 unexpected keys: scale"


def test_a_weight_too_many_inside_the_part_is_an_error(tmp_path: Path) -> None:
    deeper = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    save_file(deeper.state_dict(), tmp_path / "adaptor.safetensors")
    module = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match=r"2 unexpected:\n +1\.1\.bias\n +1\.1\.weight"):
        load_pretrained(module, part(tmp_path))


def test_a_part_may_map_names(tmp_path: Path) -> None:
    kernel, offset = torch.randn(3, 2), torch.randn(2)
    save_file(
        {"proj.kernel": kernel, "proj.offset": offset, "other": offset.clone()}, tmp_path / "x.safetensors"
    )
    module = Renamed(3, 2)
    report = load_pretrained(module, part(tmp_path / "x.safetensors"))
    assert torch.equal(module.weight, kernel.T)
    assert report.unexpected_keys == ["other"]


def test_a_part_may_load_itself(tmp_path: Path) -> None:
    module = ByItself(3, 2)
    report = load_pretrained(module, part(tmp_path))
    assert (report.loaded, report.unexpected_keys) == (1, ["pooler.weight"])
    assert torch.all(module.weight == len(tmp_path.name))


def test_what_is_missing_or_misshapen_is_an_error(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3, 2)}, tmp_path / "adaptor.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_pretrained(nn.Linear(3, 2), part(tmp_path))
    assert f"{tmp_path}, given to the adaptor 'linear', does not fit:" in str(error.value)
    assert "weight: found (3, 2), expected (2, 3)" in str(error.value)
    assert "1 missing:\n    bias" in str(error.value)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub cache of our own, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_hub_model_that_cannot_be_had_says_how_to_get_it(offline: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'acme/siglip' at v2 is no file.*[\s\S]*HF_HUB_OFFLINE"):
        resolve_pretrained("acme/siglip", "v2")


@pytest.mark.parametrize("name", ["nowhere", "./acme/siglip", "/acme/siglip", "https://acme/siglip"])
def test_what_can_be_no_hub_id_is_not_looked_for_there(name: str) -> None:
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        resolve_pretrained(name)


def test_a_path_into_a_folder_that_is_here_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/demo/model").mkdir(parents=True)
    expected = r"no file or folder 'runs/demo/models'\. Did you mean 'runs/demo/model'\?"
    with pytest.raises(CheckpointError, match=expected):
        resolve_pretrained("runs/demo/models")


def test_reads_the_hubs_cache_and_says_the_commit(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = offline / "models--acme--adaptor" / "snapshots" / commit
    folder.mkdir(parents=True)
    refs = offline / "models--acme--adaptor" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    save_file({"weight": torch.zeros(2, 3), "bias": torch.ones(2)}, folder / "model.safetensors")
    (folder / "decoder.Q4_K_M.gguf").write_bytes(b"GGUF")
    found = resolve_pretrained("acme/adaptor")
    assert found == folder
    assert commit_of(found) == commit
    assert resolve_pretrained("acme/adaptor/decoder.Q4_K_M.gguf").name == "decoder.Q4_K_M.gguf"
    report = load_pretrained(
        nn.Linear(3, 2), ComponentSpec("adaptors", "linear", ComponentConfig("acme/adaptor"))
    )
    assert report.revision == commit
    assert "acme/adaptor@0123456789ab" in str(report)


def test_pickles_are_fetched_only_where_there_is_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: str) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    resolve_pretrained("acme/adaptor")
    assert ["*.bin" in patterns for patterns in asked] == [False, True]
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    resolve_pretrained("acme/adaptor")
    assert len(asked) == 3


def test_a_broken_connection_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP library has errors of its own, which are neither OSError nor ValueError."""

    class RemoteProtocolError(Exception):
        pass

    def snapshot(*_: object, **__: object) -> str:
        raise RemoteProtocolError("peer closed connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", snapshot)
    with pytest.raises(
        CheckpointError, match="did not give it:\n  RemoteProtocolError: peer closed"
    ) as caught:
        resolve_pretrained("acme/model")
    assert str(caught.value).endswith("hf download acme/model --local-dir FOLDER")
    with pytest.raises(
        CheckpointError, match=r"hf download acme/model x\.gguf --revision v1 --local-dir FOLDER"
    ):
        resolve_pretrained("acme/model/x.gguf", "v1")


@pytest.mark.parametrize("path", ["runs/demo", "runs/demo/model"])
def test_a_run_that_was_not_written_yet_is_not_looked_up_on_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(CheckpointError, match=rf"no file or folder '{path}'.*janus-modular demo"):
        resolve_pretrained(path)
    with pytest.raises(CheckpointError, match=rf"no file or folder '{path}'"):
        Janus.from_pretrained(path)


def test_no_weights_are_fetched_for_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns: list[str] = []

    def snapshot(name: str, *, allow_patterns: list[str], **_: object) -> str:
        patterns.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    config = resolve(load("tiny", ["processor.tokenizer=acme/model"]), ModelConfig)
    with pytest.raises(ConfigError), tokenizer_files(config):  # the folder is empty
        pass
    assert "*.json" in patterns
    assert not {"*.safetensors", "*.bin"} & {*patterns}

"""``janus-modular convert``, as it is typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.cli.app import app
from janus_modular.cli.convert import size_in_bytes
from janus_modular.weights.writing import write_weights

Made = ModelAssembly


def typed(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["convert", *map(str, words)])
    return result.exit_code, result.output


@pytest.fixture
def source(make: Callable[..., Made], tmp_path: Path) -> Path:
    save(make(tie_word_embeddings=True), tmp_path / "model", training={"steps": 3})
    return tmp_path / "model"


def test_halves_a_checkpoint(source: Path, tmp_path: Path) -> None:
    code, said = typed(source, tmp_path / "half", "--dtype", "bfloat16", "--max-shard-size", "200KB")
    assert code == 0, said
    assert len(list(tmp_path.glob("half/model-*.safetensors"))) > 1
    whole, half = (
        ModelAssembly.from_checkpoint(source).model,
        ModelAssembly.from_checkpoint(tmp_path / "half").model,
    )
    for name, tensor in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor.bfloat16().float()), name


def test_keeps_what_is_recorded(source: Path, tmp_path: Path) -> None:
    code, said = typed(source, tmp_path / "copy")
    assert code == 0, said
    for name in ("config.json", "processor.json", "tokenizer.json"):
        assert (tmp_path / "copy" / name).read_text() == (source / name).read_text()
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "copy"))
    assert old.keys() == new.keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "nativ"), "Did you mean 'native'"),
        (("--dtype", "int8"), "there is no dtype 'int8'"),
        (("--max-shard-size", "big"), "is not a size"),
        (("--format", "published"), "the published format supports only"),
        (("backbone.layers=1",), "backbone.layers"),
    ],
)
def test_says_what_is_wrong_and_writes_nothing(
    words: tuple[str, ...], message: str, source: Path, tmp_path: Path
) -> None:
    code, said = typed(source, tmp_path / "new", *words)
    assert code != 0
    assert message in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_format_that_is_none(source: Path, tmp_path: Path) -> None:
    code, said = typed(source, tmp_path / "new", "--format", "foo")
    assert code != 0
    assert "no format is called 'foo'.\nKnown: native, janusflow, published, transformers" in said


def test_a_weight_that_is_missing_stops_it(source: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith("quant_conv.bias")}, path)
    code, said = typed(source, tmp_path / "new")
    assert code != 0
    assert "2 missing in generation.tokenizer" in said


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("300", 300), ("10B", 10), ("2kb", 2000)]
)
def test_reads_sizes(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["GB", "0", "0GB", "0.0MB", "0.0000001", "9" * 400 + "GB", "-5GB", "1e5"])
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        size_in_bytes(text)


@pytest.mark.parametrize(("dtype", "number"), [("float16", 1e5), ("float16", -7e4), ("bfloat16", 3.4e38)])
def test_a_number_that_the_dtype_cannot_hold_is_refused(
    dtype: str, number: float, source: Path, tmp_path: Path
) -> None:
    """And nothing is left of what was written so far."""
    path = source / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name][0, 0] = number
    save_file(weights, path)
    code, said = typed(source, tmp_path / "new", "--dtype", dtype)
    assert code == 2
    assert "q_proj.weight holds" in said
    assert f"more than {dtype} can hold" in said
    assert not (tmp_path / "new").exists()
    assert typed(source, tmp_path / "new", "--dtype", "auto")[0] == 0


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(
    dtype: str, number: float, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = source / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    assert typed(source, tmp_path / "finite", "--dtype", dtype)[0] == 0
    assert not caplog.messages
    weights[name][0, 0] = number
    save_file(weights, path)
    assert typed(source, tmp_path / "new", "--dtype", dtype)[0] == 0
    (message,) = caplog.messages
    assert message.endswith(f"hold NaN or infinity, and are written as they are: {name}")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_are_compared_too(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoiled = torch.tensor([1.0, float("nan")]).to(dtype)
    write_weights(tmp_path, {"whole": torch.ones(3).to(dtype), "spoiled": spoiled}.items())
    assert [message.rpartition(": ")[2] for message in caplog.messages] == ["spoiled"]


def test_an_unregistered_sampler_is_not_written(source: Path, tmp_path: Path) -> None:
    code, said = typed(source, tmp_path / "new", "text_sampler=nope")
    assert code == 2
    assert "no text sampler is called 'nope'" in said

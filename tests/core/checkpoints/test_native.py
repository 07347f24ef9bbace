"""Native checkpoints: loading returns what was saved, and no checkpoint is ever half-written."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from janus_modular.checkpoints import ModelAssembly, native, save
from janus_modular.errors import CheckpointError, ConfigError, PluginError
from janus_modular.janus import Janus
from janus_modular.model.batch import collate
from janus_modular.model.model import JanusModel
from janus_modular.plugins import EntryPointInfo, Plugins, default_plugins
from janus_modular.processing.processor import Processor

Make = Callable[..., tuple[JanusModel, Processor]]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "phi3": {},
    "gemma2": {"query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 8, "tie_word_embeddings": True},
    "granite": {"embedding_multiplier": 3.0},
    "cohere": {"tie_word_embeddings": True},
    "gpt_neox": {},
}


def logits(model: JanusModel, processor: Processor) -> Tensor:
    batch = collate([processor.draw_prompt("a small image")])
    with torch.no_grad():
        return model.backbone.logits(model(batch).hidden)


def equal(a: nn.Module, b: nn.Module) -> bool:
    old, new = a.state_dict(), b.state_dict()
    return old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def edited(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_computes_the_same_bits(family: str, make: Make, tmp_path: Path) -> None:
    assembly = make(model_type=family, **FAMILIES[family])
    model, processor = assembly.model, assembly.processor
    with torch.no_grad():  # norms start as ones: a swapped pair would not show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    save(assembly, tmp_path / "model")
    reopened = ModelAssembly.from_checkpoint(tmp_path / "model")
    loaded, again = reopened.model, reopened.processor
    assert equal(model, loaded)
    assert torch.equal(logits(model, processor), logits(loaded, again))
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_tied_weights_are_stored_once_and_stay_tied(make: Make, tmp_path: Path) -> None:
    assembly = make(tie_word_embeddings=True)
    save(assembly, tmp_path / "model")
    assert "backbone.model.lm_head.weight" not in load_file(tmp_path / "model/model.safetensors")
    decoder = ModelAssembly.from_checkpoint(tmp_path / "model").model.backbone.model
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight


def test_a_vocabulary_that_grew_is_rebuilt(make: Make, tmp_path: Path) -> None:
    assembly = make(vocab_size=100)  # the tokenizer has more
    assert assembly.model.backbone.vocab_size == assembly.processor.tokenizer.vocab_size > 100
    save(assembly, tmp_path / "model")
    assert equal(assembly.model, ModelAssembly.from_checkpoint(tmp_path / "model").model)


def test_a_checkpoint_needs_no_other_file(make: Make, tmp_path: Path) -> None:
    decoder = AutoModelForCausalLM.from_config(make().model.backbone.model.config)
    decoder.save_pretrained(tmp_path / "llama")
    from janus_modular.checkpoints import ModelAssembly
    from janus_modular.config import resolve
    from janus_modular.config.schema import ModelConfig

    raw = {
        **native.to_plain(make().model.config),
        "backbone": {"name": "hf", "pretrained": str(tmp_path / "llama")},
    }
    raw["processor"]["tokenizer"] = "bytes"
    assembly = ModelAssembly.from_config(resolve(raw, ModelConfig))
    model = assembly.model
    assert torch.equal(model.backbone.model.lm_head.weight, decoder.lm_head.weight)
    save(assembly, tmp_path / "model")
    (tmp_path / "llama").rename(tmp_path / "elsewhere")
    loaded = ModelAssembly.from_checkpoint(tmp_path / "model")
    assert equal(model, loaded.model)
    report = loaded.provenance.pretrained[0]
    assert (report.slot, report.source, report.unexpected_keys) == ("backbones", str(tmp_path / "llama"), [])
    assert str(tmp_path / "llama") in (tmp_path / "model/README.md").read_text()


def test_shards_and_their_index(make: Make, tmp_path: Path) -> None:
    assembly = make()
    model = assembly.model
    save(assembly, tmp_path / "model", max_shard_size=100_000)
    shards = sorted(tmp_path.glob("model/model-*.safetensors"))
    assert len(shards) > 3
    assert max(shard.stat().st_size for shard in shards) < 120_000  # data and header
    assert equal(model, ModelAssembly.from_checkpoint(tmp_path / "model").model)


def test_what_is_computed_in(make: Make, tmp_path: Path) -> None:
    assembly = make()
    model = assembly.model
    save(assembly, tmp_path / "model", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for dtype, expected in (
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ):
        loaded = ModelAssembly.from_checkpoint(tmp_path / "model", dtype=dtype).model
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
        rotary = loaded.backbone.model.model.rotary_emb.inv_freq
        assert torch.equal(
            rotary, model.backbone.model.model.rotary_emb.inv_freq
        )  # float32, whatever the rest
    assert native.working_dtype("auto", "cuda", stored) == torch.bfloat16
    assert native.working_dtype("bf16", "cpu", stored) == torch.bfloat16
    for dtype, expected in (("fp16", torch.float16), (torch.bfloat16, torch.bfloat16)):
        janus = Janus.from_pretrained(tmp_path / "model", dtype=dtype)
        assert next(janus.model.backbone.parameters()).dtype == expected
        moved = Janus.from_pretrained(tmp_path / "model").to(dtype=dtype)
        for tensors in ("parameters", "buffers"):
            for ours, loaded in zip(
                getattr(moved.model, tensors)(), getattr(janus.model, tensors)(), strict=True
            ):
                assert ours.dtype == loaded.dtype
                assert torch.equal(ours, loaded)
        assert f"torch on cpu, {str(expected).removeprefix('torch.')})" in repr(moved)
    with pytest.raises(CheckpointError, match="no dtype 'half-ish'"):
        ModelAssembly.from_checkpoint(tmp_path / "model", dtype="half-ish")


def test_training_does_not_reach_the_file(make: Make, tmp_path: Path) -> None:
    assembly = make()
    model = assembly.model
    save(assembly, tmp_path / "model")
    loaded = ModelAssembly.from_checkpoint(tmp_path / "model").model
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert equal(model, ModelAssembly.from_checkpoint(tmp_path / "model").model)


def test_a_checkpoint_takes_the_place_of_a_checkpoint_only(make: Make, tmp_path: Path) -> None:
    assembly = make()
    (tmp_path / "model").mkdir()  # empty: nothing to lose
    save(assembly, tmp_path / "model")
    save(assembly, tmp_path / "model", training={"steps": 7})
    assert json.loads((tmp_path / "model/config.json").read_text())["training"] == {"steps": 7}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_bytes(b"meow")
    with pytest.raises(CheckpointError, match="not replaced"):
        save(assembly, tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "photos"]


def test_what_a_user_laid_into_a_checkpoint_stays_there(make: Make, tmp_path: Path) -> None:
    assembly = make()
    folder = tmp_path / "model"
    save(assembly, folder, max_shard_size=20_000)
    shards = [path.name for path in folder.glob("model-*.safetensors")]
    (folder / "notes.txt").write_text("mine")
    (folder / "drawings/new").mkdir(parents=True)
    (folder / "drawings/new/cat.png").write_bytes(b"meow")
    (folder / "latest").symlink_to("nowhere")
    save(assembly, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "drawings/new/cat.png").read_bytes() == b"meow"
    assert (folder / "latest").readlink() == Path("nowhere")
    assert len(shards) > 1
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes: writing then fails as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_debris(make: Make, tmp_path: Path) -> None:
    assembly = make()
    model = assembly.model
    save(assembly, tmp_path / "model")
    with torch.no_grad():
        model.backbone.model.lm_head.weight.add_(1)
    with largest_file(150_000), pytest.raises(CheckpointError, match=r"could not be written.*GB are free"):
        save(assembly, tmp_path / "model")
    with largest_file(150_000), pytest.raises(CheckpointError, match="could not be written"):
        save(assembly, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not equal(model, ModelAssembly.from_checkpoint(tmp_path / "model").model)


def test_an_error_while_writing_leaves_nothing(make: Make, tmp_path: Path) -> None:
    class Broken:
        def save(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")
            raise KeyError("tokenizer")

    with pytest.raises(KeyError):
        save(ModelAssembly(make().model, lambda: Broken()), tmp_path / "model")  # type: ignore
    assert not any(tmp_path.iterdir())


def test_lists_what_does_not_fit_by_component(make: Make, tmp_path: Path) -> None:
    assembly = make()
    save(assembly, tmp_path / "model")

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["generation.adaptor.layers.0.bias"], tensors["backbone.model.model.norm.weight"]
        tensors["understanding.encoder.head"] = torch.zeros(2)
        tensors["generation.head.vision_head.bias"] = torch.zeros(65)

    edited(tmp_path / "model", spoil)
    with pytest.raises(CheckpointError) as error:
        ModelAssembly.from_checkpoint(tmp_path / "model")
    text = str(error.value)
    assert "1 missing in generation.adaptor:\n    generation.adaptor.layers.0.bias" in text
    assert "1 missing in backbone:\n    backbone.model.model.norm.weight" in text
    assert "1 unexpected in understanding.encoder:\n    understanding.encoder.head" in text
    assert "generation.head.vision_head.bias: found (65,), expected (64,)" in text


def test_a_config_that_ties_what_differs_is_refused(make: Make, tmp_path: Path) -> None:
    assembly = make(tie_word_embeddings=True)
    save(assembly, tmp_path / "model")
    edited(tmp_path / "model", lambda t: t.update({"backbone.model.lm_head.weight": torch.zeros(320, 32)}))
    with pytest.raises(CheckpointError, match=r"weight: differs from the weight that"):
        ModelAssembly.from_checkpoint(tmp_path / "model")


def test_names_the_plugin_that_is_not_here(make: Make, tmp_path: Path) -> None:
    assembly = make()
    save(assembly, tmp_path / "model")
    path = tmp_path / "model/config.json"
    record = json.loads(path.read_text())
    record["plugins"].append(
        {"slot": "adaptors", "name": "acme-resampler", "dist": "acme-janus", "version": "0.2", "file": None}
    )
    path.write_text(json.dumps(record))
    with pytest.raises(PluginError, match=r"'acme-resampler' is not installed: pip install acme-janus==0\.2"):
        ModelAssembly.from_checkpoint(tmp_path / "model")


def test_a_name_that_another_distribution_took_later_selects_the_recorded_component(
    make: Make, tmp_path: Path
) -> None:
    assembly = make()
    save(assembly, tmp_path / "model")
    name = assembly.model.config.backbone.name
    stranger = EntryPointInfo("backbones", name, "acme_module", "acme")
    plugins = Plugins([*default_plugins().entry_points, stranger])
    opened = ModelAssembly.from_checkpoint(tmp_path / "model", plugins=plugins)
    assert equal(opened.model, assembly.model)
    assert opened.model.config.backbone.name == f"janus-modular:{name}"  # so it can be saved again
    save(opened, tmp_path / "again", plugins=plugins)


def test_refuses_what_it_cannot_read(make: Make, tmp_path: Path) -> None:
    assembly = make()
    save(assembly, tmp_path / "model")
    path = tmp_path / "model/config.json"
    good = json.loads(path.read_text())
    for content, message in (
        (json.dumps(good | {"format": 2}), r"format 2.*reads up to format 1"),
        (json.dumps({k: v for k, v in good.items() if k != "plugins"}), "lacks 'plugins'"),
        (
            json.dumps({"model_type": "llava"}),
            r"no known format.*'llava'[\s\S]*native, janusflow, published, transformers",
        ),
        ('{"model_type": ', "cannot be read"),
        ("[]", "expected a JSON object"),
    ):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            ModelAssembly.from_checkpoint(tmp_path / "model")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelAssembly.from_checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        ModelAssembly.from_checkpoint(tmp_path / "nowhere")


def test_a_file_in_a_models_place(tmp_path: Path) -> None:
    (tmp_path / "digit.png").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"digit\.png is a file; expected a model: the folder"):
        ModelAssembly.from_checkpoint(tmp_path / "digit.png")


def test_overrides_reach_the_stored_config(make: Make, tmp_path: Path) -> None:
    assembly = make()
    save(assembly, tmp_path / "model")
    loaded = ModelAssembly.from_checkpoint(tmp_path / "model", overrides=["backbone.attention=eager"]).model
    assert loaded.backbone.model.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"processor\.json"):
        ModelAssembly.from_checkpoint(tmp_path / "model", overrides=["processor.template=plain"])


def test_the_model_card_says_what_the_model_is(make: Make, tmp_path: Path) -> None:
    assembly = make()
    save(assembly, tmp_path / "digits", training={"steps": 300})
    card = (tmp_path / "digits/README.md").read_text()
    for words in ("# digits", "| understanding.encoder | siglip |", "| backbone | hf |", "steps: 300"):
        assert words in card

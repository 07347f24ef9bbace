"""The hf backbone against transformers' own ForCausalLM, family by family, on random weights."""

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from janus_modular import ConfigError, PromptError
from janus_plugins.backbones.decoder_config import decoder_config
from janus_plugins.backbones.hf import HfBackbone, HfConfig
from janus_plugins.hf_config_keys import check_keys

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WINDOW = {"sliding_window": 6}  # shorter than the sequences below, so that a dropped window shows
FAMILIES = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "phi3": WINDOW,
    "gemma": {"head_dim": 8},
    "gemma2": {
        **WINDOW,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 3.0,  # low enough to bend these scores
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "smollm3": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
    },
    "stablelm": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": WINDOW,
    "starcoder2": WINDOW,
    "llama4_text": {"intermediate_size_mlp": 64, "head_dim": 8, "num_local_experts": 2},
}
TOLERANCE = {"rtol": 0, "atol": 5e-5}  # float32 sums in another order; logits are of size 1 to 10


def make(family: str) -> HfBackbone:
    torch.manual_seed(0)
    backbone = HfBackbone(HfConfig(config={**SMALL, **FAMILIES[family], "model_type": family})).eval()
    for weight in backbone.parameters():
        if weight.dim() > 1:  # transformers' own start is so small that attention hardly matters
            torch.nn.init.normal_(weight, std=0.3)
    return backbone


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> HfBackbone:
    return make(request.param)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(5, 99, (2, 20), generator=torch.Generator().manual_seed(1))


def reference(backbone: HfBackbone, tokens: Tensor) -> Tensor:
    return copy.deepcopy(backbone.model)(input_ids=tokens).logits


@torch.no_grad()
def test_logits_are_the_familys(backbone: HfBackbone, tokens: Tensor) -> None:
    hidden = backbone(backbone.embed(tokens), positions=torch.arange(20).expand(2, 20))
    torch.testing.assert_close(backbone.logits(hidden), reference(backbone, tokens), **TOLERANCE)


@torch.no_grad()
def test_sequences_in_one_row_do_not_see_each_other(backbone: HfBackbone, tokens: Tensor) -> None:
    positions = torch.cat([torch.arange(8), torch.arange(12)]).expand(2, 20)
    packed = backbone.logits(backbone(backbone.embed(tokens), positions=positions))
    alone = torch.cat([reference(backbone, tokens[:, :8]), reference(backbone, tokens[:, 8:])], dim=1)
    torch.testing.assert_close(packed, alone, **TOLERANCE)


@torch.no_grad()
def test_variable_length_rows_through_the_cache(backbone: HfBackbone, tokens: Tensor) -> None:
    """Prompts of 8 and 13 tokens, then step by step, past every window."""
    expected = reference(backbone, tokens)
    cache = backbone.new_cache(2, 32)
    lengths = torch.tensor([8, 13])
    hidden = backbone(backbone.embed(tokens[:, :13]), positions=torch.arange(13).expand(2, 13), cache=cache)
    cache.advance(lengths)
    for row, length in enumerate(lengths):
        got = backbone.logits(hidden[row, :length])
        torch.testing.assert_close(got, expected[row, :length], **TOLERANCE)
    for _ in range(7):
        at = cache.lengths
        following = tokens[torch.arange(2), at].unsqueeze(1)
        hidden = backbone(backbone.embed(following), positions=at.unsqueeze(1), cache=cache)
        cache.advance(torch.ones(2, dtype=torch.int64))
        torch.testing.assert_close(backbone.logits(hidden[:, 0]), expected[torch.arange(2), at], **TOLERANCE)


@torch.no_grad()
def test_is_rebuilt_from_its_own_config(backbone: HfBackbone, tokens: Tensor) -> None:
    again = HfBackbone(backbone.config).eval()
    again.load_state_dict(backbone.state_dict())
    positions = torch.arange(20).expand(2, 20)
    ours, theirs = (b.logits(b(b.embed(tokens), positions=positions)) for b in (backbone, again))
    assert torch.equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3_text", "granite"])
def test_images_get_the_scale_that_text_gets(family: str, tokens: Tensor) -> None:
    """Embeddings that did not come from the table are treated like those that did."""
    backbone = make(family)
    images = backbone.model.get_input_embeddings().weight[tokens].clone()
    hidden = backbone(images, positions=torch.arange(20).expand(2, 20))
    torch.testing.assert_close(backbone.logits(hidden), reference(backbone, tokens), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_grows_by_rows_that_leave_the_old_logits_alone(tied: bool, tokens: Tensor) -> None:
    config = {**SMALL, "model_type": "llama", "tie_word_embeddings": tied}
    backbone = HfBackbone(HfConfig(config=config)).eval()
    before = reference(backbone, tokens)
    backbone.resize_vocab(103)
    positions = torch.arange(20).expand(2, 20)
    after = backbone.logits(backbone(backbone.embed(tokens), positions=positions))
    assert after.shape[-1] == backbone.vocab_size == backbone.config.config["vocab_size"] == 103
    torch.testing.assert_close(after[..., :99], before, **TOLERANCE)


def test_the_embedding_of_the_pad_token_gets_gradients() -> None:
    backbone = HfBackbone(HfConfig(config={**SMALL, "model_type": "llama", "pad_token_id": 3}))
    x = backbone.embed(torch.tensor([[3, 5, 3, 7]]))
    backbone(x, positions=torch.arange(4)[None])[0, -1].square().sum().backward()
    assert backbone.model.get_input_embeddings().weight.grad[3].abs().sum() > 0


def test_a_full_session_says_so() -> None:
    backbone = make("llama")
    cache = backbone.new_cache(1, 4)
    backbone(torch.zeros(1, 5, 32), positions=torch.arange(5)[None], cache=cache)
    with pytest.raises(PromptError, match="5 positions do not fit into a session of 4"):
        cache.advance(torch.tensor([5]))
    cache.advance(torch.tensor([4]))  # the fifth is padding


def test_a_family_that_ignores_packing_is_refused() -> None:
    backbone = HfBackbone(
        HfConfig(config={**SMALL, "model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 64})
    )
    with pytest.raises(ConfigError, match="does not keep sequences apart"):
        backbone(torch.randn(1, 4, 32), positions=torch.tensor([[0, 1, 0, 1]]))


def test_families_that_keep_packed_sequences_apart_are_not_refused_before_training(
    backbone: HfBackbone,
) -> None:
    state = torch.get_rng_state()
    assert backbone.to("meta").refuse_packing() == ""
    assert torch.equal(torch.get_rng_state(), state)


def test_packing_is_checked_once_numbers_are_finite() -> None:
    """With NaN or infinity nothing can be compared, and a tolerance of infinity would accept every family."""
    backbone = HfBackbone(
        HfConfig(config={**SMALL, "model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 64})
    )
    norm = backbone.model.base_model.decoder.final_layer_norm
    x, positions = torch.randn(1, 4, 32), torch.tensor([[0, 1, 0, 1]])
    for value in (float("nan"), float("inf")):
        torch.nn.init.constant_(norm.bias, value)
        assert not backbone(x, positions=positions).isfinite().any()
    torch.nn.init.zeros_(norm.bias)
    with pytest.raises(ConfigError, match="does not keep sequences apart"):
        backbone(x, positions=positions)


def test_attention_in_chunks_is_refused() -> None:
    keys = {**SMALL, **FAMILIES["llama4_text"], "model_type": "llama4_text"}
    with pytest.raises(ConfigError, match=r"chunks of 127 positions .*write max_position_embeddings=127"):
        HfBackbone(HfConfig(config={**keys, "attention_chunk_size": 127}))
    HfBackbone(HfConfig(config={**keys, "attention_chunk_size": 128}))  # the whole context is one chunk


def test_a_family_with_unknown_logit_rules_is_refused() -> None:
    config = {**SMALL, "model_type": "llama", "logit_bonus": 2.0}
    with pytest.raises(ConfigError, match="logit_bonus"):
        HfBackbone(HfConfig(config=config))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"hiden_size": 12},
            r"config.hiden_size: 'llama' has no such key. Did you mean 'hidden_size'",
        ),
        ({"model_type": "llamaa"}, "no model_type 'llamaa'. Did you mean llama"),
        (
            {"hidden_size": 64, "num_attention_heads": 7},
            "64.*not a multiple of the number of att",
        ),
    ],
)
def test_keys_that_are_misspelt_or_do_not_fit_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        decoder_config(HfConfig(config={"model_type": "llama"} | keys))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("family", "key", "value", "changes"),
    [
        ("qwen3_moe", "head_dim", 16, True),
        ("gpt_neox", "rotary_pct", 1.0, True),
        ("gpt2", "head_dim", 16, False),
        ("llama", "n_groups", 16, False),
    ],
)
def test_keys_that_are_not_declared_are_warned_of_unless_the_family_reads_them(
    family: str, key: str, value: float, changes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    keys = {**SMALL, **(experts if family == "qwen3_moe" else {}), "model_type": family}

    def built(**more: float) -> tuple[object, ...]:
        model = HfBackbone(HfConfig(config={**keys, **more})).model
        return [weight.shape for weight in model.parameters()], getattr(model.config, "rope_parameters", None)

    assert (built() != built(**{key: value})) == changes
    warned = [record.args for record in caplog.records if "change nothing" in record.msg]
    assert any(key in str(args) for args in warned) != changes


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("overridden", [False, True])
def test_a_rotated_share_that_the_family_does_not_read_is_refused(
    family: str, overridden: bool, tmp_path: Path
) -> None:
    factor = {"partial_rotary_factor": 0.5}
    keys = {**SMALL, "model_type": family}
    if family == "gemma3_text":
        factor = {
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, **factor}}
        }
    config = HfConfig(config={**keys, **factor})
    if overridden:
        HfBackbone(HfConfig(config=keys)).model.save_pretrained(tmp_path)
        config = HfConfig(pretrained=str(tmp_path), config_overrides=factor)
    with pytest.raises(ConfigError, match=f"partial_rotary_factor.*0.5.*'{family}'"):
        HfBackbone(config)


@pytest.mark.parametrize("family", ["phi", "stablelm", "glm"])
def test_a_rotated_share_that_the_family_reads_passes(family: str) -> None:
    keys = {**SMALL, "model_type": family, "partial_rotary_factor": 0.5, "pad_token_id": 0}
    assert HfBackbone(HfConfig(config=keys)).model.config.rope_parameters["partial_rotary_factor"] == 0.5


def test_keys_that_come_with_published_configs_pass() -> None:
    extra = {"rope_theta": 1e5, "is_llama_config": True, "torch_dtype": "bfloat16"}
    assert decoder_config(HfConfig(config={"model_type": "llama"} | extra)).model_type == "llama"


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "deepseek_v3", "recurrent_gemma"])
def test_what_a_family_writes_about_itself_passes(kind: str) -> None:
    check_keys({"model_type": kind} | CONFIG_MAPPING[kind]().to_diff_dict(), "backbone.config", ["llama"])


@pytest.mark.filterwarnings("ignore:`rope_scaling`:FutureWarning")
@pytest.mark.parametrize("key", ["rope_theta", "partial_rotary_factor", "rope_scaling"])
def test_keys_of_rotary_embeddings_are_warned_of_where_a_family_has_none(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    value = {"rope_type": "linear", "factor": 2.0} if key == "rope_scaling" else 0.5
    for family in ("gpt2", "opt", "bloom"):
        caplog.clear()
        decoder_config(HfConfig(config={"model_type": family, "vocab_size": 99, key: value}))
        assert f"'{family}' has no keys {key}; they change nothing" in caplog.text


@pytest.mark.parametrize(("factor", "words"), [(2, "at most 1"), (0.01, "rotates none"), (-1, "above 0")])
def test_rotated_shares_that_no_head_has_are_refused(factor: float, words: str, tmp_path: Path) -> None:
    keys = {**SMALL, "model_type": "phi", "pad_token_id": 0}
    with pytest.raises(ConfigError, match=f"partial_rotary_factor.*{words}"):
        HfBackbone(HfConfig(config={**keys, "partial_rotary_factor": factor}))
    HfBackbone(HfConfig(config=keys)).model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["rope_parameters"]["partial_rotary_factor"] = factor
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=f"partial_rotary_factor.*{words}"):
        HfBackbone(HfConfig(pretrained=str(tmp_path)))


def test_a_folder_whose_keys_overrule_each_other_is_refused_when_it_is_read(tmp_path: Path) -> None:
    HfBackbone(HfConfig(config={**SMALL, "model_type": "llama"})).model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text()) | {"rotary_pct": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"config.json.rotary_pct is 0.5, but 1.0 would be used"):
        decoder_config(HfConfig(pretrained=str(tmp_path)))
    decoder_config(HfConfig(pretrained=str(tmp_path), config_overrides={"rotary_pct": 1.0}))


@torch.no_grad()
def test_cached_passes_of_two_threads_may_overlap(tokens: Tensor) -> None:
    """The first pass ends while the second is before its last layer, which must attend through the cache."""
    backbone = make("gemma2")
    own = backbone.model.config._attn_implementation
    x, positions = backbone.embed(tokens), torch.arange(20).repeat(2, 1)
    second_is_inside, first_has_ended = threading.Event(), threading.Event()
    hidden: dict[str, Tensor] = {}

    @torch.no_grad()
    def run_pass() -> None:
        name = threading.current_thread().name
        hidden[name] = backbone(x, positions=positions, cache=backbone.new_cache(2, 20))

    second = threading.Thread(target=run_pass, name="second")

    def pause(*_: object) -> None:
        if threading.current_thread() is second:
            second_is_inside.set()
            assert first_has_ended.wait(60)
        else:
            second.start()
            assert second_is_inside.wait(60)

    with backbone.body.layers[-1].register_forward_pre_hook(pause):
        run_pass()
        first_has_ended.set()
        second.join()
    [first] = hidden.keys() - {"second"}
    assert torch.equal(hidden[first], hidden["second"])
    assert backbone.model.config._attn_implementation == own

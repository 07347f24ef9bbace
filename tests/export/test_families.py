"""Decoders of many families as graphs, against transformers' own eager forward pass, on random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from janus_export.onnx_export.graphs import Graph
from janus_export.reference.subgraphs import cut
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.model import JanusModel

Lower = Callable[[JanusModel, str], tuple[Graph, ir.Model]]

LAYERS, VOCAB, WIDTH, TOKENS = 2, 320, 32, 20
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
WINDOW = {"sliding_window": 6}  # shorter than the sequences below, so that a dropped window shows
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
LOCAL, GLOBAL = ({"rope_type": "default", "rope_theta": theta} for theta in (10_000.0, 50.0))


@dataclass(frozen=True)
class Family:
    """What a family is made with, and what makes it special: without that, the states must be others."""

    config: dict[str, Any]
    without: dict[str, Any] | None = None


FAMILIES = {
    "llama": Family({}, {"rope_parameters": GLOBAL}),
    "mistral": Family(WINDOW, {"sliding_window": None}),
    "qwen2": Family(
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}, {"use_sliding_window": False}
    ),
    "qwen3": Family({"head_dim": 16}),  # heads wider than hidden_size / heads
    "phi3": Family(WINDOW, {"sliding_window": None}),  # one projection for q, k, v; one for gate and up
    "gemma2": Family(
        {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0},
        {"attn_logit_softcapping": None},
    ),
    "gemma3_text": Family(
        {
            **WINDOW,
            **BOTH,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "rope_parameters": {"sliding_attention": LOCAL, "full_attention": GLOBAL},
        },
        {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": LOCAL}},
    ),
    "olmo2": Family({}),  # norms after the sublayers, and of queries and keys
    "smollm3": Family({"no_rope_layers": [1, 0]}, {"no_rope_layers": [1, 1]}),
    "granite": Family(
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
        {"residual_multiplier": 1.0},
    ),
    "stablelm": Family({}, {"rope_parameters": {**LOCAL, "partial_rotary_factor": 1.0}}),
    "cohere": Family({}),  # interleaved rotary positions, one norm for both sublayers
}
QUICK = ("gemma2",)  # windows, capped scores and two kinds of layers
LOGITS = {  # a rule of the family's logits, strong enough to change what is chosen
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.125},
}
CLOSE = 1e-4  # of the largest number: float32 sums in another order, through two layers


def config_of(family: str, **more: Any) -> dict[str, Any]:
    return {**SMALL, **FAMILIES[family].config, **more, "model_type": family}


def make(config: dict[str, Any]) -> JanusModel:
    torch.manual_seed(0)
    model = ModelAssembly.from_config(
        resolve(load("model/tiny", [f"backbone.config={json.dumps(config)}"]), ModelConfig)
    ).model
    for weight in model.backbone.parameters():
        if weight.dim() > 1:  # transformers' own start is so small that attention hardly matters
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def eager(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """Build transformers' own model, which knows nothing of ours."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    prefix = "backbone.model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return model.eval()


def open_session(model: ir.Model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())


class Exported:
    """A family's backbone as a graph, and what transformers says of the same tokens."""

    def __init__(self, family: str, lower: Lower) -> None:
        self.family = family
        model = make(config_of(family))
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        self.graph, self.model = lower(model, "backbone")
        self.session = open_session(self.model)
        self.tokens = torch.randint(5, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))
        self.hidden = self.eager_states(config_of(family))
        [table] = {k: v for k, v in self.weights.items() if k.endswith("embed_tokens.weight")}.values()
        self.x = table[self.tokens].numpy()  # (R, T, D), as the graph `embed` gives it

    @torch.no_grad()
    def eager_states(self, config: dict[str, Any]) -> np.ndarray:
        return eager(config, self.weights).base_model(input_ids=self.tokens).last_hidden_state.numpy()


class Rows:
    """Two rows of a graph, and their caches; unwritten positions are large values without effect."""

    def __init__(self, exported: Exported, capacity: int) -> None:
        self.session, self.capacity = exported.session, capacity
        self.caches = {
            tensor.name: np.full(
                (2, *(n if isinstance(n, int) else capacity for n in tensor.shape[1:])), 1e4, "f4"
            )
            for tensor in exported.graph.inputs
            if tensor.name.startswith("past_")
        }

    def inputs(self, x: np.ndarray, at: np.ndarray) -> dict[str, np.ndarray]:
        mask = (np.arange(self.capacity) <= at[:, :, None])[:, None]
        return {"x": x, "positions": at, "mask": mask, "write_index": at[:, 0].copy(), **self.caches}

    def feed(self, x: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Write x (R, T, D) at positions ``at`` (R, T); return hidden states (R, T, D)."""
        hidden, *present = self.session.run(None, self.inputs(x, at))
        self.caches = dict(zip(self.caches, present, strict=True))
        return hidden


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE * np.abs(want).max())


@pytest.fixture(
    scope="module",
    params=[pytest.param(family, marks=[] if family in QUICK else [pytest.mark.slow]) for family in FAMILIES],
)
def exported(request: pytest.FixtureRequest, lower: Lower) -> Exported:
    return Exported(request.param, lower)


def test_a_prompt_of_variable_length_rows_and_the_steps_after_it(exported: Exported):
    """Rows of 9 and 14 tokens, read at once, then one token at a time: past every window."""
    rows, lengths = Rows(exported, capacity=24), np.array([9, 14])
    hidden = rows.feed(exported.x[:, :14], np.tile(np.arange(14), (2, 1)))
    for row, length in enumerate(lengths):
        assert_close(hidden[row, :length], exported.hidden[row, :length])
    for step in range(TOKENS - 14):
        at = (lengths + step)[:, None]
        hidden = rows.feed(np.take_along_axis(exported.x, at[..., None], 1), at)
        assert_close(hidden, np.take_along_axis(exported.hidden, at[..., None], 1))


def test_a_prompt_in_chunks_longer_and_shorter_than_a_window(exported: Exported):
    rows = Rows(exported, capacity=TOKENS)
    for start, end in ((0, 3), (3, 12), (12, TOKENS)):
        hidden = rows.feed(exported.x[:, start:end], np.tile(np.arange(start, end), (2, 1)))
        assert_close(hidden, exported.hidden[:, start:end])


@torch.no_grad()
def test_its_layers_can_be_cut_out_and_run_one_by_one(exported: Exported):
    """As `verify` does with models too large for memory; each piece on what eager's own layer was given."""
    at = np.tile(np.arange(TOKENS), (2, 1))
    model = eager(config_of(exported.family), exported.weights).base_model
    states = [x.numpy() for x in model(exported.tokens, output_hidden_states=True).hidden_states]
    known = Rows(exported, TOKENS).inputs(exported.x, at)
    layers = []
    for piece in cut(exported.model.clone(), "backbone.model.model.layers", LAYERS, stream="x"):
        session = open_session(piece.model)
        if piece.layer is not None:
            layers.append(piece.layer)
            known[piece.takes] = states[piece.layer]
        names = [tensor.name for tensor in session.get_outputs()]
        found = session.run(names, {tensor.name: known[tensor.name] for tensor in session.get_inputs()})
        known |= dict(zip(names, found, strict=True))
        if piece.layer is not None and piece.layer + 1 < LAYERS:  # what follows the last is normalised
            assert_close(known[piece.gives], states[piece.layer + 1])
    assert layers == list(range(LAYERS))
    assert_close(known["hidden"], exported.hidden)


def test_what_is_special_of_a_family_shows_in_its_states(exported: Exported):
    """Else the tests above could not notice if it got lost."""
    without = FAMILIES[exported.family].without
    if without is not None:
        others = exported.eager_states(config_of(exported.family, **without))
        assert np.abs(others - exported.hidden).max() > 100 * CLOSE * np.abs(exported.hidden).max()


def test_the_graph_is_one_that_every_runtime_takes(exported: Exported):
    graph = exported.model.graph
    assert exported.model.opset_imports == {"": 24}
    assert not exported.model.functions
    assert {node.domain for node in graph} == {""}
    ops = [node.op_type for node in graph]
    assert not {"SplitToSequence", "SequenceAt", "NonZero", "Loop", "If"} & set(ops)  # TensorRT lacks them
    assert "MatMul" not in ops or exported.family == "gemma2"  # its attention is written out: linear is Gemm


def test_caches_are_written_in_place_and_attention_sees_what_the_mask_says(exported: Exported):
    graph = exported.model.graph
    outputs = {value.name: value for value in graph.outputs}
    assert len(exported.graph.aliases) == 2 * LAYERS
    for present, past in exported.graph.aliases:
        node = outputs[present].producer()
        assert node is not None
        assert node.op_type == "TensorScatter"
        assert node.inputs[0] is not None
        assert node.inputs[0].name == past
    attention = [node for node in graph if node.op_type == "Attention"]
    for node in attention:
        assert len(node.inputs) == 4
        assert node.inputs[3] is not None
        assert len(node.outputs) == 1
    if exported.family == "gemma2":  # TensorRT refuses its cap as an attribute, so it is written out
        assert not attention
        assert sum(node.op_type == "Tanh" for node in graph) == LAYERS
    else:
        assert len(attention) == LAYERS


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["granite", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "cohere"))]
)
def test_words_are_chosen_by_the_familys_own_logits(family: str, lower: Lower):
    """Scaled and capped; with the same noise, logits without the rule choose otherwise."""
    config = config_of(family, **LOGITS[family])
    model = make(config)
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    reference = eager(config, weights)
    tokens = torch.randint(5, VOCAB, (4, TOKENS), generator=torch.Generator().manual_seed(1))
    hidden = reference.base_model(input_ids=tokens).last_hidden_state.flatten(0, 1)
    noise = torch.empty(len(hidden), VOCAB).exponential_(generator=torch.Generator().manual_seed(2))
    right, plain = (
        (logits.softmax(-1) / noise).argmax(-1).numpy()
        for logits in (reference(input_ids=tokens).logits.flatten(0, 1), reference.lm_head(hidden))
    )
    assert (right != plain).mean() > 0.1

    session = open_session(lower(model, "sample_text")[1])
    settings = {"temperature": np.array(1, "f4"), "top_k": np.array(0), "top_p": np.array(1, "f4")}
    ids, x = session.run(None, {"hidden": hidden.numpy(), "noise": noise.numpy()} | settings)
    np.testing.assert_array_equal(ids, right)
    np.testing.assert_array_equal(x, reference.get_input_embeddings().weight[ids].numpy())

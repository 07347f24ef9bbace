"""The backbone `hf`: any causal decoder of transformers, by a config, a folder, a hub id or a GGUF file."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

from janus_modular import (
    Backbone,
    Cache,
    ComponentConfig,
    ConfigError,
    LoadedWeights,
    Registry,
    hookimpl,
    open_weights,
)
from janus_plugins.backbones.attention_masks import block_mask, refuse_blocks, refuse_chunks
from janus_plugins.backbones.decoder_config import decoder_config
from janus_plugins.backbones.kv_cache import KVCache, attention_modules, cached_attention
from janus_plugins.backbones.rope import separate_sequences
from janus_plugins.backbones.small_decoder import small_decoder
from janus_plugins.hf_config_keys import check_values, naming_settings
from janus_plugins.hf_folders import (
    DECODER_PREFIXES,
    decoder_names,
    is_described,
    is_part,
    read_config,
    refuse_integers,
    refuse_misshapen,
    refuse_unused,
    unused_weights,
)
from janus_plugins.hf_rope_keys import refuse_unread_factor

log = logging.getLogger(__name__)

CACHED_ATTENTION = "janus_kv_cache"
AttentionInterface.register(CACHED_ATTENTION, cached_attention)
LOCK = Lock()

LOGIT_RULES = {"logit_scale", "logits_scaling", "final_logit_softcapping"}
"""Config keys by which families change logits: Cohere multiplies, Granite divides, Gemma caps."""


@dataclass
class HfConfig(ComponentConfig):
    """A decoder, described by a transformers config or by the config beside its weights.

    With ``pretrained``, the model is built by the folder's config.json (or a GGUF file's metadata); every
    key of ``config`` must have the same value there.
    """

    config: dict[str, Any] | None = None  # transformers' keys; None: those beside `pretrained`
    config_overrides: dict[str, Any] = field(default_factory=dict)  # keys that replace `pretrained`'s
    attention: str | None = (
        None  # of training: sdpa, eager, flash_attention_2, flex_attention; None: the family's
    )


class HfBackbone(nn.Module):
    """A transformers ``...ForCausalLM``, split into embedding, body and logits."""

    def __init__(self, config: HfConfig) -> None:
        super().__init__()
        self._packing_checked = self._attention_checked = False
        self._cached_passes = 0  # of all threads, at this moment
        family = decoder_config(config)
        check_values(family.to_dict(), "backbone.config")
        # Pretrained weights replace the initial ones, so these take no memory.
        with torch.device("meta") if config.pretrained else nullcontext():
            self._adopt(build_decoder(family, config.attention))
        refuse_unread_factor(self.model)
        self._keys: dict[str, Any] = family.to_diff_dict()
        self.config = replace(config, pretrained=None, revision=None, config=self._keys, config_overrides={})

    def _adopt(self, model: Any) -> None:
        """Use a ForCausalLM, and read from its config how its family scales inputs and logits."""
        self.model = model
        separate_sequences(model)
        family = model.config
        rules = {k for k, v in family.to_dict().items() if "logit" in k and type(v) in (int, float)}
        unknown = rules - LOGIT_RULES - {"attn_logit_softcapping"}
        if unknown:
            raise ConfigError(
                f"'{family.model_type}' changes its logits by {sorted(unknown)}, which is not supported:"
                " add the rule to HfBackbone.logits and its family to the parity test"
            )
        refuse_chunks(family)
        if missing := [key for key in ("hidden_size", "max_position_embeddings") if not hasattr(family, key)]:
            raise ConfigError(
                f"found the family '{family.model_type}', whose config has no {' and no '.join(missing)};"
                " expected one with positions, which keep the sequences of a row apart: choose another"
                " model_type, such as llama, qwen3 or gemma3_text"
            )
        self.hidden_size: int = family.hidden_size
        self.context: int = family.max_position_embeddings
        embedding = model.get_input_embeddings()
        # Gemma's table scales its embeddings. Image embeddings skip the table, so forward applies the scale.
        self.input_scale: float = float(getattr(embedding, "scalar_embed_scale", 1.0))
        if type(embedding) is not nn.Embedding and not hasattr(embedding, "scalar_embed_scale"):
            raise ConfigError(
                f"'{family.model_type}' embeds tokens by {type(embedding).__name__}, which is neither a plain"
                " table nor a scaled one: image embeddings could not be scaled like text"
            )
        # Pads are inputs here (in unconditional rows), so their embedding is trained like any other.
        embedding.padding_idx = None

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the embedding table."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def body(self) -> Any:
        """The layers and the final norm, without logits."""
        return body_of(self.model)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up token ids (B, T) as (B, T, D), unscaled."""
        return F.embedding(tokens, self.model.get_input_embeddings().weight)

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return self.model.config.num_hidden_layers

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cache: Cache | None = None,
        together: Tensor | None = None,
        hidden: Tensor | None = None,
        layer: int | None = None,
    ) -> Any:
        """Turn embeddings (B, T, D) into hidden states (B, T, D), after the final norm.

        Positions of one number above 0 in ``together`` (B, T) attend to each other; no position sees those of
        ``hidden`` (B, T). With ``layer``, return the hidden states and those after so many layers, without a
        norm but the last's.
        """
        if self.input_scale != 1:
            x = x * torch.tensor(self.input_scale, dtype=x.dtype)
        if cache is None:
            if not self._packing_checked and not x.is_meta:
                self._check_packing(x[:1, :1])
            return self._body(x, positions, together, hidden, layer)
        if hidden is not None or layer is not None:
            raise ValueError(
                "found a cache with hidden or layer; expected neither: the cache hides positions"
            )
        with self._cached_attention() as attending:
            states = self.body(
                inputs_embeds=x,
                position_ids=positions,
                attention_mask=cache.begin(x.shape[1], together),
                past_key_values=cache,
                use_cache=True,
            )[0]
        if not self._attention_checked:
            self._check_attention(attending)
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn hidden states (..., D) into text logits (..., V), scaled and capped as the family does."""
        x = self.model.get_output_embeddings()(hidden)
        family = self.model.config
        x = x * getattr(family, "logit_scale", 1)
        x = x / getattr(family, "logits_scaling", 1)
        cap = getattr(family, "final_logit_softcapping", None)
        return x if cap is None else cap * torch.tanh(x / cap)

    @property
    def masks_positions(self) -> bool:
        """True if the family, as configured, takes any mask."""
        return not refuse_blocks(self.model.config)

    def refuse_together(self) -> str:
        """Return why this family does not support bidirectional blocks; "" if it does."""
        return refuse_blocks(self.model.config)

    def new_cache(self, rows: int, max_seq_len: int) -> KVCache:
        """Return an empty cache of ``max_seq_len`` positions a row."""
        return KVCache(rows, max_seq_len, device=self.model.device)

    def resize_vocab(self, vocab_size: int) -> None:
        """Grow to ``vocab_size`` tokens; new embeddings start as the mean of the old ones."""
        old = self.vocab_size
        if vocab_size <= old:
            return
        self.model.resize_token_embeddings(vocab_size, mean_resizing=False)
        tables = {
            id(t.weight): t.weight
            for t in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        }
        with torch.no_grad():
            for weight in tables.values():
                weight[old:] = weight[:old].mean(0)
        self._keys["vocab_size"] = vocab_size

    def load_pretrained(self, path: Path) -> LoadedWeights:
        """Load weights by transformers' own rules."""
        gguf = path.name if path.suffix == ".gguf" else None
        alone = gguf or not is_described(path) or not is_part(read_config(path, "a decoder"))
        if not gguf:
            refuse_integers(path, None if alone else [n for n in open_weights(path) if decoder_names([n])])
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent if gguf else path,
            config=self.model.config,
            gguf_file=gguf,
            key_mapping=None if alone else DECODER_PREFIXES,
            dtype=torch.get_default_dtype(),
            attn_implementation=self.model.config._attn_implementation,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        refuse_misshapen(path, info["mismatched_keys"])
        inside, unexpected_keys = unused_weights(info["unexpected_keys"], model)
        if not alone:
            decoder_keys = decoder_names(open_weights(path))
            body = dict(body_of(model).named_children())
            own = [n for n in inside if n in decoder_keys or n.split(".")[1] in body or "lm_head" in n]
            inside, unexpected_keys = own, sorted({*inside, *unexpected_keys} - {*own})
        refuse_unused(path, inside, f"the backbone 'hf' ({model.config.model_type})")
        self._adopt(model)
        tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        # transformers does not tie two tables that differ in the files, whatever the config says.
        if self._keys.get("tie_word_embeddings", True) != (tables[0] is tables[1]):
            self._keys["tie_word_embeddings"] = tables[0] is tables[1]
        tensors = {id(tensor) for tensor in self.model.state_dict(keep_vars=True).values()}  # tied ones once
        missing = sorted(info["missing_keys"])
        return LoadedWeights(len(tensors) - len(missing), missing, unexpected_keys)

    def _body(
        self,
        x: Tensor,
        positions: Tensor,
        together: Tensor | None = None,
        hidden: Tensor | None = None,
        layer: int | None = None,
    ) -> Any:
        mask = None  # transformers infers from positions which sequences share a row
        if together is not None or hidden is not None:
            mask = block_mask(self.model.config, x, positions, together, hidden)
        if x.is_meta:  # positions have no values there; any mask gives the shapes
            mask = x.new_ones(x.shape[0], 1, x.shape[1], x.shape[1], dtype=torch.bool)
        inputs = {"inputs_embeds": x, "position_ids": positions, "attention_mask": mask}
        if layer is None:
            return self.body(**inputs, use_cache=False)[0]
        output = self.body(**inputs, use_cache=False, output_hidden_states=True)
        return output[0], output.hidden_states[layer]

    def refuse_packing(self) -> str:
        """Return why training refuses this family; "" where nothing is known against it before."""
        decoder = small_decoder(self.model.config, build_decoder)
        if decoder is None:
            return ""
        small = HfBackbone.__new__(HfBackbone)
        nn.Module.__init__(small)
        small._packing_checked = False
        try:
            small._adopt(decoder)
            small._check_packing(torch.linspace(-1, 1, self.hidden_size)[None, None])
        except ConfigError as error:
            return str(error)
        except Exception:  # of the small decoder alone: the shapes of the whole were checked before
            log.debug("packing cannot be checked before training", exc_info=True)
        return ""

    @torch.no_grad()
    def _check_packing(self, x: Tensor) -> None:
        """Check, once, that this family separates sequences of a row by positions that restart at 0.

        Most decoders do; in the others, a sequence would silently attend to its neighbours.
        """
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        x = torch.cat([-x, 2 * x, x, -x], dim=1)  # (1, 4, D)
        positions = torch.tensor([[0, 1, 0, 1]], device=x.device)
        packed, alone = self._body(x, positions)[:, 2:], self._body(x[:, 2:], positions[:, 2:])
        for module, mode in modes.items():
            module.training = mode
        if not alone.isfinite().all():
            return  # nothing to compare: what reads the output reports it
        tolerance = 1e-4 if x.dtype == torch.float32 else 2e-2  # rounding: bf16 keeps 8 bits
        if not torch.allclose(packed, alone, rtol=0, atol=tolerance * float(alone.abs().max())):
            raise ConfigError(
                f"'{self.model.config.model_type}' does not keep sequences apart that share a row:"
                " transformers does not read packing off its positions; choose another backbone"
            )
        self._packing_checked = True

    def _check_attention(self, attending: set[nn.Module]) -> None:
        """Check, once, that every layer attends through `cached_attention`.

        A layer with another attention would read the mask differently or ignore the cache.
        """
        family = self.model.config
        stack = next(
            (
                module
                for module in self.body.modules()
                if isinstance(module, nn.ModuleList) and len(module) == family.num_hidden_layers
            ),
            [self.body],
        )
        unsupported = [
            f"{name} ({type(module).__name__})"
            for name, module in self.model.named_modules()
            if any(module is layer for layer in stack) and attending.isdisjoint(module.modules())
        ]
        if unsupported:
            raise ConfigError(
                f"'{family.model_type}' cannot decode step by step: {', '.join(unsupported[:3])}"
                f"{f' and {len(unsupported) - 3} more' if len(unsupported) > 3 else ''} do not attend through"
                " transformers' AttentionInterface, so neither masks nor windows of sessions and graphs would"
                " reach them. Choose a family all of whose layers do, such as llama or qwen3."
            )
        self._attention_checked = True

    @contextmanager
    def _cached_attention(self) -> Iterator[set[nn.Module]]:
        """Attend by `cached_attention` until the last thread's pass ends; yield the modules that call it."""
        family, modules = self.model.config, set[nn.Module]()
        with LOCK:
            if not self._cached_passes:
                self._own_attention = family._attn_implementation
            self._cached_passes += 1
            family._attn_implementation = CACHED_ATTENTION
        token = attention_modules.set(modules)
        try:
            yield modules
        finally:
            attention_modules.reset(token)
            with LOCK:
                self._cached_passes -= 1
                if not self._cached_passes:
                    family._attn_implementation = self._own_attention


def body_of(model: Any) -> Any:
    """Return the layers and the final norm of a ForCausalLM.

    ``base_model`` is the ForCausalLM itself in a family whose prefix is that of a larger model (llama4_text).
    """
    return model.base_model if model.base_model is not model else model.model


def build_decoder(family: PreTrainedConfig, attention: str | None) -> Any:
    """Build a ForCausalLM with random weights and a copy of the config."""
    if type(family) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"transformers has no causal decoder '{family.model_type}': choose a family with a ...ForCausalLM"
        )
    if attention is None and getattr(family, "attn_logit_softcapping", None):
        attention = "eager"  # SDPA ignores Gemma 2's softcapping
    with naming_settings(family, "backbone.config"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(family), attn_implementation=attention, dtype=torch.get_default_dtype()
        )


@hookimpl
def register_backbones(registry: Registry[Backbone]) -> None:
    """Register transformers' decoders."""
    registry.add("hf", HfBackbone, HfConfig, families=DECODERS)

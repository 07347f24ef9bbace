"""Low-rank adapters (LoRA) on any backbone: some million parameters learn in the place of all.

backbone: {name: lora, rank: 16, alpha: 32, backbone: {name: hf, pretrained: FOLDER}}

``learn: [backbone]`` trains the adapters alone; a path inside (``backbone.backbone.model.lm_head``) trains
what it names. ``export`` and ``convert --merge`` fold them into the weights, and nothing of them is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from janus_modular import (
    Backbone,
    Cache,
    CheckpointError,
    ComponentConfig,
    ComponentSpec,
    ConfigError,
    LoadedWeights,
    Registry,
    RowCache,
    component,
    hookimpl,
    open_weights,
)
from janus_plugins.sizes import check_sizes

ALL_LINEAR = "all-linear"
PUBLISHED = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.(?P<which>lora_[AB])(?:\.default)?\.weight")
"""The names of adapters in files that peft writes."""

PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""How adapters may have begun to learn: ways that leave the base alone, as PiSSA and LoftQ do not."""

UNKNOWN = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "kasa_config",
    "layer_replication",
    "alora_invocation_tokens",
)
"""Options of peft's by which an adapted layer, or the base, would be another than ours."""


@dataclass
class LoraConfig(ComponentConfig):
    """What is adapted, and how. ``pretrained`` is an adapter as peft saves it: a folder or a hub id."""

    backbone: ComponentSpec = component("backbones")  # with its own `pretrained`
    rank: int = 16  # inner width of an adapter: a layer of (n, m) gets rank * (n + m) parameters
    alpha: float = 32.0  # what an adapter adds is multiplied by alpha / rank
    dropout: float = 0.0  # of what goes into an adapter, while it learns
    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])  # or names: q_proj, v_proj ...

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        check_sizes(self, rank=1)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout}; expected at least 0 and less than 1.")


class LoraBackbone(nn.Module):
    """A backbone with adapters in its linear layers, those of the logits apart.

    Built as ``factory(config, build)``. y = W x + alpha / rank * B A x, with B zero at first, so that nothing
    changes until something is learned ("LoRA: low-rank adaptation of large language models", section 4.1).
    """

    backbone: Any

    def __init__(self, config: LoraConfig, build: Callable[[ComponentSpec], Any]) -> None:
        super().__init__()
        self.config = config
        self.backbone = build(config.backbone)
        self.hidden_size: int = self.backbone.hidden_size
        self.context: int = self.backbone.context
        adapters = PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=chosen(config.target_modules, adaptable(self.backbone)),
        )
        inject_adapter_in_model(adapters, nn.ModuleDict({"backbone": self.backbone}))

    @property
    def vocab_size(self) -> int:
        """Tokens of the backbone inside."""
        return self.backbone.vocab_size

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up token ids (B, T) as (B, T, D)."""
        return self.backbone.embed(tokens)

    def forward(self, x: Tensor, *, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Turn embeddings (B, T, D) into hidden states (B, T, D), through the adapted layers."""
        return self.backbone(x, positions=positions, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn hidden states (..., D) into text logits (..., V); nothing is adapted here."""
        return self.backbone.logits(hidden)

    def new_cache(self, rows: int, max_seq_len: int) -> RowCache:
        """Return an empty cache of the backbone inside."""
        return self.backbone.new_cache(rows, max_seq_len)

    def resize_vocab(self, vocab_size: int) -> None:
        """Grow the vocabulary of the backbone inside; new rows learn where a stage names the table."""
        self.backbone.resize_vocab(vocab_size)

    def trainable_parameters(self) -> Iterable[str]:
        """Name the adapters."""
        for path, layer in self._adapted():
            yield from (f"{path}.{name}" for name, _ in layer.named_children() if name.startswith("lora_"))

    def merged(
        self, weights: Mapping[str, Tensor]
    ) -> tuple[ComponentSpec, Mapping[str, Callable[[], Tensor]]]:
        """Return the backbone inside, and each of its weights with what the adapters add."""
        folded = {f"{path}.base_layer.weight" for path, _ in self._adapted()}
        made: dict[str, Callable[[], Tensor]] = {}
        for name in weights:
            inside = name.removeprefix("backbone.").replace(".base_layer.", ".")
            if name in folded:
                made[inside] = partial(self._fold, weights, name.removesuffix(".base_layer.weight"))
            elif ".lora_" not in name:
                made[inside] = partial(weights.__getitem__, name)
        return deepcopy(self.config.backbone), made

    def load_pretrained(self, path: Path) -> LoadedWeights:
        """Read all of an adapter that peft saved; return how many tensors, names missing, left over (none).

        Raises:
            CheckpointError: the folder is none of peft's, its adapter is not as the config says, or it holds
                more than that: what was learned together says something else in part.
        """
        check_adapter(path, self.config)
        weights = open_weights(path)
        own = {
            f"{layer}.{which}.default.weight"
            for layer, _ in self._adapted()
            for which in ("lora_A", "lora_B")
        }
        found, strange = set[str](), []
        for name in weights:
            match = PUBLISHED.fullmatch(name)
            ends = f".{match['layer']}.{match['which']}.default.weight" if match else "\0"
            target = next((one for one in own if one.endswith(ends)), None)
            if target is None:
                strange.append(name)
                continue
            held = self.get_parameter(target)
            if held.shape != weights[name].shape:
                raise CheckpointError(
                    f"{path}: {name} is {tuple(weights[name].shape)}; expected {tuple(held.shape)}"
                )
            with torch.no_grad():
                held.copy_(weights[name])
            found.add(target)
        if strange:
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            raise CheckpointError(
                f"{path} adapts what the backbone 'lora' does not: {', '.join(sorted(strange)[:3])}{more}."
                " Name these layers in target_modules; what is no linear layer cannot be adapted here."
            )
        return LoadedWeights(len(found), sorted(own - found), [])

    def _adapted(self) -> Iterator[tuple[str, LoraLayer]]:
        for path, module in self.named_modules():
            if isinstance(module, LoraLayer):
                yield path, module

    def _fold(self, weights: Mapping[str, Tensor], path: str) -> Tensor:
        weight = weights[f"{path}.base_layer.weight"]
        a, b = (weights[f"{path}.{which}.default.weight"].float() for which in ("lora_A", "lora_B"))
        return (weight.float() + self.config.alpha / self.config.rank * (b @ a)).to(weight.dtype)


def adaptable(backbone: Any) -> list[str]:
    """Name the linear layers of a backbone, less those that make logits: they grow with the vocabulary."""
    linear = {module: name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    called: list[nn.Module] = []
    hooks = [one.register_forward_pre_hook(lambda module, _: called.append(module)) for one in linear]
    weight = next(backbone.parameters())
    with torch.no_grad():
        backbone.logits(torch.zeros(1, backbone.hidden_size, device=weight.device, dtype=weight.dtype))
    for hook in hooks:
        hook.remove()
    return [f"backbone.{name}" for module, name in linear.items() if module not in called]


def chosen(wanted: list[str], there: list[str]) -> list[str]:
    """Find the layers that ``target_modules`` means: each entry a layer's name, or the end of its path.

    Raises:
        ConfigError: an entry names no layer that can be adapted.
    """
    if wanted == [ALL_LINEAR]:
        found = {ALL_LINEAR: there}
    else:
        found = {one: [name for name in there if f".{name}".endswith(f".{one}")] for one in wanted}
    nothing = [one for one, names in found.items() if not names]
    if nothing or not found:
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in there)) or "none"
        raise ConfigError(
            f"target_modules: {', '.join(nothing) or 'an empty list'} adapts nothing; the linear layers,"
            f" those of the logits apart, are {kinds}"
        )
    return sorted({name for names in found.values() for name in names})


def check_adapter(path: Path, config: LoraConfig) -> None:
    """Refuse an adapter whose arithmetic is not that of ``config``.

    Raises:
        CheckpointError: says what differs, or that there is no adapter_config.json.
    """
    try:
        saved = json.loads((path / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no adapter of peft's, a folder with adapter_config.json and weights: {error}"
        ) from error
    wanted = {"peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha}
    differs = [
        f"{key} is {saved.get(key)!r}, not {value!r}"
        for key, value in wanted.items()
        if saved.get(key) != value
    ]
    differs += [f"{key} is {saved[key]!r}, which is not known here" for key in UNKNOWN if saved.get(key)]
    if saved.get("bias", "none") != "none":
        differs.append(
            f"bias is {saved['bias']!r}: the base's biases were trained too, which is not known here"
        )
    if (start := saved.get("init_lora_weights", True)) not in PLAIN_STARTS:
        differs.append(
            f"init_lora_weights is {start!r}, which may have changed the base's weights as well: let peft "
            "save the adapter for the base as it was (path_initial_model_for_weight_conversion)"
        )
    if differs:
        raise CheckpointError(f"{path} does not fit the backbone 'lora': {'; '.join(differs)}")


@hookimpl
def register_backbones(registry: Registry[Backbone]) -> None:
    """Offer adapters on another backbone."""
    registry.add("lora", LoraBackbone, LoraConfig)

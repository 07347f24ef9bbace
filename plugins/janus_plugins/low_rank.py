"""Low-rank adapters (LoRA) in the linear layers of a component: what `lora` is in every slot.

y = W x + alpha / rank * B A x, with B zero at first, so that an untrained adapter changes nothing ("LoRA:
low-rank adaptation of large language models", section 4.1). peft makes the layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import peft  # before torch: where both are missing, the error names the extra that has both
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from janus_modular import (
    CheckpointError,
    ComponentConfig,
    ComponentSpec,
    ConfigError,
    LoadedWeights,
    list_briefly,
    open_weights,
)
from janus_plugins.sizes import check_sizes

ALL_LINEAR = "all-linear"
PUBLISHED = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.(?P<which>lora_[AB])(?:\.default)?\.weight")
"""The names of adapter weights in peft's files."""

SUPPORTED_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations of adapters that do not change the base's weights, as PiSSA and LoftQ do."""

UNSUPPORTED = (
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
"""Options of peft that change an adapted layer or the base in ways that are not implemented here."""


READ_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules of torch that read the weights of their linear layers, so that adapters would have no effect."""


@dataclass
class AdapterOptions(ComponentConfig):
    """Options of LoRA. ``pretrained`` is an adapter that peft saved: a folder or a hub id."""

    rank: int = 16  # r; a layer of (n, m) gets rank * (n + m) parameters
    alpha: float = 32.0  # an adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # of an adapter's input, in training
    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])  # or names: q_proj, v_proj ...

    def __post_init__(self) -> None:
        """Check the rank and the dropout."""
        check_sizes(self, rank=1)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout}; expected at least 0 and less than 1.")


class LowRankAdapters(nn.Module):
    """A component with adapters in its linear layers; a subclass has the interface of its slot.

    ``wrapped`` names the adapted component, alike in the config, in the module and in paths of weights.
    """

    wrapped: ClassVar[str]

    def __init__(self, config: Any, component: Any, *, excluded: Iterable[nn.Module] = ()) -> None:
        """Put adapters into ``component``, in place, except into the layers ``excluded``.

        Raises:
            ConfigError: ``target_modules`` selects no layer.
        """
        super().__init__()
        self.config = config
        setattr(self, self.wrapped, component)
        layers = [f"{self.wrapped}.{name}" for name in linear_layers(component, excluded)]
        adapters = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules="|".join(map(re.escape, target_layers(config.target_modules, layers))),
        )
        peft.inject_adapter_in_model(adapters, nn.ModuleDict({self.wrapped: component}))

    def trainable_parameters(self) -> Iterable[str]:
        """Yield the names of the adapters."""
        for path, layer in self._adapted():
            yield from (f"{path}.{name}" for name, _ in layer.named_children() if name.startswith("lora_"))

    def merged(
        self, weights: Mapping[str, Tensor]
    ) -> tuple[ComponentSpec, Mapping[str, Callable[[], Tensor]]]:
        """Return the wrapped component's spec, and its weights with the adapters added."""
        adapted = {f"{path}.base_layer.weight" for path, _ in self._adapted()}
        tensors: dict[str, Callable[[], Tensor]] = {}
        for name in weights:
            inside = name.removeprefix(f"{self.wrapped}.").replace(".base_layer.", ".")
            if name in adapted:
                tensors[inside] = partial(self._merge, weights, name.removesuffix(".base_layer.weight"))
            elif ".lora_" not in name:
                tensors[inside] = partial(weights.__getitem__, name)
        return deepcopy(getattr(self.config, self.wrapped)), tensors

    def load_pretrained(self, path: Path) -> LoadedWeights:
        """Load an adapter that peft saved.

        Raises:
            CheckpointError: the folder is not peft's, the adapter differs from the config, or it has weights
                for layers that are not adapted here: an adapter is only valid as a whole.
        """
        check_adapter(path, self.config)
        weights = open_weights(path)
        own = {
            f"{layer}.{which}.default.weight"
            for layer, _ in self._adapted()
            for which in ("lora_A", "lora_B")
        }
        loaded, unknown = set[str](), []
        for name in weights:
            match = PUBLISHED.fullmatch(name)
            ends = f".{match['layer']}.{match['which']}.default.weight" if match else "\0"
            target = next((name for name in own if name.endswith(ends)), None)
            if target is None:
                unknown.append(name)
                continue
            parameter = self.get_parameter(target)
            if parameter.shape != weights[name].shape:
                raise CheckpointError(
                    f"{path}: {name} is {tuple(weights[name].shape)}; expected {tuple(parameter.shape)}"
                )
            with torch.no_grad():
                parameter.copy_(weights[name])
            loaded.add(target)
        if unknown:
            raise CheckpointError(
                f"{path} adapts what 'lora' does not: {list_briefly(sorted(unknown), 3)}."
                " Name these layers in target_modules; what is no linear layer cannot be adapted here."
            )
        return LoadedWeights(len(loaded), sorted(own - loaded), [])

    def _adapted(self) -> Iterator[tuple[str, LoraLayer]]:
        for path, module in self.named_modules():
            if isinstance(module, LoraLayer):
                yield path, module

    def _merge(self, weights: Mapping[str, Tensor], path: str) -> Tensor:
        weight = weights[f"{path}.base_layer.weight"]
        a, b = (weights[f"{path}.{which}.default.weight"].float() for which in ("lora_A", "lora_B"))
        return (weight.float() + self.config.alpha / self.config.rank * (b @ a)).to(weight.dtype)


def linear_layers(component: nn.Module, excluded: Iterable[nn.Module] = ()) -> list[str]:
    """Return the names of a component's linear layers that are called, without the ``excluded``."""
    outside = {*excluded}
    for module in component.modules():
        if isinstance(module, READ_DIRECTLY):
            outside.update(module.modules())
    return [
        name
        for name, module in component.named_modules()
        if isinstance(module, nn.Linear) and module not in outside
    ]


def logit_layers(backbone: Any) -> list[nn.Module]:
    """Return the linear layers that a backbone computes its logits with."""
    called: list[nn.Module] = []
    layers = [module for module in backbone.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(lambda module, _: called.append(module)) for layer in layers]
    weight = next(backbone.parameters())
    with torch.no_grad():
        backbone.logits(torch.zeros(1, backbone.hidden_size, device=weight.device, dtype=weight.dtype))
    for hook in hooks:
        hook.remove()
    return called


def target_layers(targets: list[str], layers: list[str]) -> list[str]:
    """Return the ``layers`` that ``target_modules`` selects by their names or the ends of their paths.

    Raises:
        ConfigError: an entry selects no layer.
    """
    if targets == [ALL_LINEAR]:
        selected = {ALL_LINEAR: layers}
    else:
        selected = {
            target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets
        }
    unmatched = [target for target, names in selected.items() if not names]
    if unmatched or not selected:
        available = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers)) or "none"
        raise ConfigError(
            f"target_modules: {', '.join(unmatched) or 'an empty list'} adapts nothing; the linear layers"
            f" that can be adapted are {available}"
        )
    return sorted({name for names in selected.values() for name in names})


def check_adapter(path: Path, config: AdapterOptions) -> None:
    """Check that a saved adapter computes the same as ``config`` describes.

    Raises:
        CheckpointError: lists the differences, or there is no adapter_config.json.
    """
    try:
        saved = json.loads((path / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no adapter of peft's, a folder with adapter_config.json and weights: {error}"
        ) from error
    expected = {"peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha}
    differences = [
        f"{key} is {saved.get(key)!r}, not {value!r}"
        for key, value in expected.items()
        if saved.get(key) != value
    ]
    differences += [
        f"{key} is {saved[key]!r}, which is not supported" for key in UNSUPPORTED if saved.get(key)
    ]
    if saved.get("bias", "none") != "none":
        differences.append(
            f"bias is {saved['bias']!r}: the base's biases were trained too, which is not supported"
        )
    if (start := saved.get("init_lora_weights", True)) not in SUPPORTED_INITS:
        differences.append(
            f"init_lora_weights is {start!r}, which may have changed the base's weights as well: let peft "
            "save the adapter for the base as it was (path_initial_model_for_weight_conversion)"
        )
    if differences:
        raise CheckpointError(f"{path} does not fit 'lora': {'; '.join(differences)}")

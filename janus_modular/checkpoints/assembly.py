"""A model together with its processor and its provenance: built from a configuration or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from janus_modular.capabilities import DeclaresPositions, EncodesImages, HidesCondition
from janus_modular.config import component_specs
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError
from janus_modular.foreign import reason
from janus_modular.interfaces import ComponentConfig, GenerationPath
from janus_modular.model.build import ModelBuilder, config_path
from janus_modular.model.device import choose_device
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.positions import PositionRule
from janus_modular.processing.processor import Drawing, Processor
from janus_modular.processing.tokenizer_files import compare_vocabularies, vocabulary_problem
from janus_modular.weights.loading import move_buffers
from janus_modular.weights.pretrained import PretrainedReport, resolve_pretrained


@dataclass
class Provenance:
    """Where a model's weights and components come from, as its checkpoint records it."""

    pretrained: list[PretrainedReport] = field(default_factory=list)  # for each component with weights
    plugins: list[Mapping[str, str | None]] = field(default_factory=list)  # that the checkpoint names


class ModelAssembly:
    """A model, the processor that prepares its inputs, and its provenance."""

    def __init__(
        self,
        model: JanusModel,
        processor: Processor | Callable[[], Processor],
        provenance: Provenance | None = None,
    ) -> None:
        """Keep a model and its processor, or a function that makes the processor when it is first used."""
        self.model = model
        self.provenance = provenance or Provenance()
        self._processor = processor

    @cached_property
    def processor(self) -> Processor:
        """The processor."""
        processor = self._processor if isinstance(self._processor, Processor) else self._processor()
        if isinstance(path := self.model.generation, EncodesImages):
            processor.encoded = path.encoded
        return processor

    def move(self, *, device: str | None = None, dtype: str | None = None) -> None:
        """Move the model to a device, and convert its weights to a dtype, in place.

        Raises:
            ConfigError: the device is not available.
            CheckpointError: no model computes in the dtype.
        """
        from janus_modular.checkpoints.native import working_dtype  # which imports this module

        target = next(self.model.parameters()).device if device is None else choose_device(device)
        new_dtype = None if dtype is None else working_dtype(dtype, target, {})
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(target, new_dtype if parameter.is_floating_point() else None)
        move_buffers(self.model, device=target, dtype=new_dtype)

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        plugins: Plugins | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> ModelAssembly:
        """Build the model of a resolved configuration, in float32, and its processor.

        A tokenizer that lacks the tokens of images gets them, and the backbone gets rows for them, which
        text sampling suppresses. On the device ``meta`` the weights have shapes alone, no ``pretrained`` is
        read, and no tokenizer is looked for before ``processor`` is used.

        Raises:
            ConfigError: there is no tokenizer, or a component cannot be built.
            CheckpointError: weights do not fit.
        """
        on_meta = torch.device(device).type == "meta"
        builder = ModelBuilder(plugins or default_plugins(), on_meta=on_meta)
        model = builder.model(config)

        def processor() -> Processor:
            with tokenizer_files(config) as source:
                built = build_processor(model, source)
            if _pretrained_backbone(config):
                check_vocabulary(model, built)
            return built

        assembly = cls(model, processor, Provenance(builder.reports))
        if not on_meta:
            grow_vocabulary(model, assembly.processor)
            record_suppressed(model, assembly.processor)
            model.to(device)
        return assembly

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "auto",
        overrides: Sequence[str] = (),
        plugins: Plugins | None = None,
    ) -> ModelAssembly:
        """Load a checkpoint of any known format: a folder, or a hub id. Needs no more memory than the model.

        ``overrides`` (``a.b=c``) change the model config that was read, for instance the prompt format:
        ``processor.template=janus``. On the device ``meta`` names and shapes of the weights are checked, and
        none is read.

        Raises:
            CheckpointError: the format is unknown, the checkpoint is damaged, or its weights do not fit its
                config.
            PluginError: a plugin that it needs is not installed.
        """
        from janus_modular.checkpoints.opening import open_lazily  # which returns a ModelAssembly

        checkpoint = open_lazily(path, overrides=overrides, plugins=plugins)
        if torch.device(device).type == "meta":
            checkpoint.check_weights()
            return checkpoint
        return checkpoint.load(device=device, dtype=dtype)


def build_processor(model: JanusModel, tokenizer: str | Path | None) -> Processor:
    """Build a model's processor from its config and the files of a tokenizer."""
    return Processor.build(model.config.processor, tokenizer=tokenizer, **processor_sizes(model))


def processor_sizes(model: JanusModel) -> dict[str, Any]:
    """Return the sizes that a processor takes from its model: of images, their positions, the context."""
    path = model.generation
    return {
        "pixels": model.understanding.encoder.pixels,
        "image_tokens": model.understanding.num_tokens,
        "image_tokens_follow_size": model.understanding.tokens_follow_size,
        "drawing": Drawing(path.height, path.width, path.num_tokens, hides_condition(path)),
        "context": model.backbone.context,
        "positions": position_rule(model),
        "together": model.config.together,
    }


def position_rule(model: JanusModel) -> PositionRule | None:
    """Return how a model's sequences get position ids; None where its backbone's positions are a counter."""
    if not isinstance(model.backbone, DeclaresPositions):
        return None
    return PositionRule(list(model.backbone.position_axes), model.understanding.grid or (1, 1))


def hides_condition(path: GenerationPath) -> bool:
    """Return True if no position of a generation path's images sees a dropped condition."""
    return isinstance(path, HidesCondition) and path.hidden_condition


def record_suppressed(model: JanusModel, processor: Processor) -> None:
    """Write the tokens that the processor suppresses in text into the model's config."""
    tokens = list(processor.suppress_tokens)
    model.config.processor = replace(model.config.processor, suppress_tokens=tokens)


def grow_vocabulary(model: JanusModel, processor: Processor) -> None:
    """Extend the backbone's vocabulary by the tokens that were added to its tokenizer for images."""
    if processor.tokenizer.vocab_size > model.backbone.vocab_size:
        model.backbone.resize_vocab(processor.tokenizer.vocab_size)


def check_vocabulary(model: JanusModel, processor: Processor) -> None:
    """Check that a tokenizer's own tokens, without those added for images, have rows in the embedding.

    Raises:
        ConfigError: trained weights have fewer rows: the tokenizer is another model's.
    """
    tokenizer, rows = processor.tokenizer, model.backbone.vocab_size
    own = tokenizer.vocab_size - len(tokenizer.added)
    if own > rows:
        raise ConfigError(
            f"the tokenizer has {own:,} tokens of its own, and the backbone's embedding {rows:,} rows: they"
            " belong to different models. Name the tokenizer of the backbone's weights;"
            " processor.tokenizer=null takes the one beside them."
        )


@contextmanager
def tokenizer_files(config: ModelConfig) -> Iterator[str | Path]:
    """Find the tokenizer of a configuration: named in it, or beside (or inside) the backbone's weights.

    A named tokenizer is compared with the one beside the weights, where there is one.

    Raises:
        ConfigError: there is no tokenizer, or its token ids differ from those of the weights.
    """
    processor, backbone = config.processor, _pretrained_backbone(config)
    if processor.tokenizer is not None:
        name = processor.tokenizer
        path = name if name == "bytes" else resolve_pretrained(name, processor.revision, weights=False)
        with _as_tokenizer_json(path) as source:
            if backbone:
                _check_tokenizer(source, name, backbone, config_path(config, "processor.tokenizer"))
            yield source
    elif backbone is None:
        raise ConfigError(
            "processor.tokenizer is not set, and the backbone has no pretrained weights to find one beside:"
            " processor.tokenizer=FOLDER (with a tokenizer.json), a hub id, or bytes"
        )
    else:
        with _as_tokenizer_json(resolve_pretrained(str(backbone.pretrained), backbone.revision)) as source:
            yield source


def _pretrained_backbone(config: ModelConfig) -> ComponentConfig | None:
    """Return the options of the backbone whose weights come from elsewhere.

    A backbone may wrap another, and its own weights may be adapters: the innermost has the vocabulary.
    """
    backbones = [spec for _, spec in component_specs(config.backbone) if spec.slot == config.backbone.slot]
    return next((spec.config for spec in reversed(backbones) if spec.config.pretrained), None)


def _check_tokenizer(source: str | Path, name: str, backbone: ComponentConfig, path: str) -> None:
    """Compare the tokenizer ``name`` with the one beside the backbone's weights, if there is one."""
    own = resolve_pretrained(str(backbone.pretrained), backbone.revision)
    try:
        with _as_tokenizer_json(own) as own_source:
            differences = compare_vocabularies(source, own_source)
    except ConfigError:
        return  # there is no tokenizer beside the weights
    if differences:
        listed = "; ".join(differences[:3]) + ("; ..." if len(differences) > 3 else "")
        raise ConfigError(
            f"{path}: {name} has other ids for {len(differences):,} tokens than the tokenizer of the"
            f" backbone's weights, {own}: {listed}. The weights would get other tokens than intended:"
            f" {path}=null takes their own."
        )


@contextmanager
def _as_tokenizer_json(path: str | Path) -> Iterator[str | Path]:
    """Yield a path that has a tokenizer.json; transformers writes one for a GGUF or sentencepiece model."""
    if isinstance(path, str) or path.suffix == ".json" or (path / "tokenizer.json").is_file():
        yield path
        return
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        gguf = path.name if path.suffix == ".gguf" else None
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent if gguf else path,
                gguf_file=gguf,
                local_files_only=True,
                trust_remote_code=False,  # None would ask, on a terminal
            )
        except ImportError:
            raise
        except Exception as error:  # transformers' readers and the library in Rust raise any
            problem = (vocabulary_problem(path) if path.is_dir() else "") or reason(error)
            raise ConfigError(
                f"{path} has no tokenizer.json, and transformers could not make one of it: {problem}"
            ) from error
        tokenizer.save_pretrained(folder)
        yield Path(folder)

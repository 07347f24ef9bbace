"""From a configuration to something usable: the model, and the processor that speaks its language."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from janus_modular.config import component_specs
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError
from janus_modular.interfaces import ComponentConfig
from janus_modular.model.build import build_model
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins
from janus_modular.processing.processor import Drawing, Processor
from janus_modular.processing.tokenizer_files import compare_vocabularies
from janus_modular.weights.pretrained import resolve_pretrained


def compose(
    config: ModelConfig, plugins: Plugins | None = None, *, weights: bool = True, root: str = ""
) -> tuple[JanusModel, Processor]:
    """Assemble a resolved configuration, and make the processor that goes with it.

    A tokenizer that lacks the tokens of images gets them, and the backbone gets rows for them, which
    answers in words never use. ``weights=False`` and ``root`` as in `build_model`.

    Raises:
        ConfigError: there is no tokenizer, or a part cannot be built.
        CheckpointError: weights do not fit.
    """
    model = build_model(config, plugins, weights=weights, root=root)
    with tokenizer_files(config, root=root) as source:
        processor = build_processor(model, source)
    if _trained(config):
        check_vocabulary(model, processor)
    grow_vocabulary(model, processor)
    model.config.processor = replace(config.processor, suppress_tokens=list(processor.suppress_tokens))
    return model, processor


def build_processor(model: JanusModel, tokenizer: str | Path | None) -> Processor:
    """Make a model's processor from its config and the files of a tokenizer."""
    return Processor.build(model.config.processor, tokenizer=tokenizer, **processor_sizes(model))


def processor_sizes(model: JanusModel) -> dict[str, Any]:
    """Return what a processor knows of its model: sizes of images, positions that they take, the context."""
    path = model.generation
    return {
        "pixels": model.understanding.encoder.pixels,
        "image_tokens": model.understanding.num_tokens,
        "drawing": Drawing(path.height, path.width, path.num_tokens),
        "context": model.backbone.context,
    }


def grow_vocabulary(model: JanusModel, processor: Processor) -> None:
    """Give the backbone rows for the tokens that it lacks: those that its tokenizer was given for images."""
    if processor.tokenizer.vocab_size > model.backbone.vocab_size:
        model.backbone.resize_vocab(processor.tokenizer.vocab_size)


def check_vocabulary(model: JanusModel, processor: Processor) -> None:
    """Hold a tokenizer's own tokens, those added for images apart, to the rows of the backbone's embedding.

    Raises:
        ConfigError: trained weights have fewer rows: the tokenizer is another model's.
    """
    tokenizer, rows = processor.tokenizer, model.backbone.vocab_size
    own = tokenizer.vocab_size - len(tokenizer.added)
    if own > rows:
        raise ConfigError(
            f"the tokenizer has {own:,} tokens of its own, and the backbone's embedding {rows:,} rows: they"
            " are not of one model. Name the tokenizer of the backbone's weights; processor.tokenizer=null"
            " takes the one beside them."
        )


@contextmanager
def tokenizer_files(config: ModelConfig, *, root: str = "") -> Iterator[str | Path]:
    """Find the tokenizer of a configuration: named in it, or beside (or inside) the backbone's weights.

    One that is named is held to the one beside the weights, where there is one. ``root`` as in `build_model`.

    Raises:
        ConfigError: there is none, or it numbers tokens otherwise than the weights were trained with.
    """
    wanted = config.processor
    trained = _trained(config)
    if wanted.tokenizer is not None:
        named = wanted.tokenizer
        path = named if named == "bytes" else resolve_pretrained(named, wanted.revision)
        with _as_tokenizer_json(path) as source:
            if trained:
                _check_tokenizer(source, named, trained, f"{root}.processor.tokenizer".lstrip("."))
            yield source
    elif trained is None:
        raise ConfigError(
            "processor.tokenizer is not set, and the backbone has no pretrained weights to find one beside:"
            " processor.tokenizer=FOLDER (with a tokenizer.json), a hub id, or bytes"
        )
    else:
        with _as_tokenizer_json(resolve_pretrained(str(trained.pretrained), trained.revision)) as source:
            yield source


def _trained(config: ModelConfig) -> ComponentConfig | None:
    """Return the options of the backbone whose weights come from elsewhere.

    One backbone may wrap another, and its own weights be adapters: the innermost has the vocabulary.
    """
    backbones = [one for _, one in component_specs(config.backbone) if one.slot == config.backbone.slot]
    return next((one.config for one in reversed(backbones) if one.config.pretrained), None)


def _check_tokenizer(source: str | Path, named: str, trained: ComponentConfig, path: str) -> None:
    """Compare a tokenizer that is named with the one beside the backbone's weights, if there is one."""
    own = resolve_pretrained(str(trained.pretrained), trained.revision)
    try:
        with _as_tokenizer_json(own) as beside:
            differences = compare_vocabularies(source, beside)
    except ConfigError:
        return  # the weights bring none: nothing to compare with but the number of tokens
    if differences:
        listed = "; ".join(differences[:3]) + ("; ..." if len(differences) > 3 else "")
        raise ConfigError(
            f"{path}: {named} numbers {len(differences):,} tokens otherwise than the tokenizer of the"
            f" backbone's weights, {own}: {listed}. The weights would read other words than were written:"
            f" {path}=null takes their own."
        )


@contextmanager
def _as_tokenizer_json(path: str | Path) -> Iterator[str | Path]:
    """Yield where a tokenizer.json lies.

    Where there is none, transformers makes one, once: from a GGUF file, a sentencepiece model.
    """
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
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} has no tokenizer.json, and transformers could not make one of it: {error}"
            ) from error
        tokenizer.save_pretrained(folder)
        yield Path(folder)

"""From a configuration to something usable: the model, and the processor that speaks its language."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from janus_modular.assemble import assemble
from janus_modular.checkpoints.pretrained import resolve_pretrained
from janus_modular.config import parts_in
from janus_modular.errors import ConfigError
from janus_modular.model import JanusModel
from janus_modular.plugins import Plugins
from janus_modular.processing.processor import Drawing, Processor
from janus_modular.schema import ModelConfig


def compose(
    config: ModelConfig, plugins: Plugins | None = None, *, weights: bool = True
) -> tuple[JanusModel, Processor]:
    """Assemble a resolved configuration, and make the processor that goes with it.

    A tokenizer that lacks the tokens of pictures gets them, and the backbone gets rows for them, which
    answers in words never use. ``weights=False`` as in `assemble`.

    Raises:
        ConfigError: there is no tokenizer, or a part cannot be built.
        CheckpointError: weights do not fit.
    """
    model = assemble(config, plugins, weights=weights)
    with tokenizer_files(config) as source:
        processor = processor_for(model, source)
    if processor.tokenizer.vocab_size > model.backbone.vocab_size:
        model.backbone.resize_vocab(processor.tokenizer.vocab_size)
    model.config.processor = replace(config.processor, never_said=list(processor.never_said))
    return model, processor


def processor_for(model: JanusModel, tokenizer: str | Path | None) -> Processor:
    """Make a model's processor from its config and the files of a tokenizer."""
    path = model.generation
    return Processor.build(
        model.config.processor,
        pixels=model.understanding.encoder.pixels,
        picture_tokens=model.understanding.num_tokens,
        drawing=Drawing(path.height, path.width, path.num_tokens),
        context=model.backbone.context,
        tokenizer=tokenizer,
    )


@contextmanager
def tokenizer_files(config: ModelConfig) -> Iterator[str | Path]:
    """Find the tokenizer of a configuration: named in it, or beside (or inside) the backbone's weights.

    Where there is no tokenizer.json, transformers makes one, once: from a GGUF file, a sentencepiece model.
    """
    wanted = config.processor
    if wanted.tokenizer == "bytes":
        yield "bytes"
        return
    # One backbone may wrap another, and its own weights be adapters: the innermost has the vocabulary.
    backbones = [one for _, one in parts_in(config.backbone) if one.slot == config.backbone.slot]
    trained = next((one.config for one in reversed(backbones) if one.config.pretrained), None)
    named = wanted.tokenizer or (trained and trained.pretrained)
    if named is None:
        raise ConfigError(
            "processor.tokenizer is not set, and the backbone has no pretrained weights to find one beside:"
            " processor.tokenizer=FOLDER (with a tokenizer.json), a hub id, or bytes"
        )
    revision = trained.revision if trained and not wanted.tokenizer else wanted.revision
    path = resolve_pretrained(named, revision)
    if path.suffix == ".json" or (path / "tokenizer.json").is_file():
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

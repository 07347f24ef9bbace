"""The models that `decoder.py` compares: ours as bundles, a Llama of that shape, and genai's int4 of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai
import torch
from random_checkpoint import write_janus, write_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from janus_export.config import ExportConfig, QuantizeConfig
from janus_export.onnx_export.export import export

CODES = 16_384
SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 16_384,
    "vocab_size": CODES,
}
EXPORTS = {  # bundle -> what it is exported with
    "bundle": ExportConfig(variants=["cpu-int4", "fp32"]),
    "head": ExportConfig(variants=["cpu-int4"], quantize=QuantizeConfig(["backbone", "sample_image"])),
    "large": ExportConfig(
        variants=["cpu-int4"], quantize=QuantizeConfig(["backbone", "sample_image"], block_size=128)
    ),
}


def build(folder: Path, layers: int) -> None:
    """Make what is missing of the models: ours as a bundle, theirs as a Llama and as genai's int4 of it."""
    missing = [name for name in EXPORTS if not (folder / name).exists()]
    if missing and not (folder / "janus").exists():
        backbone = [f"backbone.config.{key}={value}" for key, value in llama(layers).items()]
        small = ["understanding.encoder.layers=1", "generation.tokenizer.channels=32"]  # they take no part
        write_janus("model/janus_pro_1b", [*small, *backbone], "bf16", folder / "janus")
    for name in missing:
        export(folder / "janus", folder / name, EXPORTS[name])
    if not (folder / "llama").exists():
        config = LlamaConfig(**llama(layers), tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        (folder / "llama").mkdir()
        write_weights(model.state_dict(), "bf16", folder / "llama")
        config.save_pretrained(folder / "llama")
        words = Tokenizer(WordLevel({"<s>": 0}, unk_token="<s>"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "llama")
    if not (folder / "genai").exists():
        builder = Path(genai.__file__).parent / "models" / "builder.py"
        folders = ["-i", folder / "llama", "-o", folder / "genai", "-c", folder / "cache"]
        command = [sys.executable, builder, *folders, "-p", "int4", "-e", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"onnxruntime-genai's builder failed:\n{done.stdout}\n{done.stderr}")


def llama(layers: int) -> dict[str, Any]:
    """Return the backbone's shape, as Llama's config says it."""
    return {**SHAPE, "num_hidden_layers": layers}

"""Sampling speed beside transformers: the same weights, the same lengths, one process, turn by turn.

    python bench/sampling.py [--rounds 5] [--size small|1b] [--device cpu|cuda] [--dtype float32]

A Janus with random weights is written in transformers' format and loaded by both. Each answers a prompt
greedily, and each draws under guidance. Times are the best of several rounds; the ratio is the median of
the rounds' own, since a machine that is shared slows both down alike. At ``--size 1b`` it is Janus-Pro-1B's
shape, and takes 8 GB on disk in float32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from transformers import JanusForConditionalGeneration

from janus_modular import Janus
from janus_modular.checkpoints import ModelAssembly, save_as
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_plugins.samplers.autoregressive import DrawSettings, draw
from janus_plugins.samplers.text import TextSettings, sample_text

WORDS, SIDE = 64, 128  # tokens of an answer; pixels of an image, 8 x 8 codes
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}


def model(size: str, dtype: torch.dtype, folder: Path) -> None:
    """Write a Janus with random weights that transformers can load too."""
    torch.manual_seed(0)
    speech = {"tokenizer": "bytes", "template": "janus"}
    if size == "1b":
        raw = {**load("model/janus_pro_1b"), "processor": speech}
        assembly = ModelAssembly.from_config(resolve(raw, ModelConfig))
    else:
        pixels = {"height": SIDE, "width": SIDE}
        siglip = {"feature_dim": 64, "layers": 1, "heads": 4, "intermediate": 128, "image_size": SIDE}
        llama = {"model_type": "llama", "vocab_size": 8_000, "max_position_embeddings": 1024}
        janus = Janus.from_components(
            encoder={"name": "siglip", **siglip, "pixels": pixels},
            tokenizer={"name": "llamagen", "channels": 32, "num_codes": 4096},
            backbone={"name": "hf", "config": {**llama, **SIZES, "tie_word_embeddings": False}},
            size=SIDE,
            processor=speech,
        )
        assembly = janus.assembly
    assembly.model.to(dtype)
    save_as("transformers", assembly, folder)


def contestants(janus: Janus, theirs: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return what is timed, by task and by who does it."""
    prompt = janus.processor.draw_prompt("an image of something that nobody has ever seen before")
    ids = torch.from_numpy(np.asarray(prompt.tokens))[None].to(theirs.device)
    drawn = janus.model.generation.num_tokens
    common = {
        "attention_mask": torch.ones_like(ids),
        "eos_token_id": None,
        "pad_token_id": janus.processor.pad_id,
    }

    def answer() -> None:
        session = janus.runtime.open(max_seq_len=len(prompt) + WORDS)
        for _ in sample_text(session, [prompt], TextSettings(max_tokens=WORDS)):
            pass

    def paint() -> None:
        session = janus.runtime.open(max_seq_len=len(prompt) + drawn)
        for _ in draw(session, [prompt], DrawSettings(guidance=5.0)):
            pass

    def their_answer() -> None:
        theirs.generate(
            ids, generation_mode="text", max_new_tokens=WORDS, min_new_tokens=WORDS, do_sample=False, **common
        )

    def their_paint() -> None:
        codes = theirs.generate(
            ids, generation_mode="image", guidance_scale=5.0, do_sample=True, top_k=0, **common
        )
        with torch.inference_mode():
            theirs.decode_image_tokens(codes)

    return {
        f"answer, {WORDS} tokens": {"janus-modular": answer, "transformers": their_answer},
        f"draw, {drawn} codes, guidance 5": {"janus-modular": paint, "transformers": their_paint},
    }


def seconds(run: Callable[[], Any]) -> float:
    """Time one run, to its end on a GPU too."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=("small", "1b"), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args()
    rounds, dtype = arguments.rounds, getattr(torch, arguments.dtype)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model(arguments.size, dtype, folder)
        janus = Janus.from_pretrained(folder, device=arguments.device, dtype=arguments.dtype)
        theirs = (
            JanusForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(arguments.device)
        )
        tasks = contestants(janus, theirs)
    where = torch.cuda.get_device_name(arguments.device) if theirs.device.type == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {where}, {arguments.dtype}, {torch.get_num_threads()} threads\n")
    print("| task | janus-modular, s | transformers, s | ratio |\n| --- | ---: | ---: | ---: |")
    for task, runs in tasks.items():
        for run in runs.values():
            run()  # warm up
        times = [{who: seconds(run) for who, run in runs.items()} for _ in range(rounds)]
        ours, theirs = (min(one[who] for one in times) for who in runs)
        ratio = median(one["transformers"] / one["janus-modular"] for one in times)
        print(f"| {task} | {ours:.2f} | {theirs:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()

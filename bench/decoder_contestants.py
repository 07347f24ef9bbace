"""The contestants of `decoder.py`: each makes steps and yields the time of each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime_genai as genai
import torch
from decoder_models import CODES
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from janus_export.bench.bytes_read import multiplied, read_by
from janus_export.runtimes.ort.binding import Binding
from janus_export.runtimes.ort.runtime import OnnxConfig, OnnxRuntime
from janus_modular.processing.processor import Processor
from janus_plugins.samplers.autoregressive import DrawSettings, draw

CONTEXTS = (64, 600)
CAPACITIES = (704, 4096)  # capacities of our sessions, in positions
EAGER, SDPA = "transformers generate, eager, fp32", "transformers generate, sdpa, fp32"
GENAI, INT4, FP32 = "onnxruntime-genai, int4", "ours, int4", "ours, fp32"
WIDE, HEAD, LARGE = (
    f"{INT4}, capacity {CAPACITIES[1]}",
    f"{INT4}, head too",
    f"{INT4}, head too, blocks of 128",
)
OURS = (  # who, bundle, variant, positions that a session is opened for
    (INT4, "bundle", "cpu-int4", CAPACITIES[0]),
    (WIDE, "bundle", "cpu-int4", CAPACITIES[1]),
    (HEAD, "head", "cpu-int4", CAPACITIES[0]),
    (LARGE, "large", "cpu-int4", CAPACITIES[0]),
    (FP32, "bundle", "fp32", CAPACITIES[0]),
)


@dataclass
class Contestant:
    """A benchmarked implementation and its timings."""

    who: str
    context: int
    steps: Callable[[int], list[float]]  # runs so many steps; returns the seconds of each
    weights: int  # bytes that a step reads
    session: Any = None  # of ours: the backbone's
    times: list[float] = field(default_factory=list)
    backbones: list[float] = field(default_factory=list)  # of ours: what a step spent in the backbone
    outside: list[float] = field(default_factory=list)  # of ours: the share of a step outside of all graphs

    def timings(self) -> tuple[int, int, int]:
        """Return how many timings there are, for `forget`."""
        return len(self.times), len(self.backbones), len(self.outside)

    def forget(self, counts: tuple[int, int, int]) -> None:
        """Remove the timings beyond these counts."""
        for timings, count in zip((self.times, self.backbones, self.outside), counts, strict=True):
            del timings[count:]

    @property
    def step(self) -> float:
        """The median seconds of a step."""
        return median(self.times)


class Stopwatch:
    """Times what ONNX Runtime does for us, in place of `Binding.run`."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}  # by session
        run = Binding.run

        def timed(binding: Binding) -> None:
            start = time.perf_counter()
            run(binding)
            took = time.perf_counter() - start
            self.seconds[id(binding.session)] = self.seconds.get(id(binding.session), 0.0) + took

        Binding.run = timed  # type: ignore[method-assign]

    def watch(self, one: Contestant, count: int) -> None:
        """Time `count` steps of a contestant; of this project's decoder, also each step's graphs."""
        if one.session is None:
            one.times += one.steps(count)
            return
        for _ in range(count):
            self.seconds.clear()
            (step,) = one.steps(1)
            one.times.append(step)
            one.backbones.append(self.seconds[id(one.session)])
            one.outside.append(1 - sum(self.seconds.values()) / step)


def each_timed(step: Callable[[], Any]) -> Callable[[int], list[float]]:
    """Return a function that runs so many steps and returns the seconds of each."""

    def steps(count: int) -> list[float]:
        stamps = [time.perf_counter()]
        for _ in range(count):
            step()
            stamps.append(time.perf_counter())
        return np.diff(stamps).tolist()

    return steps


def bundle_contestants(folder: Path, images: int, threads: int) -> Iterator[Contestant]:
    """Yield contestants that draw images code by code, after prompts of the contexts' lengths."""
    runtimes: dict[tuple[str, str], OnnxRuntime] = {}
    for who, bundle, variant, max_seq_len in OURS:
        processor = Processor.load(folder / bundle)
        empty = len(processor.draw_prompt(""))
        if (bundle, variant) not in runtimes:
            config = OnnxConfig(variant, "cpu", threads=threads)
            runtimes[bundle, variant] = OnnxRuntime(config, folder / bundle)
        runtime = runtimes[bundle, variant]
        weights = sum(multiplied(runtime.bundle, graph, variant) for graph in ("backbone", "sample_image"))
        for context in CONTEXTS:
            prompt = processor.draw_prompt("x" * (context - empty))
            drawing = draw(runtime.open(max_seq_len), [prompt] * images, DrawSettings())
            next(drawing)  # reads the prompt
            steps = each_timed(lambda drawing=drawing: next(drawing))
            yield Contestant(who, context, steps, weights, runtime.graph("backbone").session)


class Stamps(LogitsProcessor):
    """Records when `generate` has the logits of a token."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Record the time."""
        self.at.append(time.perf_counter())
        return scores


def transformers_generate(folder: Path, rows: int) -> Iterator[Contestant]:
    """Yield contestants that decode greedily with transformers' `generate`."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tables = model.get_input_embeddings().weight
    weights = sum(one.nbytes for one in model.parameters() if one is not tables)
    for context in CONTEXTS:
        cache, ids = DynamicCache(), torch.randint(0, CODES, (rows, context + 1))
        with torch.no_grad():
            model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
        for who, attention in ((EAGER, "eager"), (SDPA, "sdpa")):

            def steps(
                count: int, cache: Any = cache, ids: Any = ids, attention: str = attention
            ) -> list[float]:
                model.set_attn_implementation(attention)
                stamps = Stamps()
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=cache,
                    max_new_tokens=count + 1,
                    do_sample=False,
                    logits_processor=LogitsProcessorList([stamps]),
                    eos_token_id=None,
                    pad_token_id=0,
                )
                cache.crop(ids.shape[1] - 1 - cache.get_seq_length())
                return np.diff(stamps.at).tolist()

            yield Contestant(who, context, steps, weights)


def genai_generate(folder: Path, rows: int, threads: int) -> Iterator[Contestant]:
    """Yield contestants that decode greedily with onnxruntime-genai and its own int4 model."""
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)
    weights = read_by(folder / "model.onnx")
    for context in CONTEXTS:
        params = genai.GeneratorParams(model)
        params.set_search_options(
            batch_size=rows, max_length=CAPACITIES[0], min_length=CAPACITIES[0], do_sample=False
        )
        generator = genai.Generator(model, params)
        generator.append_tokens(np.random.default_rng(0).integers(0, CODES, (rows, context), np.int32))
        generator.generate_next_token()
        steps = each_timed(generator.generate_next_token)
        yield Contestant(GENAI, context, steps, weights)

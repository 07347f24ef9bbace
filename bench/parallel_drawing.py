"""Drawing several codes in a pass, beside drawing them one by one: passes, and what a pass costs.

    python bench/parallel_drawing.py [MODEL ...] [--rounds 5] [--layers 8]
    python bench/parallel_drawing.py MODEL --layers 0 [--images 20] [--dtype bfloat16] [--windows 2 4 8]

The first table is of a Janus with random weights (hidden size 1024), in torch and as a bundle in ONNX
Runtime, fp32 and cpu-int4: what a pass over W codes of an image costs beside a pass over one, with guidance.
The second table is of MODEL, trained checkpoints: passes for an image, how many codes a pass confirms, and
equal images.
Candidates take turns in one process; ratios are medians over the rounds, of time and of processor time.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_modular import Janus, SessionWrapper, unconditional
from janus_modular.checkpoints import save
from janus_modular.config import load, resolve
from janus_plugins.samplers import autoregressive, parallel

WIDTHS = (1, 2, 4, 8, 16)
PROMPT = "Draw the digit seven."
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def random_model(layers: int) -> Janus:
    """Build a Janus with random weights, about 12 million in each layer of its decoder."""
    torch.manual_seed(0)
    decoder = {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
    }
    vit = {"name": "vit", "feature_dim": 32, "layers": 1, "heads": 2, "stem": [8, 16, 32]}
    return Janus.from_components(
        encoder={**vit, "pixels": {"height": 32, "width": 32}},
        tokenizer={"name": "vq", "channels": [8, 16, 32], "num_codes": 4096, "code_dim": 8},
        backbone={"name": "hf", "config": {
            **decoder, "num_hidden_layers": layers, "vocab_size": 320, "max_position_embeddings": 512}},
        size=32,
        processor={"tokenizer": "bytes", "template": "plain"},
    )  # fmt: skip


def passes_of(janus: Janus) -> dict[int, Callable[[], Any]]:
    """Return a pass over W codes of one image under guidance, by W: backbone, head, and choice."""
    prompt = janus.processor.draw_prompt(PROMPT)
    session = janus.runtime.open(len(prompt) + session_positions(janus))
    session.prefill([prompt, unconditional(prompt, janus.processor.pad_id)])
    start, codes = session.lengths, session.sizes["codes"]
    rng = np.random.default_rng(0)

    def once(width: int) -> None:
        x = session.run("embed_codes", rng.integers(0, codes, (2, width)))
        states = session.take(session.extend(x), np.arange(2 * width))
        noise = rng.standard_exponential((width, codes), np.float32) + 1e-6
        session.to_host(session.run("sample_image", states, noise, np.float32(5), np.float32(1))[0])
        session.truncate(start)

    return {width: lambda width=width: once(width) for width in WIDTHS}


def session_positions(janus: Janus) -> int:
    """Return the positions of an image."""
    assert janus.processor.drawing is not None
    return janus.processor.drawing.num_tokens


def timed(run: Callable[[], Any], repeat: int = 4) -> tuple[float, float]:
    """Return the time and the processor time of some runs."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(repeat):
        run()
    return time.perf_counter() - wall, time.process_time() - processor


def costs(janus: Janus, rounds: int) -> tuple[list[float], list[float]]:
    """Return the cost of a pass by width, in passes over one code: time and processor time."""
    passes = passes_of(janus)
    for run in passes.values():
        run()  # allocates, and binds
    times = [{width: timed(run) for width, run in passes.items()} for _ in range(rounds)]
    by_clock = [
        [median(one[width][clock] / one[1][clock] for one in times) for width in WIDTHS] for clock in (0, 1)
    ]
    return by_clock[0], by_clock[1]


@contextmanager
def runtimes(layers: int) -> Iterator[dict[str, Janus]]:
    """Yield the random model in torch, and its bundle in ONNX Runtime in two precisions."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary:
        folder, bundle = Path(temporary) / "model", Path(temporary) / "bundle"
        janus = random_model(layers)
        save(janus.assembly, folder)
        export(folder, bundle, resolve(load("export/cpu", ["only=[drawing]"]), ExportConfig))
        opened = {
            f"ONNX Runtime, {variant}": Janus.from_pretrained(
                bundle, variant=variant, runtime={"name": "onnx", "threads": threads}, allow_failed=True
            )
            for variant in ("fp32", "cpu-int4")
        }
        yield {"torch, float32": janus, **opened}


class Passes(SessionWrapper):
    """Keeps how many codes each pass confirmed."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        self.confirmed: list[np.ndarray] = []  # (rows,) of each pass

    def extend(self, x: Any, counts: Any = None) -> Any:
        self.before = self.lengths
        return super().extend(x, counts)

    def truncate(self, lengths: Any) -> None:
        self.confirmed.append(np.asarray(lengths) - self.before)
        super().truncate(lengths)


def draw(janus: Janus, settings: Any, count: int) -> tuple[np.ndarray, Passes]:
    """Draw digits; return the codes (N, P), and the passes."""
    prompts = [janus.processor.draw_prompt(f"Draw the digit {DIGITS[i % 10]}.") for i in range(count)]
    session = Passes(janus.runtime.open(max(map(len, prompts)) + session_positions(janus)))
    sampler = parallel if isinstance(settings, parallel.ParallelSettings) else autoregressive
    steps = sampler.draw(session, prompts, settings)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value.encoded, session


def changed(codes: np.ndarray, expected: np.ndarray) -> float:
    """Return the share of codes (N, P) that differ though all before them are equal."""
    same = (codes == expected).reshape(len(codes), codes.shape[1], -1).all(-1)
    equal_before = np.cumprod(same, axis=1).sum() + (~same.all(1)).sum()  # codes up to a first difference
    return float((~same.all(1)).sum() / equal_before)


def acceptance(path: str, count: int, dtype: str, windows: Sequence[int]) -> None:
    """Print passes and confirmed codes of a trained model's drawings."""
    janus = Janus.from_pretrained(path, device="cpu", dtype=dtype)
    positions = session_positions(janus)
    for guidance, temperature in ((1.0, 1.0), (2.0, 0.7), (5.0, 1.0)):
        common = {"guidance": guidance, "temperature": temperature}
        expected, _ = draw(janus, autoregressive.DrawSettings(**common), count)
        for window in windows:
            for drafts in ("left", "above"):
                settings = parallel.ParallelSettings(**common, window=window, drafts=drafts)
                codes, session = draw(janus, settings, count)
                confirmed = np.stack(session.confirmed)[:, :count]  # (passes, images)
                active = confirmed > 0
                shares = [(confirmed > j).sum() / active.sum() for j in range(1, min(window, 5))]
                equal = (codes == expected).reshape(count, -1).all(1).mean()
                print(
                    f"| {path} | {guidance:g}, {temperature:g} | {window} | {drafts} | {positions} |"
                    f" {1 + active.sum() / count:.1f} | {', '.join(f'{share:.2f}' for share in shares)} |"
                    f" {equal:.3f} | {changed(codes, expected):.1e} |",
                    flush=True,
                )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--layers", type=int, default=8, help="of the random model; 0: leave it out")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.0f}\n")
    if arguments.layers:
        print(f"| runtime | clock | {' | '.join(f'W = {width}' for width in WIDTHS)} |")
        print(f"| --- | --- |{' ---: |' * len(WIDTHS)}")
        with runtimes(arguments.layers) as opened:
            for name, janus in opened.items():
                for clock, ratios in zip(
                    ("time", "processor time"), costs(janus, arguments.rounds), strict=True
                ):
                    print(
                        f"| {name} | {clock} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True
                    )
    if arguments.models:
        print(
            "\n| model | guidance, temperature | W | drafts | codes | passes | further codes confirmed"
            " | equal images | changed codes |"
        )
        print("| --- | --- | ---: | --- | ---: | ---: | --- | ---: | ---: |")
        for path in arguments.models:
            acceptance(path, arguments.images, arguments.dtype, arguments.windows)


if __name__ == "__main__":
    main()

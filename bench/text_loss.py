"""Peak memory of the text loss of a large vocabulary, with its logits whole or in chunks.

    python bench/text_loss.py --positions 6144

Each case runs in a process of its own, forward and backward, on random numbers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from types import SimpleNamespace
from typing import Any

import torch

from janus_modular.model import model as janus_model

WHOLE = 2**60


def peak(limit: int, vocabulary: int, hidden_size: int, positions: int) -> float:
    """Return the memory in GB of a loss and its backward pass, with at most ``limit`` logits at once."""
    torch.set_num_threads(1)
    janus_model.MAX_LOGITS = limit
    head = torch.nn.Linear(hidden_size, vocabulary, bias=False)
    model: Any = SimpleNamespace(backbone=SimpleNamespace(logits=head, vocab_size=vocabulary))
    model._text_losses = lambda hidden, labels: janus_model.JanusModel._text_losses(model, hidden, labels)
    model.text_losses = lambda hidden, labels: janus_model.JanusModel.text_losses(model, hidden, labels)
    hidden = torch.randn(1, positions, hidden_size, requires_grad=True)
    batch: Any = SimpleNamespace(labels=torch.randint(vocabulary, (1, positions)), label_source=None)
    output: Any = SimpleNamespace(hidden=hidden, losses={}, sources={})
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    janus_model.JanusModel._text_loss(model, output, batch)
    output.losses["text"].mean().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1e6


def main() -> None:
    """Print both peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=102_400)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--positions", type=int, default=6144)
    arguments = parser.parse_args()
    sizes = arguments.vocabulary, arguments.hidden_size, arguments.positions
    for name, limit in (("whole", WHOLE), ("chunks", janus_model.MAX_LOGITS)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(f"{name}: {pool.apply(peak, (limit, *sizes)):.2f} GB")


if __name__ == "__main__":
    main()

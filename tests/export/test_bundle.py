"""A bundle is what its manifest says, or it is refused."""

from __future__ import annotations

from pathlib import Path

from janus_export.bundle import load_bundle


def test_a_fresh_bundle_loads_and_names_its_graphs(tiny_bundle: Path):
    bundle = load_bundle(tiny_bundle)
    bundle.verify_weights()
    assert list(bundle.graphs) == [
        "understand", "embed", "backbone", "text_next", "image_next", "draw", "tokenize_image",
    ]  # fmt: skip

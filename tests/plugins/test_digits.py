"""The digits: a fixed, fair split, and samples that depend on nothing but their index and their chance."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from janus_modular import ImageInput, ImageTarget, Sample, Text
from janus_plugins.sources.digits import NAMES, Digits, DigitsConfig

SPLITS = ("train", "validation", "test")


def words(sample: Sample) -> list[str]:
    return [s.text for m in sample.messages for s in m.content if isinstance(s, Text)]


def test_every_scan_is_in_one_split() -> None:
    splits = [Digits(DigitsConfig(split=split, size=8)) for split in SPLITS]
    assert sum(map(len, splits)) == len(load_digits().target)
    counts = np.stack([np.bincount(one.labels) for one in splits])
    assert (counts.sum(0) == np.bincount(load_digits().target)).all()
    share = counts / counts.sum(1, keepdims=True)
    assert np.ptp(share, axis=0).max() < 0.005  # stratified: as even as whole numbers allow
    seen = [{one.tobytes() for one in split.images} for split in splits]
    assert all(len(a & b) <= 1 for i, a in enumerate(seen) for b in seen[:i])  # the data has near-twins


def test_images_show_their_label() -> None:
    """Shrunk to 8 x 8 again, inked: the scan they came from, found by the nearest neighbour."""
    digits = Digits(DigitsConfig(split="test"))
    scans, labels = load_digits(return_X_y=True)
    small = np.stack([np.asarray(one.crop((2, 2, 30, 30)).resize((8, 8))).ravel() for one in digits.images])
    ink = (255 - small.astype(float)) / 255 * 16
    found = labels[((ink[:, None] - scans[None]) ** 2).sum(-1).argmin(1)]
    assert (found == digits.labels).mean() > 0.99


@pytest.mark.parametrize("kind", ["draw", "read", "text"])
def test_samples_can_be_had_again(kind: str) -> None:
    digits = Digits(DigitsConfig(task=kind))
    one, again, other = (digits.sample(7, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert words(one) == words(again)
    if kind != "text":
        images = [image(sample).tobytes() for sample in (one, again, other)]
        assert images[0] == images[1] != images[2]


def image(sample: Sample) -> object:
    return next(
        s.image for m in sample.messages for s in m.content if isinstance(s, ImageTarget | ImageInput)
    )


def test_kinds() -> None:
    rng = np.random.default_rng(0)
    name = NAMES[Digits(DigitsConfig()).labels[0]]
    drawn = Digits(DigitsConfig(task="draw")).sample(0, rng)
    assert isinstance(drawn.messages[1].content[0], ImageTarget)
    read = Digits(DigitsConfig(task="read")).sample(0, rng)
    assert isinstance(read.messages[0].content[0], ImageInput)
    assert read.messages[1].content == [Text(f"It is {name}.", supervised=True)]
    text = Digits(DigitsConfig(task="text")).sample(0, rng)
    assert not text.template
    assert text.messages[0].content[0].supervised


def test_prompts_differ_and_name_the_digit() -> None:
    digits, rng = Digits(DigitsConfig()), np.random.default_rng(0)
    prompts = {digits.prompt(3, rng) for _ in range(100)}
    assert len(prompts) >= 6
    assert all("three" in one or "3" in one for one in prompts)


def test_unchanged_where_nothing_is_augmented() -> None:
    digits = Digits(DigitsConfig(task="read", augment=0))
    assert image(digits.sample(5, np.random.default_rng(0))) is digits.images[5]

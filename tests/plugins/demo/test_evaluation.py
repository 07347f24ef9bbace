"""The demo's metrics against scikit-learn's, and computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, pairwise_distances

from janus_plugins.demo.evaluation import (
    confusion,
    distances,
    diversity,
    named_class,
    nearest_distance,
    psnr,
    to_grey,
)

RNG = np.random.default_rng(0)
SOME, OTHERS = RNG.random((9, 12), np.float32), RNG.random((7, 12), np.float32)


def test_distances() -> None:
    np.testing.assert_allclose(distances(SOME, OTHERS), pairwise_distances(SOME, OTHERS), rtol=1e-4)


def test_diversity_is_the_mean_over_pairs_of_a_class() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 0, 1])
    by_class = []
    for label in (0, 1):
        of_class = pairwise_distances(SOME[labels == label])
        by_class.append(of_class[np.triu_indices(len(of_class), 1)].mean())
    # float32, distances by the binomial formula: 1e-3 of a distance to itself, which is 0
    assert diversity(SOME, labels) == pytest.approx(np.mean(by_class), rel=1e-3)


def test_nearest() -> None:
    assert nearest_distance(SOME, OTHERS) == pytest.approx(
        pairwise_distances(SOME, OTHERS).min(1).mean(), rel=1e-4
    )
    assert nearest_distance(SOME, SOME) < 1e-3


def test_psnr_of_a_known_error() -> None:
    assert psnr(SOME, SOME + np.float32(0.1)) == pytest.approx(20.0, rel=1e-3)  # 10 log10(1 / 0.01)


def test_to_grey() -> None:
    grey = Image.fromarray(np.array([[0, 255], [51, 102]], np.uint8))
    np.testing.assert_allclose(to_grey([grey, grey.convert("RGB")]), [[0, 1, 0.2, 0.4]] * 2)


@pytest.mark.parametrize(
    ("answer", "found"),
    [("It is two.", 1), ("TWO", 1), ("one or two", None), ("", None), ("someone", None), ("one, one", 0)],
)
def test_named_class(answer: str, found: int | None) -> None:
    assert named_class(answer, ["one", "two"]) == found


def test_confusion() -> None:
    truth, found = np.array([0, 1, 1, 2]), [0, 1, 0, None]
    table = confusion(truth, found, 3)
    assert table[:, 3].tolist() == [0, 0, 1]
    np.testing.assert_array_equal(table[:, :3], confusion_matrix(truth[:3], found[:3], labels=[0, 1, 2]))

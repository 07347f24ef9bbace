from __future__ import annotations

import numpy as np
import pytest
import torch

from janus_modular import IGNORE_INDEX, PromptError, Sequence
from janus_modular.model.batch import collate, pack


def sequence(length: int, *, read: int = 0, drawn: int = 0, source: str = "", first: int = 1) -> Sequence:
    """Words, with images of two places each right after the first word."""
    understanding_mask, generation_mask = np.zeros(length, np.bool_), np.zeros(length, np.bool_)
    understanding_mask[1 : 1 + 2 * read] = True
    generation_mask[1 + 2 * read : 1 + 2 * (read + drawn)] = True
    return Sequence(
        tokens=np.arange(first, first + length),
        labels=np.where(
            np.arange(length) < length - 1, np.arange(first + 1, first + length + 1), IGNORE_INDEX
        ),
        understanding_mask=understanding_mask,
        generation_mask=generation_mask,
        understanding_pixels=[np.full((3, 4, 4), first + i, np.uint8) for i in range(read)],
        generation_images=[np.full((3, 2, 2), first + i, np.uint8) for i in range(drawn)],
        generation_supervised=[i == 0 for i in range(drawn)],
        source=source,
    )


def test_packing_loses_nothing_and_overfills_nothing() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    rows = pack([sequence(int(n)) for n in lengths], 64)
    assert sorted(len(one) for row in rows for one in row) == sorted(lengths)
    filled = [sum(map(len, row)) for row in rows]
    assert max(filled) <= 64
    # First fit, longest first, needs at most 11/9 of the best number of rows, and 6/9 more (Dosa, 2007).
    assert len(rows) <= 11 / 9 * np.ceil(lengths.sum() / 64) + 6 / 9 + 1


def test_a_sequence_longer_than_a_row_is_named() -> None:
    with pytest.raises(PromptError, match=r"sequence of 9 positions.*rows of 8 \(source 'pairs'\)"):
        pack([sequence(9, source="pairs")], 8)


def test_positions_restart_at_every_sequence_and_at_the_padding() -> None:
    batch = collate([[sequence(3), sequence(2)], [sequence(1)], [sequence(4)]], pad=7)
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3], [0, 1, 2, 3, 0]]
    assert batch.tokens.tolist() == [[1, 2, 3, 1, 2], [1, 7, 7, 7, 7], [1, 2, 3, 4, 7]]
    assert batch.labels.tolist()[0] == [2, 3, IGNORE_INDEX, 2, IGNORE_INDEX]
    assert batch.labels.tolist()[1] == [IGNORE_INDEX] * 5
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [5, 1, 4]


def test_images_keep_the_order_of_their_places() -> None:
    rows = [
        [sequence(8, read=1, first=10), sequence(9, read=1, drawn=2, first=20)],
        [sequence(5, drawn=1, first=30)],
    ]
    batch = collate(rows)
    assert batch.understanding_pixels is not None
    assert batch.generation_pixels is not None
    assert batch.generation_supervised is not None
    assert batch.understanding_pixels[:, 0, 0, 0].tolist() == [10, 20]
    assert batch.generation_pixels[:, 0, 0, 0].tolist() == [20, 21, 30]
    assert batch.generation_supervised.tolist() == [True, False, True]
    assert int(batch.understanding_mask.sum()) == 2 * 2
    assert batch.understanding_mask[0].nonzero().flatten().tolist() == [1, 2, 9, 10]
    assert batch.generation_mask[0].nonzero().flatten().tolist() == [11, 12, 13, 14]


def test_sources_are_kept_for_words_and_images() -> None:
    batch = collate([[sequence(3, source="text"), sequence(5, drawn=1, source="draw")]])
    assert batch.sources == ["draw", "text"]
    assert batch.label_source is not None
    assert batch.image_source is not None
    assert batch.label_source.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.image_source.tolist() == [0]


def test_a_batch_of_words_has_no_images() -> None:
    batch = collate([sequence(3), sequence(2)])
    assert batch.understanding_pixels is None
    assert batch.generation_pixels is None


def test_moving_leaves_nothing_behind_and_the_first_as_it_was() -> None:
    batch = collate([sequence(8, read=1, drawn=1, source="a")])
    moved = batch.to("meta")
    assert all(v.is_meta for v in vars(moved).values() if isinstance(v, torch.Tensor))
    assert moved.sources == ["a"]
    assert not batch.tokens.is_meta

"""Sampling ids: the exponential race against torch's multinomial, top-k and top-p against transformers."""

import pytest
import torch
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from janus_modular.model.sampling import sample_with_noise, top_k_top_p_filter


def test_pick_follows_the_distribution() -> None:
    """10,000 draws: a frequency strays from p by at most 4 standard deviations, sqrt(p (1 - p) / n)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    p = logits.softmax(-1)
    n = 10_000
    noise = torch.empty(n, 4).exponential_(generator=generator)
    frequency = sample_with_noise(logits.expand(n, 4), noise).bincount(minlength=4) / n
    assert ((frequency - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


def test_noise_of_ones_takes_the_most_likely() -> None:
    logits = torch.randn(5, 99, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_with_noise(logits, torch.ones(5, 99)), logits.argmax(-1))


def test_what_has_no_chance_is_never_picked() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 0.0]]).expand(500, 3)
    noise = torch.empty(500, 3).exponential_(generator=torch.Generator().manual_seed(0))
    assert 1 not in sample_with_noise(logits, noise)


@pytest.mark.parametrize("is_greedy", [True, False])
def test_noise_divided_by_the_exponential_of_a_bias_adds_it_to_the_logits(is_greedy: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(500, 9, generator=generator, dtype=torch.float64)
    noise = torch.ones(500, 9) if is_greedy else torch.empty(500, 9).exponential_(generator=generator)
    bias = torch.tensor([2.0, -3.0, 0, 0, 0, 0, 0, 0, 0])
    chosen = sample_with_noise(logits, noise / bias.exp())
    assert torch.equal(chosen, sample_with_noise(logits + bias, noise))
    assert not torch.equal(chosen, sample_with_noise(logits, noise))


@pytest.mark.parametrize("limits", [(0, 1.0), (2, 1.0)])
def test_large_noise_forbids_an_id_unless_the_limits_keep_no_other(limits: tuple[int, float]) -> None:
    logits = torch.tensor([[9.0, 60.0, 8.0, 50.0]])
    noise = torch.ones(1, 4)
    noise[:, [1, 3]] = 1e30
    expected = 0 if limits == (0, 1.0) else 1
    assert sample_with_noise(top_k_top_p_filter(logits, *limits), noise).item() == expected


@pytest.mark.parametrize("k", [1, 5, 200])
def test_top_k_is_transformers(k: int) -> None:
    logits = torch.randn(4, 99, generator=torch.Generator().manual_seed(1))
    assert torch.equal(top_k_top_p_filter(logits, top_k=k), TopKLogitsWarper(k)(torch.empty(0), logits))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.7, 0.99])
def test_top_p_is_transformers(p: float) -> None:
    logits = 3 * torch.randn(4, 99, generator=torch.Generator().manual_seed(2))
    assert torch.equal(top_k_top_p_filter(logits, top_p=p), TopPLogitsWarper(p)(torch.empty(0), logits))


def test_top_p_is_taken_of_the_top_k() -> None:
    logits = 3 * torch.randn(4, 99, generator=torch.Generator().manual_seed(4))
    expected = TopPLogitsWarper(0.8)(torch.empty(0), TopKLogitsWarper(7)(torch.empty(0), logits))
    assert torch.equal(top_k_top_p_filter(logits, 7, 0.8), expected)


def test_a_large_vocabulary_is_cut_where_a_sort_would_cut_it() -> None:
    """102,400 logits lie closer than float32 sums are exact: the last that is kept may be its neighbour."""
    logits = 3 * torch.randn(2, 102_400, generator=torch.Generator().manual_seed(5))
    assert torch.equal(top_k_top_p_filter(logits, top_k=50), TopKLogitsWarper(50)(torch.empty(0), logits))
    kept = (top_k_top_p_filter(logits, top_p=0.9) > float("-inf")).sum(-1)
    expected = (TopPLogitsWarper(0.9)(torch.empty(0), logits) > float("-inf")).sum(-1)
    assert (kept - expected).abs().max() <= 2


def test_of_equals_all_stay() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert (top_k_top_p_filter(logits, top_k=2) > 0).sum() == 3


def test_what_has_no_chance_takes_no_place() -> None:
    """Forbidden ids are at -inf before anything is cut."""
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf"), 0.0]])
    assert torch.equal(top_k_top_p_filter(logits, top_k=3, top_p=0.999), logits)


def test_no_limit_changes_nothing() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(top_k_top_p_filter(logits), logits)

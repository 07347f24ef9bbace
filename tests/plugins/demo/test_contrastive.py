"""Contrastive training of an encoder: images are matched with their captions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from janus_plugins.demo.networks import Contrastive


class Greys(nn.Module):
    """The least encoder: one feature, the mean of each channel."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3))[:, None]  # (N, 1, 3)


def batch(count: int = 24) -> tuple[Tensor, Tensor, list[str]]:
    labels = torch.arange(count) % 3
    pixels = torch.nn.functional.one_hot(labels, 3).float()[:, :, None, None].expand(-1, -1, 4, 4)
    return pixels, labels, [f"Draw {('red', 'green', 'blue')[int(label)]}." for label in labels]


def test_training_matches_images_and_captions() -> None:
    torch.manual_seed(0)
    contrastive = Contrastive(Greys(), 3, lambda pixels: pixels)
    optimizer = torch.optim.Adam(contrastive.parameters(), 0.05)
    first = None
    for _ in range(60):
        loss = contrastive.losses(batch())["pairs"]
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first
    pixels, labels, _ = batch(3)
    captions = ["Draw red.", "please GREEN", "a blue"]  # words decide, wherever they stand
    found = (contrastive.embed_images(pixels) @ contrastive.embed_captions(captions).T).argmax(-1)
    assert found.tolist() == labels.tolist()


def test_the_loss_is_binary_cross_entropy_over_pairs() -> None:
    torch.manual_seed(0)
    contrastive = Contrastive(Greys(), 3, lambda pixels: pixels)
    pixels, labels, captions = batch(6)
    logits = (
        contrastive.embed_images(pixels) @ contrastive.embed_captions(captions).T * contrastive.scale.exp()
        + contrastive.bias
    )
    is_positive = (labels[:, None] == labels[None]).float()
    expected = (
        nn.functional.binary_cross_entropy_with_logits(logits, is_positive, reduction="none").sum(1).mean()
    )
    torch.testing.assert_close(contrastive.losses((pixels, labels, captions))["pairs"], expected)

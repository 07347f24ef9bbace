"""What the parts of a model promise, slot by slot: that they are as large as they say, and what else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from janus_modular.interfaces import PixelSpec
from janus_modular.testing.calls import known_codes, targets_of
from janus_modular.testing.check import NotApplicable, check_for, ensure
from janus_modular.testing.comparing import ensure_identical, ensure_same
from janus_modular.testing.drawing import draw_with


@check_for("understanding_encoders")
@torch.no_grad()
def check_encoder_sizes(encoder: Any, pixels: Tensor) -> None:
    """Features are as many and as wide as the encoder says, and it says which images it wants."""
    features = encoder.eval()(pixels)
    rows, columns = encoder.grid(*pixels.shape[-2:])
    said = (len(pixels), rows * columns, encoder.feature_dim)
    ensure(tuple(features.shape) == said, f"features are {tuple(features.shape)}; it says (N, P, C) = {said}")
    ensure(isinstance(encoder.pixels, PixelSpec), f"encoder.pixels is {encoder.pixels!r}, not a PixelSpec")
    wanted = encoder.grid(encoder.pixels.height, encoder.pixels.width)
    ensure(min(wanted) > 0, f"an image of the size that it asks for becomes a grid of {wanted} features")


@check_for("image_tokenizers")
@torch.no_grad()
def check_tokenizer_sizes(tokenizer: Any, pixels: Tensor) -> None:
    """Codes are as many and in the range that the tokenizer says, and paint images of the same size."""
    tokenizer.eval()
    height, width = pixels.shape[-2:]
    codes = tokenizer.encode(pixels)
    rows, columns = tokenizer.grid(height, width)
    several = len(tokenizer.codebooks)
    said = (len(pixels), rows * columns, *([several] if several > 1 else []))
    ensure(tuple(codes.shape) == said, f"codes are {tuple(codes.shape)}; it says {said}")
    ensure(codes.dtype == torch.int64, f"codes are {codes.dtype}, not int64")
    for s, one in enumerate(codes.view(*codes.shape[:2], -1).unbind(-1)):
        low, high, size = int(one.min()), int(one.max()), tokenizer.codebooks[s]
        ensure(0 <= low <= high < size, f"codes from {low} to {high}, of a codebook of {size}")
    painted = tokenizer.decode(codes, height=height, width=width)
    ensure(
        painted.shape == pixels.shape,
        f"pixels of {tuple(pixels.shape)} are painted as {tuple(painted.shape)}",
    )
    vectors = tokenizer.codebook_embeddings()
    said_vectors = None if tokenizer.code_dim is None else (sum(tokenizer.codebooks), tokenizer.code_dim)
    found = None if vectors is None else tuple(vectors.shape)
    ensure(found == said_vectors, f"code vectors are {found}; codebooks and code_dim say {said_vectors}")


@check_for("image_tokenizers")
def check_tokenizer_losses(tokenizer: Any, pixels: Tensor) -> None:
    """Its losses are named finite scalars, and measuring them in eval mode changes nothing."""
    tokenizer.eval()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    losses = tokenizer.losses(pixels)
    ensure(bool(losses), "it has no losses, so it cannot be trained")
    for name, value in losses.items():
        ensure(
            value.ndim == 0 and bool(value.isfinite()), f"the loss '{name}' is {value}, not a finite scalar"
        )
    ensure_identical(tokenizer.state_dict(), before, "its state before and after measuring")


@check_for("adaptors")
@torch.no_grad()
def check_adaptor_sizes(adaptor: Any, features: Tensor) -> None:
    """Features become as many positions as it says, all of one width, whatever their number."""
    adaptor.eval()
    widths = set()
    for x in (features, features.repeat(1, 2, 3, 1)):
        grid = (x.shape[1], x.shape[2])
        carried = adaptor(x.flatten(1, 2), grid)
        said = (len(x), adaptor.num_tokens(grid))
        ensure(tuple(carried.shape[:2]) == said, f"{tuple(carried.shape)}; it says (N, P') = {said}")
        widths.add(carried.shape[-1])
    ensure(len(widths) == 1, f"its width depends on the number of features: {sorted(widths)}")


@check_for("heads")
@torch.no_grad()
def check_head_shapes(head: Any, hidden: Tensor) -> None:
    """It takes any leading dimensions, and gives each hidden state the logits that it has alone."""
    head.eval()
    for before, size in zip(known_codes(head, hidden), head.codebooks, strict=True):
        logits = head(hidden, before)
        said = (*hidden.shape[:-1], size)
        ensure(tuple(logits.shape) == said, f"logits are {tuple(logits.shape)}; it says (..., K) = {said}")
        rows, codes = hidden.flatten(0, -2), before.flatten(0, -2)
        flat = head(rows, codes)
        ensure_same(flat.view_as(logits), logits, "states in one row and in several")
        ensure_same(head(rows[0], codes[0]), flat[0], "one state alone")


@check_for("heads")
@torch.no_grad()
def check_head_order(head: Any, hidden: Tensor) -> None:
    """Each code of a position is predicted from those before it, the first from the hidden state alone."""
    head.eval()
    if len(head.codebooks) == 1:
        raise NotApplicable("it predicts one code a position")
    for known, before in enumerate(known_codes(head, hidden)):
        logits = head(hidden, before)
        for s in range(known):
            other = before.clone()
            other[..., s] = (other[..., s] + 1) % head.codebooks[s]
            same = torch.equal(head(hidden, other), logits)
            ensure(not same, f"code {known + 1} does not depend on code {s + 1}, which is known by then")


@check_for("backbones")
@torch.no_grad()
def check_backbone_sizes(backbone: Any, tokens: Tensor) -> None:
    """Embeddings, hidden states and logits are as wide as it says."""
    backbone.eval()
    x = backbone.embed(tokens)
    wide = (*tokens.shape, backbone.hidden_size)
    ensure(tuple(x.shape) == wide, f"embeddings are {tuple(x.shape)}; it says (B, T, D) = {wide}")
    hidden = backbone(x, positions=counting(tokens))
    ensure(tuple(hidden.shape) == wide, f"hidden states are {tuple(hidden.shape)}; it says {wide}")
    logits = tuple(backbone.logits(hidden).shape)
    said = (*tokens.shape, backbone.vocab_size)
    ensure(logits == said, f"logits are {logits}; it says (B, T, V) = {said}")
    ensure(backbone.context >= tokens.shape[1], f"its context of {backbone.context} is below the example's")


@check_for("backbones")
@torch.no_grad()
def check_causal(backbone: Any, tokens: Tensor) -> None:
    """No position sees what comes after it."""
    backbone.eval()
    x = backbone.embed(tokens)
    later = x.clone()
    later[:, -1] = -later[:, -1] + 1
    hidden, other = (backbone(one, positions=counting(tokens)) for one in (x, later))
    ensure_same(other[:, :-1], hidden[:, :-1], "earlier positions, with another last one")


@check_for("backbones")
@torch.no_grad()
def check_packing(backbone: Any, tokens: Tensor) -> None:
    """Sequences that share a row, each counting from 0, do not see each other."""
    backbone.eval()
    x = backbone.embed(tokens)
    alone = backbone(x, positions=counting(tokens))
    together = backbone(x.flatten(0, 1)[None], positions=counting(tokens).reshape(1, -1))
    ensure_same(together.view_as(alone), alone, "packed into one row, and apart")


@check_for("backbones")
@torch.no_grad()
def check_cache(backbone: Any, tokens: Tensor) -> None:
    """Read in pieces through a cache, rows of their own lengths, it says what it says of the whole."""
    backbone.eval()
    x = backbone.embed(tokens)
    whole = backbone(x, positions=counting(tokens))
    rows, length = tokens.shape
    lengths = length - 2 - torch.arange(rows) % 2  # every other row is one shorter
    cache = backbone.new_cache(rows, length)
    first = int(lengths.max())
    read = backbone(x[:, :first], positions=counting(tokens)[:, :first], cache=cache)
    cache.advance(lengths)
    row = torch.arange(rows)
    ensure_same(read[row, lengths - 1], whole[row, lengths - 1], "the first piece through a cache, and whole")
    for _ in range(2):
        step = backbone(x[row, lengths][:, None], positions=lengths[:, None], cache=cache)
        cache.advance(torch.ones(rows, dtype=torch.int64))
        ensure_same(step[:, 0], whole[row, lengths], "a step through a cache, and whole")
        lengths = lengths + 1


@check_for("backbones")
@torch.no_grad()
def check_resize_vocab(backbone: Any, tokens: Tensor) -> None:
    """Grown by some tokens, it embeds and predicts them too, and says of the old ones what it said before."""
    backbone.eval()
    old = backbone.vocab_size
    before = backbone.logits(backbone(backbone.embed(tokens), positions=counting(tokens)))
    backbone.resize_vocab(old + 3)
    ensure(backbone.vocab_size == old + 3, f"asked for {old + 3} tokens, it has {backbone.vocab_size}")
    after = backbone.logits(backbone(backbone.embed(tokens), positions=counting(tokens)))
    ensure(after.shape[-1] == old + 3, f"logits are of {after.shape[-1]} tokens, expected {old + 3}")
    ensure_same(after[..., :old], before, "logits of the old tokens")
    added = torch.arange(old, old + 3, device=tokens.device)[None]
    try:
        embedded = backbone.embed(added)
    except IndexError as error:
        ensure(False, f"the new tokens {added.tolist()} have no embeddings: {error}")
    ensure(bool(embedded.isfinite().all()), "the embeddings of the new tokens are not finite")


@check_for("generation")
@torch.no_grad()
def check_generation_sizes(path: Any, pixels: Tensor) -> None:
    """An image takes as many positions as it says, and its losses are one for each."""
    path.eval()
    size = (path.height, path.width)
    ensure(tuple(pixels.shape[-2:]) == size, f"the example is {tuple(pixels.shape[-2:])}; it draws {size}")
    targets = targets_of(path, pixels)
    x = path.embed(targets)
    said = (len(pixels), path.num_tokens)
    ensure(tuple(x.shape[:2]) == said, f"embeddings are {tuple(x.shape)}; it says {said}")
    for name, loss in path.losses(x, targets).items():
        ensure(tuple(loss.shape) == said, f"the loss '{name}' is {tuple(loss.shape)}, not unreduced {said}")


@check_for("generation")
def check_generation_promises(path: Any, pixels: Tensor) -> None:
    """It names its image sampler, the sizes that are read, its parts, and which of them no stage trains."""
    ensure(isinstance(path.image_sampler, str), f"image_sampler is {path.image_sampler!r}: write its name")
    ensure(isinstance(path.predicts_next, bool), f"predicts_next is {path.predicts_next!r}")
    parts = path.parts()
    ensure(
        "decode_image" in parts,
        f"it offers the parts {', '.join(parts) or 'none'}: 'decode_image' makes the image",
    )
    ensure(
        isinstance(path.frozen_submodules, tuple | list),
        f"frozen_submodules is {path.frozen_submodules!r}: write a tuple of paths, ('tokenizer',)",
    )
    inside = {name for name, _ in (*path.named_modules(), *path.named_parameters()) if name}
    strange = sorted(set(path.frozen_submodules) - inside)
    names = sorted(name for name in inside if "." not in name)
    ensure(
        not strange, f"frozen_submodules names {strange}; it holds {names}, and what lies inside them (a.b)"
    )


@check_for("generation")
@torch.no_grad()
def check_generation_sampler(path: Any, pixels: Tensor) -> None:
    """Its image sampler is registered, finds the parts and sizes that it uses, and draws its images."""
    path.eval()
    hidden_size = path.embed(targets_of(path, pixels)).shape[-1]
    for images in (1, len(pixels) + 1):
        drawn = draw_with(path, images, hidden_size)[1]
        said = (images, 3, path.height, path.width)
        ensure(drawn.shape == said, f"it draws {drawn.shape} where it says (N, 3, height, width) = {said}")


def counting(tokens: Tensor) -> Tensor:
    """Return the positions (B, T) of sequences that begin at 0."""
    return torch.arange(tokens.shape[1]).expand(tokens.shape)

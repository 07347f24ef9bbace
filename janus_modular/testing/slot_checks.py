"""The checks of model components, slot by slot: declared sizes, causality, caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from janus_modular.capabilities import EncodesImages, HasLogProbabilities
from janus_modular.interfaces import PixelSpec
from janus_modular.model.model import stack_positions
from janus_modular.sequence import EncodedSpec
from janus_modular.testing.calls import alignment_of, known_codes
from janus_modular.testing.check import NotApplicable, check_for, ensure
from janus_modular.testing.comparing import ensure_close, ensure_equal
from janus_modular.testing.drawing import derived_inputs, draw_with, ensure_declared, targets_of


@check_for("understanding_encoders")
@torch.no_grad()
def check_encoder_sizes(encoder: Any, pixels: Tensor) -> None:
    """Features have the declared number and dimension; the encoder declares its image size."""
    features = encoder.eval()(pixels)
    rows, columns = encoder.grid(*pixels.shape[-2:])
    declared = (len(pixels), rows * columns, encoder.feature_dim)
    ensure(
        tuple(features.shape) == declared,
        f"features are {tuple(features.shape)}; grid and feature_dim declare (N, P, C) = {declared}",
    )
    ensure(
        isinstance(encoder.pixels, PixelSpec), f"encoder.pixels is {encoder.pixels!r}; expected a PixelSpec"
    )
    grid = encoder.grid(encoder.pixels.height, encoder.pixels.width)
    ensure(min(grid) > 0, f"an image of the size in encoder.pixels has a grid of {grid} features")
    side = encoder.pixels.multiple
    if side is not None:  # images in native sizes
        features, grid = encoder(pixels.new_zeros(2, 3, side, 2 * side)), encoder.grid(side, 2 * side)
        declared = (2, grid[0] * grid[1], encoder.feature_dim)
        ensure(
            tuple(features.shape) == declared,
            f"features of {side}x{2 * side} pixels are {tuple(features.shape)}; expected {declared}",
        )


@check_for("image_tokenizers")
@torch.no_grad()
def check_tokenizer_sizes(tokenizer: Any, pixels: Tensor) -> None:
    """Codes have the declared number and range, and are decoded into images of the same size."""
    tokenizer.eval()
    height, width = pixels.shape[-2:]
    codes = tokenizer.encode(pixels)
    rows, columns = tokenizer.grid(height, width)
    per_position = len(tokenizer.codebooks)
    declared = (len(pixels), rows * columns, *([per_position] if per_position > 1 else []))
    ensure(tuple(codes.shape) == declared, f"codes are {tuple(codes.shape)}; grid declares {declared}")
    ensure(codes.dtype == torch.int64, f"codes are {codes.dtype}; expected int64")
    for size, column in zip(tokenizer.codebooks, codes.view(*codes.shape[:2], -1).unbind(-1), strict=True):
        low, high = int(column.min()), int(column.max())
        ensure(0 <= low <= high < size, f"codes from {low} to {high}, of a codebook of {size}")
    decoded = tokenizer.decode(codes, height=height, width=width)
    ensure(
        decoded.shape == pixels.shape,
        f"pixels of {tuple(pixels.shape)} are decoded as {tuple(decoded.shape)}",
    )
    embeddings = tokenizer.codebook_embeddings()
    declared_shape = None if tokenizer.code_dim is None else (sum(tokenizer.codebooks), tokenizer.code_dim)
    shape = None if embeddings is None else tuple(embeddings.shape)
    ensure(
        shape == declared_shape,
        f"codebook_embeddings are {shape}; codebooks and code_dim declare {declared_shape}",
    )


@check_for("image_tokenizers", "image_autoencoders")
def check_tokenizer_losses(component: Any, pixels: Tensor) -> None:
    """The losses are named finite scalars, and computing them in eval mode does not change the module."""
    component.eval()
    before = {name: value.clone() for name, value in component.state_dict().items()}
    losses = component.losses(pixels)
    ensure(bool(losses), "it has no losses, so it cannot be trained")
    for name, value in losses.items():
        ensure(
            value.ndim == 0 and bool(value.isfinite()),
            f"the loss '{name}' is {value}; expected a finite scalar",
        )
    ensure_equal(component.state_dict(), before, "its state before and after computing losses")


@check_for("image_autoencoders")
@torch.no_grad()
def check_autoencoder_sizes(autoencoder: Any, pixels: Tensor) -> None:
    """Encoded images have the declared shape, and are decoded into images of the same size."""
    autoencoder.eval()
    height, width = pixels.shape[-2:]
    encoded = autoencoder.encode(pixels)
    declared = (len(pixels), *autoencoder.encoded_shape(height, width))
    ensure(
        tuple(encoded.shape) == declared,
        f"encoded images are {tuple(encoded.shape)}; encoded_shape declares {declared}",
    )
    decoded = autoencoder.decode(encoded, height=height, width=width)
    ensure(
        decoded.shape == pixels.shape,
        f"pixels of {tuple(pixels.shape)} are decoded as {tuple(decoded.shape)}",
    )


@check_for("adaptors")
@torch.no_grad()
def check_adaptor_sizes(adaptor: Any, features: Tensor) -> None:
    """Features become the declared number of positions, of the same dimension for every grid."""
    adaptor.eval()
    dims = set()
    for x in (features, features.repeat(1, 2, 3, 1)):
        grid = (x.shape[1], x.shape[2])
        output = adaptor(x.flatten(1, 2), grid)
        declared = (len(x), adaptor.num_tokens(grid))
        ensure(
            tuple(output.shape[:2]) == declared,
            f"its output is {tuple(output.shape)}; num_tokens declares (N, P') = {declared}",
        )
        dims.add(output.shape[-1])
    ensure(len(dims) == 1, f"the dimension of its output depends on the number of features: {sorted(dims)}")


@check_for("heads")
@torch.no_grad()
def check_head_shapes(head: Any, hidden: Tensor) -> None:
    """A head takes any leading dimensions; the logits of a hidden state do not depend on other states."""
    head.eval()
    for before, size in zip(known_codes(head, hidden), head.codebooks, strict=True):
        logits = head(hidden, before)
        declared = (*hidden.shape[:-1], size)
        ensure(
            tuple(logits.shape) == declared,
            f"logits are {tuple(logits.shape)}; codebooks declare (..., K) = {declared}",
        )
        rows, codes = hidden.flatten(0, -2), before.flatten(0, -2)
        flat = head(rows, codes)
        ensure_close(flat.view_as(logits), logits, "states in one dimension and in several")
        ensure_close(head(rows[0], codes[0]), flat[0], "a single state")


@check_for("heads")
@torch.no_grad()
def check_head_order(head: Any, hidden: Tensor) -> None:
    """The logits of each code of a position depend on the codes before it."""
    head.eval()
    if len(head.codebooks) == 1:
        raise NotApplicable("it predicts one code a position")
    for known, before in enumerate(known_codes(head, hidden)):
        logits = head(hidden, before)
        for s in range(known):
            changed = before.clone()
            changed[..., s] = (changed[..., s] + 1) % head.codebooks[s]
            same = torch.equal(head(hidden, changed), logits)
            ensure(not same, f"code {known + 1} does not depend on code {s + 1}, which comes before it")


@check_for("backbones")
@torch.no_grad()
def check_backbone_sizes(backbone: Any, tokens: Tensor) -> None:
    """Embeddings, hidden states and logits have the declared dimensions."""
    backbone.eval()
    x = backbone.embed(tokens)
    declared = (*tokens.shape, backbone.hidden_size)
    ensure(
        tuple(x.shape) == declared,
        f"embeddings are {tuple(x.shape)}; hidden_size declares (B, T, D) = {declared}",
    )
    hidden = backbone(x, positions=positions_for(backbone, tokens))
    ensure(tuple(hidden.shape) == declared, f"hidden states are {tuple(hidden.shape)}; expected {declared}")
    logits = tuple(backbone.logits(hidden).shape)
    declared = (*tokens.shape, backbone.vocab_size)
    ensure(logits == declared, f"logits are {logits}; vocab_size declares (B, T, V) = {declared}")
    ensure(
        backbone.context >= tokens.shape[1],
        f"its context is {backbone.context}; the example has {tokens.shape[1]} positions",
    )


@check_for("backbones")
@torch.no_grad()
def check_causal(backbone: Any, tokens: Tensor) -> None:
    """The hidden state of a position does not depend on later positions."""
    backbone.eval()
    x = backbone.embed(tokens)
    changed = x.clone()
    changed[:, -1] = -changed[:, -1] + 1
    hidden, hidden_changed = (backbone(y, positions=positions_for(backbone, tokens)) for y in (x, changed))
    ensure_close(hidden_changed[:, :-1], hidden[:, :-1], "earlier positions, with the last one changed")


@check_for("backbones")
@torch.no_grad()
def check_packing(backbone: Any, tokens: Tensor) -> None:
    """Sequences packed into a row, each with positions from 0, do not attend to each other."""
    backbone.eval()
    x = backbone.embed(tokens)
    alone = backbone(x, positions=positions_for(backbone, tokens))
    packed = backbone(
        x.flatten(0, 1)[None], positions=stack_positions(backbone, positions_of(tokens).reshape(1, -1))
    )
    ensure_close(packed.view_as(alone), alone, "sequences packed into a row and alone")


@check_for("backbones")
@torch.no_grad()
def check_resize_vocab(backbone: Any, tokens: Tensor) -> None:
    """A larger vocabulary has embeddings and logits for the new tokens; the old logits stay the same."""
    backbone.eval()
    old = backbone.vocab_size
    before = backbone.logits(backbone(backbone.embed(tokens), positions=positions_for(backbone, tokens)))
    backbone.resize_vocab(old + 3)
    ensure(
        backbone.vocab_size == old + 3, f"vocab_size is {backbone.vocab_size} after resize_vocab({old + 3})"
    )
    after = backbone.logits(backbone(backbone.embed(tokens), positions=positions_for(backbone, tokens)))
    ensure(after.shape[-1] == old + 3, f"logits are of {after.shape[-1]} tokens; expected {old + 3}")
    ensure_close(after[..., :old], before, "logits of the old tokens")
    new_tokens = torch.arange(old, old + 3, device=tokens.device)[None]
    try:
        embedded = backbone.embed(new_tokens)
    except IndexError as error:
        ensure(False, f"the new tokens {new_tokens.tolist()} have no embeddings: {error}")
    ensure(bool(embedded.isfinite().all()), "the embeddings of the new tokens are not finite")


@check_for("generation")
@torch.no_grad()
def check_generation_sizes(path: Any, pixels: Tensor) -> None:
    """An image takes the declared number of positions, and losses are per position or per image."""
    path.eval()
    size = (path.height, path.width)
    ensure(tuple(pixels.shape[-2:]) == size, f"the example is {tuple(pixels.shape[-2:])}; expected {size}")
    targets = targets_of(path, pixels)
    x = path.embed(targets)
    declared = (len(pixels), path.num_tokens)
    ensure(
        tuple(x.shape[:2]) == declared,
        f"embeddings are {tuple(x.shape)}; num_tokens declares (N, P) = {declared}",
    )
    for name, loss in {**path.losses(x, targets), **alignment_of(path, x)}.items():
        ensure(
            tuple(loss.shape) in (declared, declared[:1]),
            f"the loss '{name}' is {tuple(loss.shape)}; expected {declared} or {declared[:1]}, unreduced",
        )


@check_for("generation")
@torch.no_grad()
def check_generation_encoded(path: Any, pixels: Tensor) -> None:
    """Targets have the declared form; images that are given encoded, or drawn, have it too."""
    path.eval()
    if not isinstance(path, EncodesImages):
        raise NotApplicable("it declares no form of encoded images")
    spec, targets = path.encoded, targets_of(path, pixels)
    ensure(isinstance(spec, EncodedSpec), f"encoded is {spec!r}; expected an EncodedSpec")
    ensure(
        isinstance(targets, Tensor), f"targets are of {type(targets).__name__}; expected a tensor (N, ...)"
    )
    x = path.embed(targets)
    for origin, images in (
        ("targets", targets.numpy()),
        ("images drawn", draw_with(path, len(pixels), x.shape[-1])[1].encoded),
    ):
        ensure(images is not None, f"{origin}: the image sampler returns no EncodedImages with `encoded`")
        for image in [] if images is None else images:
            try:
                spec.checked(image)
            except ValueError as error:
                ensure(False, f"{origin}: {error}")
    if isinstance(path, HasLogProbabilities):
        scores = path.log_probabilities(x, targets, guidance=1.0, temperature=1.0)
        declared = (len(pixels), path.num_tokens)
        ensure(
            tuple(scores.shape) == declared, f"log-probabilities are {tuple(scores.shape)}; not {declared}"
        )
        ensure(bool((scores <= 0).all()), f"log-probabilities go up to {float(scores.max()):.3g}; expected 0")


@check_for("generation")
def check_generation_attributes(path: Any, pixels: Tensor) -> None:
    """The path declares its image sampler and its frozen submodules."""
    ensure(isinstance(path.image_sampler, str), f"image_sampler is {path.image_sampler!r}; expected a name")
    ensure(
        isinstance(path.predicts_next, bool),
        f"predicts_next is {path.predicts_next!r}; expected True or False",
    )
    ensure(
        isinstance(path.frozen_submodules, tuple | list),
        f"frozen_submodules is {path.frozen_submodules!r}; expected a tuple of paths, ('tokenizer',)",
    )
    known = {name for name, _ in (*path.named_modules(), *path.named_parameters()) if name}
    unknown = sorted(set(path.frozen_submodules) - known)
    names = sorted(name for name in known if "." not in name)
    ensure(not unknown, f"frozen_submodules names {unknown}; it has {names}, and submodules of these (a.b)")


@check_for("generation")
@torch.no_grad()
def check_generation_sampler(path: Any, pixels: Tensor) -> None:
    """The image sampler is registered, finds all graphs and sizes that it uses, and draws images."""
    path.eval()
    hidden_size = path.embed(targets_of(path, pixels)).shape[-1]
    for images in (1, len(pixels) + 1):
        images_drawn = draw_with(path, images, hidden_size)[1].images
        declared = (images, 3, path.height, path.width)
        ensure(
            images_drawn.shape == declared,
            f"it draws {images_drawn.shape}; height and width declare (N, 3, height, width) = {declared}",
        )


@check_for("generation")
@torch.no_grad()
def check_generation_graphs(path: Any, pixels: Tensor) -> None:
    """The graphs take and return what they declare, for 1 and for 3 images; the image sampler runs them."""
    path.eval()
    hidden_size = path.embed(targets_of(path, pixels)).shape[-1]
    for images in (1, 3):
        ran = draw_with(path, images, hidden_size)[0].inputs
        repeated = pixels[torch.arange(images) % len(pixels)]
        derived = derived_inputs(path, repeated)
        for graph in path.graphs():
            if graph.name not in derived:
                ensure(graph.name in ran, f"its image sampler never runs '{graph.name}': leave it out")
                continue
            inputs = derived[graph.name]
            result = graph.function(*inputs)
            outputs = result if isinstance(result, tuple) else (result,)
            ensure_declared(graph, inputs, outputs, images)
            if graph.role == "embed":
                ensure_close(outputs, [path.embed(*inputs)], f"the graph '{graph.name}', against `embed`")


def positions_for(backbone: Any, tokens: Tensor) -> Tensor:
    """Return positions that count from 0 in each row, as a backbone takes them."""
    return stack_positions(backbone, positions_of(tokens))


def positions_of(tokens: Tensor) -> Tensor:
    """Return positions (B, T) that count from 0 in each row."""
    return torch.arange(tokens.shape[1]).expand(tokens.shape)

"""The checks of a backbone's cache: the same states as without it, rows of their own, recurrent states."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from janus_modular.capabilities import AttendsTogether
from janus_modular.interfaces import StateCache
from janus_modular.model.cache import TensorCache, state_tensors
from janus_modular.model.model import stack_positions
from janus_modular.testing.check import NotApplicable, check_for, ensure
from janus_modular.testing.comparing import ensure_close, ensure_equal
from janus_modular.testing.slot_checks import positions_for, positions_of


@check_for("backbones")
@torch.no_grad()
def check_cache(backbone: Any, tokens: Tensor) -> None:
    """Through a cache, in chunks and with rows of several lengths, the hidden states are the same."""
    backbone.eval()
    x = backbone.embed(tokens)
    whole = backbone(x, positions=positions_for(backbone, tokens))
    rows, length = tokens.shape
    lengths = length - 2 - torch.arange(rows) % 2  # every other row is one shorter
    cache = backbone.new_cache(rows, length)
    longest = int(lengths.max())
    chunk = feed(backbone, x[:, :longest], positions_of(tokens)[:, :longest], cache, lengths)
    row = torch.arange(rows)
    first = "the first chunk, with and without a cache"
    ensure_close(chunk[row, lengths - 1], whole[row, lengths - 1], first)
    for _ in range(2):
        step = feed(backbone, x[row, lengths][:, None], lengths[:, None], cache, torch.ones_like(lengths))
        ensure_close(step[:, 0], whole[row, lengths], "a step, with and without a cache")
        lengths = lengths + 1


@check_for("backbones")
@torch.no_grad()
def check_cache_rows(backbone: Any, tokens: Tensor) -> None:
    """Rows of a cache are cut back and read again on their own, and padding of full rows harms none."""
    backbone.eval()
    x, positions = backbone.embed(tokens), positions_of(tokens)
    whole = backbone(x, positions=positions_for(backbone, tokens))
    rows, length = tokens.shape
    cache = backbone.new_cache(rows, length)
    feed(backbone, x, positions, cache, torch.full((rows,), length))
    selected = cache.select(slice(1, 2))
    selected.truncate(torch.zeros(1, dtype=torch.int64))
    shorter = torch.tensor([length - 2])
    again = feed(backbone, x[1:2, : length - 2], positions[1:2, : length - 2], selected, shorter)
    ensure_close(again, whole[1:2, : length - 2], "a row that is read again alone, and whole")
    lengths = torch.full((rows,), length)
    lengths[1] = length - 2
    ensure(torch.equal(cache.lengths, lengths), f"lengths are {cache.lengths}; expected {lengths}")
    next_positions = (lengths[:, None] + torch.arange(2)).clamp(max=length - 1)  # beyond are no positions
    row = torch.arange(rows)[:, None]
    hidden = feed(backbone, x[row, next_positions], next_positions, cache, length - lengths)
    ensure_close(hidden[1], whole[1, length - 2 :], "a row beside full ones, and whole")
    if state_tensors(backbone):
        return  # of which rows cannot be cut back
    lengths = torch.full((rows,), length - 1)
    cache.truncate(lengths)
    last = feed(backbone, x[:, -1:], positions[:, -1:], cache, torch.ones(rows, dtype=torch.int64))
    ensure_close(last[:, 0], whole[:, -1], "a full row cut back by one, and whole")


@check_for("backbones")
@torch.no_grad()
def check_cache_states(backbone: Any, tokens: Tensor) -> None:
    """States do not depend on positions that are not kept, and a row that keeps none stays as it is."""
    backbone.eval()
    names = [spec.name for spec in state_tensors(backbone)]
    if not names:
        raise NotApplicable("its cache has an entry for each position")
    x, positions = backbone.embed(tokens), positions_of(tokens)
    rows, length = tokens.shape
    all_kept, counts = torch.full((rows,), length), torch.zeros(rows, dtype=torch.int64)
    counts[0] = 1
    states = []
    for padding in (1.0, -3.0):
        cache = backbone.new_cache(rows, 2 * length)
        ensure(
            isinstance(cache, TensorCache),
            f"new_cache returns {type(cache).__name__}; expected a TensorCache",
        )
        feed(backbone, x, positions, cache, all_kept)
        before = {name: cache.read(name).clone() for name in names}
        feed(backbone, torch.cat([x[:, :1], padding * x[:, 1:]], dim=1), positions + length, cache, counts)
        states.append({name: cache.read(name) for name in names})
    for name in names:
        ensure_equal(states[0][name][1:], before[name][1:], f"'{name}' of rows that keep nothing")
        ensure_close(states[0][name][0], states[1][name][0], f"'{name}' with other padding")
    changed = any(not torch.equal(states[0][name][0], before[name][0]) for name in names)
    ensure(changed, f"no position changes {', '.join(names)}")


@check_for("backbones")
@torch.no_grad()
def check_together(backbone: Any, tokens: Tensor) -> None:
    """Positions of a block attend to each other, in a packed row and through a cache; others are causal."""
    backbone.eval()
    if not isinstance(backbone, AttendsTogether):
        raise NotApplicable("it is causal: it declares no refuse_together")
    if reason := backbone.refuse_together():
        raise NotApplicable(reason)
    x, positions = backbone.embed(tokens), positions_for(backbone, tokens)
    rows, length = tokens.shape
    causal = backbone(x, positions=positions)
    blocks = torch.zeros_like(tokens)
    blocks[:, 1:3] = 1
    blocks[:, 3:] = 2
    run: Any = backbone
    whole = run(x, positions=positions, together=blocks)
    ensure_close(whole[:, 0], causal[:, 0], "a position before all blocks, with and without blocks")
    for changed, seeing, blind in ((2, 1, 0), (length - 1, 3, 2)):
        changed_x = x.clone()
        changed_x[:, changed] = -changed_x[:, changed] + 1
        hidden = run(changed_x, positions=positions, together=blocks)
        label = f"position {blind + 1}, with position {changed + 1} changed"
        ensure_close(hidden[:, blind], whole[:, blind], label)
        same = torch.allclose(hidden[:, seeing], whole[:, seeing])
        ensure(not same, f"position {seeing + 1} does not see position {changed + 1} of its block")
    flat = stack_positions(backbone, positions_of(tokens).reshape(1, -1))
    packed = run(x.flatten(0, 1)[None], positions=flat, together=blocks.reshape(1, -1))
    ensure_close(packed.view_as(whole), whole, "sequences with blocks packed into a row and alone")
    cache = backbone.new_cache(rows, length)
    for part in (slice(0, 3), slice(3, length)):
        counts = torch.full((rows,), x[:, part].shape[1])
        if state_tensors(backbone):
            cast(StateCache, cache).keep(counts)
        fed = run(x[:, part], positions=positions[..., part], cache=cache, together=blocks[:, part])
        cache.advance(counts)
        ensure_close(fed, whole[:, part], "blocks through a cache and without it")


def feed(backbone: Any, x: Tensor, positions: Tensor, cache: Any, counts: Tensor) -> Tensor:
    """Feed x (B, T, D) into a cache whose rows keep ``counts`` (B,) positions; return the hidden states."""
    if state_tensors(backbone):
        cache.keep(counts)
    hidden: Tensor = backbone(x, positions=stack_positions(backbone, positions), cache=cache)
    cache.advance(counts)
    return hidden

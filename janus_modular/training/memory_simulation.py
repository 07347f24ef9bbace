"""A training step on the meta device, under an allocator that only counts.

The model's own code runs, so that what autograd keeps, and when, is not guessed. Two things differ from a
run: attention is a fused kernel, which keeps no scores, and autocast is imitated: it has no meta device.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from janus_modular.model.batch import Batch
from janus_modular.model.model import JanusModel, merge_features, stack_positions
from janus_modular.sequence import IGNORE_INDEX
from janus_modular.training.parallel import blocks_of, checkpoint_activations

CAST_BY_AUTOCAST: set[Any] = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d),
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.mm, torch.addmm, torch.baddbmm),
    *(torch.einsum, F.scaled_dot_product_attention),
}
"""Functions whose arguments autocast converts to half precision, on CUDA and on CPUs."""


def simulated_peak(
    model: JanusModel,
    batch: Batch,
    *,
    half: bool = False,
    recomputed: Sequence[str] = (),
    shards: Mapping[str, int] | None = None,
    accumulates: bool = False,
) -> int:
    """Return the most bytes that a micro-batch's forward and backward passes hold beside the weights.

    Gradients are among them; with ``accumulates``, those of earlier micro-batches are there from the start.
    ``shards`` are numbers of processes, by the names of the parameters that are divided over several.
    """
    shards = shards or {}
    meta = copy.deepcopy(model).to("meta")
    allocator, parts = CountingAllocator(meta), dict[str, Tensor]()
    trained = {name: parameter for name, parameter in meta.named_parameters() if parameter.requires_grad}

    def part(name: str) -> Tensor:
        return torch.empty(-(-trained[name].numel() // shards.get(name, 1)), device="meta")

    def divide(name: str) -> None:
        parts.setdefault(name, part(name))
        trained[name].grad = None

    gathered = {id(trained[name]) for name in shards if name in trained}
    kernels = Kernels(allocator, half=half, gathered=gathered)
    for component in recomputed:
        for block in blocks_of(component, meta.get_submodule(component), "activation_checkpointing"):
            block.forward = kernels.around(block.forward)
    meta._text_losses = kernels.around(meta._text_losses)  # type: ignore[method-assign]
    checkpoint_activations(meta, recomputed)

    with allocator:
        for name, parameter in trained.items():
            if name in shards:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: divide(name))
            if accumulates and name in shards:
                parts[name] = part(name)
            elif accumulates:
                parameter.grad = torch.empty_like(parameter)
        loss = _loss(meta, batch, kernels)
        if loss.requires_grad:
            loss.backward()
    return allocator.peak


def _loss(model: JanusModel, batch: Batch, kernels: Kernels) -> Tensor:
    """Return the loss of a micro-batch as `JanusModel` does; masks have no values here, but their numbers."""
    labels, drawn = int((batch.labels != IGNORE_INDEX).sum()), len(batch.image_seeds)
    batch, generation = batch.to("meta"), model.generation
    targets: Any = None
    if batch.generation_pixels is not None:
        rngs = [np.random.default_rng(0)] * len(batch.generation_pixels)
        targets = generation.targets(batch.generation_pixels, rngs)
    if batch.generation_encoded is not None:
        encoded = batch.generation_encoded
        targets = encoded if targets is None else torch.cat([targets, encoded])
    with kernels:
        x = model.backbone.embed(batch.tokens)
        if batch.understanding_pixels is not None:
            features = model.understanding.embed(batch.understanding_pixels)[None]
            x = merge_features(features, x, mask=batch.understanding_mask)
        if targets is not None:
            x = merge_features(generation.embed(targets), x, mask=batch.generation_mask)
        hidden = model.backbone(
            x, positions=stack_positions(model.backbone, batch.positions, batch.position_ids)
        )
        rows = hidden.flatten(0, 1)
        losses: list[Tensor] = []
        if labels:
            index = torch.zeros(labels, dtype=torch.long, device="meta")
            losses.append(model.text_losses(rows.index_select(0, index), index))
        if targets is not None:
            index = torch.zeros(drawn * generation.num_tokens, dtype=torch.long, device="meta")
            states = rows.index_select(0, index).view(drawn, generation.num_tokens, -1)
            losses += generation.losses(states, targets).values()
        return torch.stack([loss.sum() for loss in losses] or [0 * hidden.sum()]).sum()


class CountingAllocator(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, without those of a model's parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.paused = False
        tensors = [*model.parameters(), *model.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, 0 if self.paused else storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Kernels(TorchFunctionMode):
    """Replaces attention by a fused kernel and, with ``half``, casts what autocast casts to bfloat16.

    Casts of trained weights are kept until the forward pass ends, as autocast does. Those of ``gathered``
    parameters (by id) are not counted: FSDP gathers these in bfloat16, a block at a time.
    """

    def __init__(
        self,
        allocator: CountingAllocator,
        *,
        half: bool,
        gathered: set[int],
        caches: bool = True,
    ) -> None:
        super().__init__()
        self.allocator, self.half, self.caches, self.gathered = allocator, half, caches, gathered
        self._casts: dict[int, Tensor] = {}
        self._is_active = False

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that stays in this mode in the backward pass, which leaves all modes."""

        def again(*args: Any, **kwargs: Any) -> Any:
            if self._is_active:
                return forward(*args, **kwargs)
            with Kernels(self.allocator, half=self.half, gathered=self.gathered, caches=False):
                return forward(*args, **kwargs)

        return again

    def __enter__(self) -> Kernels:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._is_active = True
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.half and func in CAST_BY_AUTOCAST:
            args, kwargs = tree_map_only(Tensor, self._cast, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._is_active = False
        self._casts.clear()

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """Run fused attention; torch converts boolean masks to the dtype of the query, in each layer."""
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        return _FusedAttention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]

    def _cast(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (self.caches and tensor.is_leaf and tensor.requires_grad):
            return self._to_half(tensor)
        if id(tensor) not in self._casts:
            self._casts[id(tensor)] = self._to_half(tensor)
        return self._casts[id(tensor)]

    def _to_half(self, tensor: Tensor) -> Tensor:
        self.allocator.paused = id(tensor) in self.gathered
        try:
            return tensor.to(torch.bfloat16)
        finally:
            self.allocator.paused = False


class _FusedAttention(Function):
    """The shapes of fused attention: for backward it keeps its inputs, its result, and a number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        row_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, row_sums, mask)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None

"""The memory that a process of a run needs: weights, gradients, optimizer, activations, communication.

Not counted: the allocator's fragmentation, workspaces of kernels, and the few hundred MB of a CUDA context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from janus_modular.model.batch import Batch
from janus_modular.model.model import JanusModel
from janus_modular.sequence import IGNORE_INDEX
from janus_modular.training.memory_simulation import simulated_peak
from janus_modular.training.optimizer import OptimizerList, build_optimizer
from janus_modular.training.parallel import blocks_of
from janus_modular.training.processes import BUCKET
from janus_modular.training.schema import OptimizerConfig

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a process needs at the peak of a step; all but activations follow from parameters alone."""

    parameters: int  # this process's part, in float32
    gradients: int  # of trainable parameters
    optimizer: int  # what the optimizer keeps of trainable parameters
    activations: int = 0  # beyond the gradients: what backward needs, targets, temporary results
    communication: int = 0  # gathered blocks of sharded components, or the buffer that sums gradients

    @property
    def total(self) -> int:
        """Return the sum."""
        resident = self.parameters + self.gradients + self.optimizer
        return resident + self.activations + self.communication


def estimate_memory(
    model: JanusModel,
    batches: Sequence[Batch] = (),
    *,
    optimizer: OptimizerConfig | OptimizerList | None = None,
    half: bool = False,
    sharded: Sequence[str] = (),
    world: int = 1,
    recomputed: Sequence[str] = (),
) -> MemoryEstimate:
    """Return the memory of a step of these micro-batches; without micro-batches, of the parameters only.

    The blocks of ``sharded`` components are divided among ``world`` processes; each process gathers two
    blocks at a time. ``recomputed`` components keep only the inputs of their blocks. With ``half``, the
    computation is in bfloat16, as under autocast.
    """
    blocks = [block for name in sharded for block in blocks_of(name, model.get_submodule(name), "parallel")]
    shards = {id(p): world for block in blocks for p in block.parameters()}
    sizes = {p: -(-p.numel() // shards.get(id(p), 1)) for p in model.parameters()}
    trainable = sum(size for p, size in sizes.items() if p.requires_grad)
    keeps = {p: len(names - {"step"}) for p, names in _kept(model, optimizer).items()}
    communication = 0
    if world > 1:
        largest = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
        whole = sum(size for p, size in sizes.items() if p.requires_grad and id(p) not in shards)
        gathered = (2 * (2 if half else FLOAT32_BYTES) + FLOAT32_BYTES) * largest
        communication = max(gathered, FLOAT32_BYTES * min(BUCKET, whole))
    divided = {name: world for name, p in model.named_parameters() if id(p) in shards and world > 1}
    gradients = FLOAT32_BYTES * trainable
    peak = max(
        (
            simulated_peak(
                model,
                batch,
                half=half,
                recomputed=recomputed,
                shards=divided,
                accumulates=len(batches) > 1,
            )
            for batch in largest_batches(batches)
        ),
        default=0,
    )
    return MemoryEstimate(
        FLOAT32_BYTES * sum(sizes.values()),
        gradients,
        FLOAT32_BYTES * sum(sizes[p] * keeps.get(p, 2) for p in sizes if p.requires_grad),
        max(0, peak - gradients),
        communication,
    )


def _kept(
    model: nn.Module, optimizer: OptimizerConfig | OptimizerList | None
) -> dict[nn.Parameter, set[str]]:
    if isinstance(optimizer, OptimizerList):
        return optimizer.state_names()
    if not any(p.requires_grad for p in model.parameters()):
        return {}
    return build_optimizer(model, optimizer or OptimizerConfig()).state_names()


def largest_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Return the micro-batches that may need the most: by positions, labels, pixels read and images drawn."""
    measures: tuple[Callable[[Batch], int], ...] = (
        lambda batch: batch.tokens.numel(),
        lambda batch: int((batch.labels != IGNORE_INDEX).sum()),
        _pixels_read,
        lambda batch: len(batch.image_seeds),
    )
    chosen = {id(max(batches, key=measure)): max(batches, key=measure) for measure in measures if batches}
    return list(chosen.values())


def _pixels_read(batch: Batch) -> int:
    """Return the number of pixels of a batch's input images, which may have several sizes."""
    return sum(group.numel() for group in batch.input_groups)

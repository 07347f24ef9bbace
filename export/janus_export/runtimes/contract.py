"""Optional capabilities of runtimes and their sessions, which gates and benchmarks use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from janus_export.bundle.bundle import Bundle
from janus_export.runtimes.kv_cache import KVCache
from janus_modular.protocols import Runtime, VariantRuntime


@runtime_checkable
class BundleRuntime(VariantRuntime, Protocol):
    """A runtime of a variant of a bundle in this package's format."""

    bundle: Bundle


@runtime_checkable
class RunsGraphs(Protocol):
    """A runtime that runs single graphs on numpy arrays; verification of graphs uses it."""

    def run(self, name: str, /, *inputs: Any) -> Any:
        """Return an array, or a tuple of them."""
        ...


@runtime_checkable
class ReadsInChunks(Protocol):
    """A runtime that reads prompts in chunks, which must not change the results."""

    def in_chunks(self, positions: int) -> Runtime:
        """Return the runtime with chunks of so many positions, over the same opened graphs."""
        ...


@runtime_checkable
class RunsOnDevice(Protocol):
    """A runtime that names the device that it runs on."""

    @property
    def device(self) -> Any:
        """The device: its ``name``, and its ``memory`` (cpu, cuda)."""
        ...


@runtime_checkable
class GivesEvidence(Protocol):
    """A runtime whose execution a manifest records: which engines ran, on which GPU."""

    @property
    def evidence(self) -> Mapping[str, str]:
        """The keys ``engines`` and ``gpu``, and the version of the library."""
        ...


@runtime_checkable
class ReadableCache(Protocol):
    """A session whose cache can be read and written; verification fills unused positions."""

    kv_cache: KVCache

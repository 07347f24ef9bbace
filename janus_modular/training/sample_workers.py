"""Threads, or processes, that prepare samples ahead of their use, in order."""

from __future__ import annotations

import gc
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_all_start_methods, get_context, parent_process
from typing import Any, Generic, Literal, TypeVar

from janus_modular.errors import ConfigError, TrainingError

WorkerType = Literal["thread", "process"]

CHUNK = 32
"""Calls for each worker that `SampleWorkers.map` makes ahead."""

ArgumentT = TypeVar("ArgumentT")
ResultT = TypeVar("ResultT")

_function: Callable[[Any], Any] | None = None  # of this worker process


class SampleWorkers(Generic[ArgumentT, ResultT]):
    """Workers that call a function; without any, calls run at once in the caller.

    Processes are forks of this process: they share its memory until it is written to, so that neither sources
    nor processors are copied or opened again, and they must not use a GPU. Results are pickled.
    """

    def __init__(
        self, function: Callable[[ArgumentT], ResultT], workers: int, worker_type: WorkerType = "thread"
    ) -> None:
        """Start the workers.

        Raises:
            ConfigError: this system cannot fork processes.
        """
        self.function, self.workers = function, workers
        self._pool: Executor | None = None
        self._is_process = worker_type == "process" and workers > 0
        if self._is_process:
            self._pool = _forked(function, workers)
        elif workers:
            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="samples")

    def submit(self, argument: ArgumentT) -> Future[ResultT]:
        """Return the future result of a call."""
        if self._pool is None:
            future: Future[ResultT] = Future()
            try:
                future.set_result(self.function(argument))
            except Exception as error:
                future.set_exception(error)
            return future
        if self._is_process:
            return self._pool.submit(_call, argument)
        return self._pool.submit(self.function, argument)

    def result(self, future: Future[ResultT]) -> ResultT:
        """Wait for a result.

        Raises:
            TrainingError: a worker process was killed.
            Exception: what the call raised.
        """
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise TrainingError(
                "a process that prepares samples was killed, by a lack of memory perhaps. Set fewer workers,"
                " or worker_type=thread; `data check` finds a sample that ends a process."
            ) from error

    def map(self, arguments: Iterator[ArgumentT]) -> Iterator[ResultT]:
        """Yield the results of calls in order, some of which run ahead."""
        if self._pool is None:
            yield from map(self.function, arguments)
            return
        while chunk := list(islice(arguments, CHUNK * self.workers)):
            yield from map(self.result, [self.submit(argument) for argument in chunk])

    def close(self) -> None:
        """Cancel calls that have not begun, and end the workers without waiting for them."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> SampleWorkers[ArgumentT, ResultT]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _forked(function: Callable[[Any], Any], workers: int) -> ProcessPoolExecutor:
    if "fork" not in get_all_start_methods():
        raise ConfigError(
            "worker_type: found process, and this system cannot fork processes; expected thread here."
        )
    pool = ProcessPoolExecutor(workers, get_context("fork"), _initialize, (function,))
    with warnings.catch_warnings():  # Python 3.12 warns of threads, whose locks no sample needs
        warnings.simplefilter("ignore", DeprecationWarning)
        pool.submit(os.getpid).result()  # all are forked now, before the caller starts threads
    return pool


def _initialize(function: Callable[[Any], Any]) -> None:
    """Prepare a worker: Ctrl-C is the parent's to handle, and the worker ends with its parent.

    The parent's objects are never collected here: some, such as the process group of a former run, would wait
    for ever for threads, which a fork does not copy.
    """
    gc.freeze()
    global _function
    _function = function
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        connection.wait([parent.sentinel])
        os._exit(1)


def _call(argument: Any) -> Any:
    assert _function is not None
    return _function(argument)

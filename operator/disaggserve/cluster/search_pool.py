"""The processes that search: the event loop and the lease never wait for a search or a compiler."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from disaggserve import plan

log = logging.getLogger(__name__)
T = TypeVar("T")


def _begin() -> None:
    """Runs first in a search process: below the operator in priority, gone when it is gone, and warm."""
    os.nice(5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=follow, name="parent", daemon=True).start()
    plan.warm_up()


class SearchPool(Executor):
    """Search processes that are started anew when one dies (out of memory, killed).

    What was being searched then ends in BrokenExecutor, and its reconcile asks again. Not for several threads.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._start()

    def _start(self) -> None:
        # Forked before any thread runs would be faster; spawned is right whatever runs.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self._processes, mp_context=context, initializer=_begin)
        self._first = self._pool.submit(os.getpid)

    @property
    def warm(self) -> bool:
        """Whether a search would begin at once: the compiled simulator is loaded."""
        if not self._first.done() or self._first.cancelled():
            return False
        error = self._first.exception()
        if error is not None:
            self._again(error)
        return error is None

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        try:
            return self._pool.submit(fn, *args, **kwargs)
        except BrokenProcessPool as error:
            self._again(error)
            return self._pool.submit(fn, *args, **kwargs)

    def _again(self, error: BaseException) -> None:
        log.warning("the search process died (%s); another one is started", error)
        self._start()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the processes where they stand: a search that nobody waits for is worth nothing."""
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()

"""The only place of this package that sleeps: waiting for a condition until a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable

from e2e.controlplane.errors import NotReady


def wait_until(
    condition: Callable[[], bool], what: str, *, timeout_s: float, interval_s: float = 0.05
) -> float:
    """Ask ``condition`` until it says yes; returns how many seconds that took.

    Raises ``NotReady`` naming ``what`` at the deadline. What the condition raises goes through.
    """
    start_s = time.monotonic()
    while True:
        satisfied = condition()
        elapsed_s = time.monotonic() - start_s
        if satisfied:
            return elapsed_s
        if elapsed_s >= timeout_s:
            raise NotReady(what, timeout_s)
        time.sleep(interval_s)

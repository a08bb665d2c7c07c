"""The router's choice rule: the router calls these functions, the simulator compiles the very same ones.

Plain Python over number sequences, so that numba takes them as they are. Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence


def choose_prefill(queued_tokens: Sequence[int]) -> int:
    """Index of the prefill instance with the fewest prompt tokens that are queued or being computed."""
    best = 0
    for k in range(1, len(queued_tokens)):
        if queued_tokens[k] < queued_tokens[best]:
            best = k
    return best


def choose_decode(kv_tokens: Sequence[int]) -> int:
    """Index of the decode instance with the fewest KV tokens: prompts and what was generated for them so far."""
    best = 0
    for k in range(1, len(kv_tokens)):
        if kv_tokens[k] < kv_tokens[best]:
            best = k
    return best

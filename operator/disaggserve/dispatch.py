"""The router's choice rule: the router calls these functions, the simulator compiles the very same ones.

Plain Python over number sequences, so that numba takes them as they are. Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence


def choose_prefill(queued_tokens: Sequence[int], ns_per_token: Sequence[int] = ()) -> int:
    """Index of the prefill instance with the fewest prompt tokens that are queued or being computed.

    Where instances compute prompts at different speeds (small chunks are slower), `ns_per_token` says how fast
    each is, and the fewest nanoseconds win; left out, all are alike.
    """
    best = 0
    weighed = len(ns_per_token) > 0
    least = queued_tokens[0] * ns_per_token[0] if weighed else queued_tokens[0]
    for k in range(1, len(queued_tokens)):
        load = queued_tokens[k] * ns_per_token[k] if weighed else queued_tokens[k]
        if load < least:
            best, least = k, load
    return best


def choose_decode(kv_tokens: Sequence[int]) -> int:
    """Index of the decode instance with the fewest KV tokens: prompts and what was generated for them so far."""
    best = 0
    for k in range(1, len(kv_tokens)):
        if kv_tokens[k] < kv_tokens[best]:
            best = k
    return best

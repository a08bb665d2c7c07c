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


def until_first_token(queued_tokens: Sequence[int], uncached_tokens: Sequence[int]) -> list[int]:
    """Tokens that each prefill instance computes until a prompt's first token: the queue and, of the prompt, what its prefix
    cache does not hold. `choose_prefill` of them is prefix affinity.

    A cached prefix is worth its own length and no more: the instance chosen has at most as many tokens queued beyond the
    shortest queue as it holds of the prompt.
    """
    return [queued_tokens[k] + uncached_tokens[k] for k in range(len(queued_tokens))]


def choose_decode(kv_tokens: Sequence[int]) -> int:
    """Index of the decode instance with the fewest KV tokens: prompts and what was generated for them so far."""
    best = 0
    for k in range(1, len(kv_tokens)):
        if kv_tokens[k] < kv_tokens[best]:
            best = k
    return best

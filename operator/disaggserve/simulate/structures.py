"""What the kernel is built of: a tournament tree of next events, chains of requests, heaps; all compiled.

The tables that they work on are plain int64 arrays; nothing here knows what a column means but NXT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from disaggserve.simulate import cache

cache.prepare()

import numba  # noqa: E402 — the cache folder must be named before numba is imported

NEVER = 2**62
NXT = 0  # column of a request's successor in the chain that it is in

F = TypeVar("F", bound=Callable[..., Any])


# What only compiled code calls needs no wrapper for Python, which takes most of the time to compile.
_INNER = {"_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def inlined(function: F) -> F:
    """Compiled by itself, then made part of its callers: for what is small."""
    return cast(F, numba.njit(forceinline=True, **_INNER)(function))


def spliced(function: F) -> F:
    """Made part of its caller before either is compiled: for what is large and called from one place. (Inlined it
    would be optimised twice, with all that it calls, and take most of the time to compile.)"""
    return cast(F, numba.njit(inline="always", **_INNER)(function))


def compiled(function: F) -> F:
    """Compiled once, called: for what is large and called from several places."""
    return cast(F, numba.njit(**_INNER)(function))


def cached(function: F) -> F:
    """Compiled, and kept in the cache for other processes."""
    return cast(F, numba.njit(cache=True, nogil=True, _nrt=False)(function))


@inlined
def schedule(tree: Any, when: Any, source: int, t: int) -> None:
    """The next event of a source is at t; replays its matches up the tree."""
    if when[source] == t:
        return
    when[source] = t
    node = (source + len(tree) // 2) >> 1
    while node >= 1:
        a = tree[2 * node]
        b = tree[2 * node + 1]
        winner = a if when[a] <= when[b] else b
        if winner == tree[node] and winner != source:
            return
        tree[node] = winner
        node >>= 1


@inlined
def append(requests: Any, table: Any, row: int, head: int, r: int) -> None:
    """Put request r last in the chain whose head stands in that column and whose tail in the next one."""
    requests[r, NXT] = -1
    if table[row, head] < 0:
        table[row, head] = r
    else:
        requests[table[row, head + 1], NXT] = r
    table[row, head + 1] = r


@inlined
def insert(requests: Any, table: Any, row: int, head: int, r: int, column: int) -> None:
    """Put request r into that chain, which is in order of `column`, behind its equals."""
    before, after = -1, table[row, head]
    if after >= 0 and requests[table[row, head + 1], column] <= requests[r, column]:
        before, after = table[row, head + 1], -1
    while after >= 0 and requests[after, column] <= requests[r, column]:
        before, after = after, requests[after, NXT]
    requests[r, NXT] = after
    if before < 0:
        table[row, head] = r
    else:
        requests[before, NXT] = r
    if after < 0:
        table[row, head + 1] = r


@inlined
def prepend(requests: Any, table: Any, row: int, head: int, r: int) -> None:
    """Put request r first in that chain."""
    requests[r, NXT] = table[row, head]
    if table[row, head] < 0:
        table[row, head + 1] = r
    table[row, head] = r


@inlined
def push(heaps: Any, k: int, size: int, key: int) -> None:
    """Add a key to heap k of `size`."""
    i = size
    while i > 0:
        up = (i - 1) >> 1
        if heaps[k, up] <= key:
            break
        heaps[k, i] = heaps[k, up]
        i = up
    heaps[k, i] = key


@inlined
def remove(heaps: Any, k: int, size: int, i: int) -> None:
    """Take out element i of heap k of `size`."""
    key = heaps[k, size - 1]
    size -= 1
    if i == size:
        return
    while i > 0 and heaps[k, (i - 1) >> 1] > key:
        heaps[k, i] = heaps[k, (i - 1) >> 1]
        i = (i - 1) >> 1
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and heaps[k, child + 1] < heaps[k, child]:
            child += 1
        if heaps[k, child] >= key:
            break
        heaps[k, i] = heaps[k, child]
        i = child
    heaps[k, i] = key

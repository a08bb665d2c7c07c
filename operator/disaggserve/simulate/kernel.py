"""The event kernel: prefill and decode instances serving one list of requests, in integer time.

Time is counted in ticks of 1/1024 ns (int64), so that k decode steps add up in closed form exactly. Every
duration is at least one tick. State lies in tables of int64, one row per request, instance or lane; a list of
requests is a chain through the column NXT. Each source of events has one next time in a tournament tree; the
earliest goes first, ties go to the lowest source. Sources in order: arrivals, prefill ends (by instance),
transfer ends (by decode instance), lanes' step boundaries, prefill starts (by instance).

A lane does not stop at every step: it plans as many equal steps as nobody disturbs (until its next request
ends, or memory for growing contexts runs out) and is cut short at the first boundary after a disturbance. The
blocks that a plan will grow into are taken from the instance's slack at once, and given back when it is cut;
so slack = free blocks − growth still planned. The rules themselves are in the package's docstring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from disaggserve import dispatch
from disaggserve.simulate import cache

cache.prepare()

import numba  # noqa: E402 — the cache folder must be named before numba is imported

TICKS = 1024  # per nanosecond
NEVER = 2**62
_ID_BITS = 24  # of a key in a lane's heap: finishing step above, request below
MAX_REQUESTS = 1 << _ID_BITS
_ID_MASK = MAX_REQUESTS - 1

# One row per request. Times in ticks, -1 = has not happened.
ARRIVAL, INPUT, STEPS, NXT, PRV, DONE, SOURCE, JOIN, START, FIRST, MOVED, BEGUN, LAST, EXTRA, BATCH = range(
    15
)
REQUEST_COLUMNS = 16
# STEPS: decode steps wanted, -1 = fits nowhere. DONE: steps made when it last left a lane. JOIN: the lane's
# step count when it joined, -1 = never. EXTRA: end of the batch (on a batch's first request, until then), then
# ticks of the recompute that it owes. BATCH: requests in the batch (on its first request).

# One row per prefill instance.
P_HEAD, P_TAIL, P_RUN, P_FREE, P_PP, P_BATCH, P_TABLE = range(7)
PREFILL_COLUMNS = 7
# One row per decode instance.
D_WHEAD, D_WTAIL, D_THEAD, D_TTAIL, D_SLACK, D_LINK, D_LANE, D_PP, D_OUTSIDE, D_TABLE = range(10)
DECODE_COLUMNS = 10
# One row per decode lane. The plan: from T0, after EXTRA ticks of recompute, K steps of E + Q·i (i = 0 … K−1)
# ticks; the first STEPS of them take SPAN. C = Σ (context + 1) of its N-th step, B requests in the batch, COUNT with those about to join.
L_T0, L_K, L_EXTRA, L_E, L_Q, L_STEPS, L_SPAN, L_C, L_B, L_N, L_TAIL, L_JHEAD, L_JTAIL, L_COUNT, L_DECODE = (
    range(15)
)
LANE_COLUMNS = 15

F = TypeVar("F", bound=Callable[..., Any])


def _compiled(function: F) -> F:
    return cast(F, numba.njit(forceinline=True, _nrt=False)(function))


def _cached(function: F) -> F:
    return cast(F, numba.njit(cache=True, nogil=True, _nrt=False)(function))


_choose_prefill: Any = numba.njit(_nrt=False)(dispatch.choose_prefill)
_choose_decode: Any = numba.njit(_nrt=False)(dispatch.choose_decode)


@_compiled
def _set(tree: Any, when: Any, source: int, t: int) -> None:
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


@_compiled
def _blocks(tokens: int) -> int:
    return (tokens + 15) >> 4


@_compiled
def _prefill_ticks(
    total: int, squares: int, knots: Any, values: Any, sizes: Any, quad: Any, table: int
) -> Any:
    i = 0
    while i < sizes[table] - 2 and knots[table, i + 1] <= total:
        i += 1
    slope = (values[table, i + 1] - values[table, i]) / (knots[table, i + 1] - knots[table, i])
    ns = values[table, i] + slope * (total - knots[table, i]) + quad[table] * squares
    return max(1, int(np.rint(ns * 1024.0)))


@_compiled
def _push(heaps: Any, k: int, size: int, key: int) -> None:
    i = size
    while i > 0:
        up = (i - 1) >> 1
        if heaps[k, up] <= key:
            break
        heaps[k, i] = heaps[k, up]
        i = up
    heaps[k, i] = key


@_compiled
def _remove(heaps: Any, k: int, size: int, i: int) -> None:
    """Take out element i of a heap of `size`."""
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


@_compiled
def _span(lanes: Any, k: int, steps: int) -> Any:
    """Ticks from T0 to the end of so many steps of the plan."""
    return lanes[k, L_EXTRA] + steps * lanes[k, L_E] + lanes[k, L_Q] * (steps * (steps - 1) // 2)


@_compiled
def _steps_until(lanes: Any, k: int, t: int) -> Any:
    """The first step boundary of the plan at or after t, as a number of steps, at least 1.

    t never falls from one question to the next about one plan: the search goes on from the last answer.
    """
    x = t - lanes[k, L_T0]
    steps = lanes[k, L_STEPS]
    span = lanes[k, L_SPAN]
    if span >= x:
        return steps
    if x - span > 8 * lanes[k, L_E]:  # far on: solve the quadratic, then put its rounding right
        half = lanes[k, L_Q] * 0.5
        rest = lanes[k, L_E] - half
        working = float(x - lanes[k, L_EXTRA])
        steps = max(steps, int(2.0 * working / (rest + np.sqrt(rest * rest + 4.0 * half * working))) - 1)
        while steps > 1 and _span(lanes, k, steps - 1) >= x:
            steps -= 1
        span = _span(lanes, k, steps)
    while span < x:
        span += lanes[k, L_E] + lanes[k, L_Q] * steps
        steps += 1
    lanes[k, L_STEPS] = steps
    lanes[k, L_SPAN] = span
    return steps


@_compiled
def _growth(phases: Any, lanes: Any, k: int, steps: int) -> Any:
    """Blocks that a lane's batch takes after the first of so many steps from now."""
    more = steps - 1
    grown = (more >> 4) * lanes[k, L_B]
    step = lanes[k, L_N] + 1
    for i in range(more & 15):
        grown += phases[k, (1 - step - i) & 15]
    return grown


@_compiled
def _cut(
    k: int, t: int, seen: int, lanes: Any, phases: Any, decode: Any, tree: Any, when: Any, lane_source: int
) -> None:
    """End lane k's plan at its first boundary that is still to come at time t.

    `seen`: lanes up to this one have had their boundaries of this tick; -1 = none has.
    """
    if lanes[k, L_K] <= 1:
        return
    steps = _steps_until(lanes, k, t + 1 if k <= seen else t)
    if steps < lanes[k, L_K]:
        decode[lanes[k, L_DECODE], D_SLACK] += _growth(phases, lanes, k, lanes[k, L_K]) - _growth(
            phases, lanes, k, steps
        )
        lanes[k, L_K] = steps
        _set(tree, when, lane_source + k, lanes[k, L_T0] + _span(lanes, k, steps))


@_compiled
def _tighten(
    d: int, t: int, seen: int, lanes: Any, phases: Any, decode: Any, tree: Any, when: Any, lane_source: int
) -> None:
    """Cut every lane of decode instance d, so that its slack is what is free now."""
    for k in range(decode[d, D_LANE], decode[d, D_LANE] + decode[d, D_PP]):
        _cut(k, t, seen, lanes, phases, decode, tree, when, lane_source)


@_compiled
def _join(
    r: int,
    d: int,
    t: int,
    seen: int,
    reqs: Any,
    lanes: Any,
    phases: Any,
    decode: Any,
    tree: Any,
    when: Any,
    lane_source: int,
) -> None:
    """Deal a request to the lane with the fewest; it joins at that lane's next boundary."""
    k = decode[d, D_LANE]
    for other in range(k + 1, k + decode[d, D_PP]):
        if lanes[other, L_COUNT] < lanes[k, L_COUNT]:
            k = other
    lanes[k, L_COUNT] += 1
    reqs[r, NXT] = -1
    if lanes[k, L_JHEAD] < 0:
        lanes[k, L_JHEAD] = r
    else:
        reqs[lanes[k, L_JTAIL], NXT] = r
    lanes[k, L_JTAIL] = r
    if lanes[k, L_K] == 0:
        _set(tree, when, lane_source + k, t)
    else:
        _cut(k, t, seen, lanes, phases, decode, tree, when, lane_source)


@_compiled
def _admit(
    d: int, t: int, seen: int, reqs: Any, lanes: Any, phases: Any, decode: Any, tree: Any, when: Any,
    lane_source: int, moved_source: int, ticks_per_token: float, latency_ticks: float,
) -> None:  # fmt: skip
    """Admit waiting requests, first come first, while the blocks of the first one are free."""
    tight = False
    while decode[d, D_WHEAD] >= 0:
        r = decode[d, D_WHEAD]
        need = _blocks(reqs[r, INPUT] + reqs[r, DONE] + 1)
        if need > decode[d, D_SLACK] and not tight:
            _tighten(d, t, seen, lanes, phases, decode, tree, when, lane_source)
            tight = True
        if need > decode[d, D_SLACK]:
            return
        decode[d, D_SLACK] -= need
        decode[d, D_WHEAD] = reqs[r, NXT]
        if reqs[r, JOIN] >= 0 or latency_ticks < 0:
            if reqs[r, MOVED] < 0:
                reqs[r, MOVED] = t
            _join(r, d, t, seen, reqs, lanes, phases, decode, tree, when, lane_source)
            continue
        end = max(t, decode[d, D_LINK]) + max(
            1, int(np.rint(reqs[r, INPUT] * ticks_per_token + latency_ticks))
        )
        decode[d, D_LINK] = end
        reqs[r, MOVED] = end
        reqs[r, NXT] = -1
        if decode[d, D_THEAD] < 0:
            decode[d, D_THEAD] = r
            _set(tree, when, moved_source + d, end)
        else:
            reqs[decode[d, D_TTAIL], NXT] = r
        decode[d, D_TTAIL] = r


@_compiled
def _to_decode(
    r: int, t: int, reqs: Any, lanes: Any, phases: Any, decode: Any, loads: Any, tree: Any, when: Any,
    lane_source: int, moved_source: int, ticks_per_token: float, latency_ticks: float,
) -> None:  # fmt: skip
    """Hand a prefilled request to the decode instance that holds the fewest tokens."""
    d = 0
    if len(loads) > 1:
        for i in range(len(loads)):
            tokens = decode[i, D_OUTSIDE]
            for k in range(decode[i, D_LANE], decode[i, D_LANE] + decode[i, D_PP]):
                if lanes[k, L_K] > 0:
                    tokens += lanes[k, L_C] + lanes[k, L_B] * (_steps_until(lanes, k, t) - 1)
            loads[i] = tokens
        d = _choose_decode(loads)
    decode[d, D_OUTSIDE] += reqs[r, INPUT] + 1
    reqs[r, NXT] = -1
    if decode[d, D_WHEAD] >= 0:
        reqs[decode[d, D_WTAIL], NXT] = r
        decode[d, D_WTAIL] = r
    else:
        decode[d, D_WHEAD] = r
        decode[d, D_WTAIL] = r
        _admit(
            d, t, -1, reqs, lanes, phases, decode, tree, when, lane_source, moved_source, ticks_per_token, latency_ticks
        )  # fmt: skip


@_compiled
def _boundary(
    k: int, t: int, seen: int, reqs: Any, lanes: Any, phases: Any, heaps: Any, decode: Any, tree: Any, when: Any,
    knots: Any, values: Any, sizes: Any, quad: Any, base: Any, ctx: Any,
    lane_source: int, moved_source: int, ticks_per_token: float, latency_ticks: float, first_from_decode: bool,
) -> None:  # fmt: skip
    """A lane's plan has run to its end, or an idle lane gets work: ends, joins, grows, preempts, plans."""
    d = lanes[k, L_DECODE]
    now = lanes[k, L_N] + lanes[k, L_K]
    lanes[k, L_N] = now
    lanes[k, L_C] += lanes[k, L_B] * lanes[k, L_K]
    lanes[k, L_K] = 0

    ended = False
    while lanes[k, L_B] > 0 and heaps[k, 0] >> _ID_BITS <= now:
        r = heaps[k, 0] & _ID_MASK
        _remove(heaps, k, lanes[k, L_B], 0)
        if reqs[r, NXT] >= 0:
            reqs[reqs[r, NXT], PRV] = reqs[r, PRV]
        else:
            lanes[k, L_TAIL] = reqs[r, PRV]
        if reqs[r, PRV] >= 0:
            reqs[reqs[r, PRV], NXT] = reqs[r, NXT]
        tokens = reqs[r, INPUT] + reqs[r, STEPS]
        lanes[k, L_B] -= 1
        lanes[k, L_COUNT] -= 1
        lanes[k, L_C] -= tokens + 1
        phases[k, (tokens + 1 - now) & 15] -= 1
        decode[d, D_SLACK] += _blocks(tokens)
        reqs[r, LAST] = t
        ended = True
    if ended and decode[d, D_WHEAD] >= 0:
        _admit(
            d, t, seen, reqs, lanes, phases, decode, tree, when, lane_source, moved_source, ticks_per_token, latency_ticks
        )  # fmt: skip

    needed = phases[k, (1 - now) & 15]
    extra = 0
    r = lanes[k, L_JHEAD]
    while r >= 0:
        after = reqs[r, NXT]
        reqs[r, JOIN] = now
        if reqs[r, BEGUN] < 0:
            reqs[r, BEGUN] = t
        extra += reqs[r, EXTRA]
        tokens = reqs[r, INPUT] + reqs[r, DONE] + 1
        decode[d, D_OUTSIDE] -= tokens
        lanes[k, L_C] += tokens
        phases[k, (tokens - now) & 15] += 1
        _push(heaps, k, lanes[k, L_B], ((now + reqs[r, STEPS] - reqs[r, DONE]) << _ID_BITS) | r)
        lanes[k, L_B] += 1
        reqs[r, PRV] = lanes[k, L_TAIL]
        reqs[r, NXT] = -1
        if lanes[k, L_TAIL] >= 0:
            reqs[lanes[k, L_TAIL], NXT] = r
        lanes[k, L_TAIL] = r
        r = after
    lanes[k, L_JHEAD] = -1

    if needed > decode[d, D_SLACK]:
        _tighten(d, t, seen, lanes, phases, decode, tree, when, lane_source)
    while needed > decode[d, D_SLACK]:
        r = lanes[k, L_TAIL]
        key = ((reqs[r, JOIN] + reqs[r, STEPS] - reqs[r, DONE]) << _ID_BITS) | r
        i = 0
        while heaps[k, i] != key:
            i += 1
        _remove(heaps, k, lanes[k, L_B], i)
        done = reqs[r, DONE] + now - reqs[r, JOIN]
        tokens = reqs[r, INPUT] + done
        lanes[k, L_TAIL] = reqs[r, PRV]
        if reqs[r, PRV] >= 0:
            reqs[reqs[r, PRV], NXT] = -1
        lanes[k, L_B] -= 1
        lanes[k, L_COUNT] -= 1
        lanes[k, L_C] -= tokens + 1
        phases[k, (tokens + 1 - now) & 15] -= 1
        decode[d, D_OUTSIDE] += tokens + 1
        if reqs[r, JOIN] == now:
            decode[d, D_SLACK] += _blocks(tokens + 1)
            extra -= reqs[r, EXTRA]
        else:
            decode[d, D_SLACK] += _blocks(tokens)
            if tokens & 15 == 0:
                needed -= 1
        reqs[r, DONE] = done
        reqs[r, EXTRA] = decode[d, D_PP] * _prefill_ticks(
            tokens, tokens * tokens, knots, values, sizes, quad, decode[d, D_TABLE]
        )
        reqs[r, NXT] = decode[d, D_WHEAD]
        if decode[d, D_WHEAD] < 0:
            decode[d, D_WTAIL] = r
        decode[d, D_WHEAD] = r
    decode[d, D_SLACK] -= needed

    size = lanes[k, L_B]
    if size == 0:
        _set(tree, when, lane_source + k, NEVER)
        return
    table = decode[d, D_TABLE]
    last = base.shape[1] - 1
    if size <= last:
        fixed = base[table, size]
        slope = ctx[table, size]
    else:
        fixed = base[table, last] + (base[table, last] - base[table, last - 1]) * (size - last)
        slope = ctx[table, last]
    lanes[k, L_T0] = t
    lanes[k, L_EXTRA] = extra
    lanes[k, L_E] = fixed + slope * lanes[k, L_C]
    lanes[k, L_Q] = slope * size
    lanes[k, L_STEPS] = 1
    lanes[k, L_SPAN] = extra + lanes[k, L_E]
    steps = (heaps[k, 0] >> _ID_BITS) - now
    grown = _growth(phases, lanes, k, steps)
    if grown > decode[d, D_SLACK]:
        steps = min(steps, 1 + ((decode[d, D_SLACK] // size) << 4))
        grown = _growth(phases, lanes, k, steps)
        while True:
            next_one = phases[k, (1 - now - steps) & 15]
            if grown + next_one > decode[d, D_SLACK]:
                break
            grown += next_one
            steps += 1
    decode[d, D_SLACK] -= grown
    lanes[k, L_K] = steps
    _set(tree, when, lane_source + k, t + _span(lanes, k, steps))
    if first_from_decode:
        r = lanes[k, L_TAIL]
        while r >= 0 and reqs[r, JOIN] == now:
            if reqs[r, FIRST] < 0:
                reqs[r, FIRST] = t + _span(lanes, k, 1)
            r = reqs[r, PRV]


Table = npt.NDArray[np.int64]


def tables(prefill: Table, decode: Table, heap_size: int) -> tuple[Table, ...]:
    """The kernel's own tables for these instances, in the order in which `serve` takes them. Fills in D_LANE.

    They are made here because compiled code that makes no array needs no reference counts (`_nrt`), which took
    half of its time.
    """
    prefills, decodes = len(prefill), len(decode)
    lanes_of = decode[:, D_PP]
    decode[:, D_LANE] = np.cumsum(lanes_of) - lanes_of
    count = int(lanes_of.sum())
    lanes = np.zeros((count, LANE_COLUMNS), np.int64)
    lanes[:, L_DECODE] = np.repeat(np.arange(decodes), lanes_of)
    lanes[:, [L_TAIL, L_JHEAD]] = -1
    phases = np.zeros((count, 16), np.int64)
    heaps = np.empty((count, heap_size), np.int64)
    free_at = np.zeros((prefills, int(prefill[:, P_PP].max(initial=1))), np.int64)
    width = 1 << (2 * prefills + decodes + count).bit_length()
    when = np.full(width, NEVER, np.int64)
    tree = np.zeros(2 * width, np.int64)
    return (
        lanes,
        phases,
        heaps,
        free_at,
        np.zeros(prefills, np.int64),
        np.zeros(decodes, np.int64),
        when,
        tree,
    )


@_cached
def serve(
    requests: Any, times: Any, reqs: Any, prefill: Any, decode: Any, lanes: Any, phases: Any, heaps: Any, free_at: Any,
    queued: Any, loads: Any, when: Any, tree: Any, knots: Any, values: Any, sizes: Any, quad: Any, base: Any, ctx: Any,
    ticks_per_token: float, latency_ticks: float, first_from_decode: bool,
) -> int:  # fmt: skip
    """Serve the requests; fills in `times`; returns the number of events.

    requests int64 [3, n]: arrival ns, not falling; prompt tokens; decode steps, -1 = fits nowhere. times int64
    [5, n]: ns of prefill start, first token, end of transfer, decode start, last token; -1 where it never happened.

    With no prefill instance requests arrive at the decode side. A negative latency: KV needs no transfer. With no
    decode instance every request ends at its prefill's end.

    int64: reqs [n, REQUEST_COLUMNS] (as it comes), prefill [p, PREFILL_COLUMNS], decode [d, DECODE_COLUMNS], those of `tables`,
    sizes [shapes], base and ctx [shapes, batches] in ticks; float64 ns: knots, values [shapes, knots],
    quad [shapes].
    """
    n, prefills, decodes, width = len(reqs), len(prefill), len(decode), len(when)
    ended_source = 1
    moved_source = ended_source + prefills
    lane_source = moved_source + decodes
    start_source = lane_source + len(lanes)
    for i in range(width):
        tree[width + i] = i
    for i in range(width - 1, 0, -1):
        tree[i] = tree[2 * i]
    origin = requests[0, 0] if n else 0
    for r in range(n):
        for column in range(REQUEST_COLUMNS):
            reqs[r, column] = -1
        reqs[r, ARRIVAL] = (requests[0, r] - origin) * TICKS
        reqs[r, INPUT] = requests[1, r]
        reqs[r, STEPS] = requests[2, r]
        reqs[r, DONE] = 0
        reqs[r, EXTRA] = 0
    coming = 0
    while coming < n and reqs[coming, STEPS] < 0:
        coming += 1
    if coming < n:
        _set(tree, when, 0, reqs[coming, ARRIVAL])

    events = 0
    seen, seen_at = -1, -1
    while True:
        source = tree[1]
        t = when[source]
        if t == NEVER:
            break
        events += 1
        if source >= start_source:
            p = source - start_source
            free = prefill[p, P_FREE]
            total, squares, count = 0, 0, 0
            head = prefill[p, P_HEAD]
            r = head
            while r >= 0:
                tokens = reqs[r, INPUT]
                if _blocks(tokens) > free or (count > 0 and total + tokens > prefill[p, P_BATCH]):
                    break
                free -= _blocks(tokens)
                total += tokens
                squares += tokens * tokens
                count += 1
                reqs[r, START] = t
                r = reqs[r, NXT]
            if count == 0:  # blocked until a transfer frees blocks
                _set(tree, when, source, NEVER)
                continue
            prefill[p, P_FREE] = free
            prefill[p, P_HEAD] = r
            ticks = _prefill_ticks(total, squares, knots, values, sizes, quad, prefill[p, P_TABLE])
            end = t
            for stage in range(prefill[p, P_PP]):
                end = max(end, free_at[p, stage]) + ticks
                free_at[p, stage] = end
            reqs[head, EXTRA] = end
            reqs[head, BATCH] = count
            if prefill[p, P_RUN] < 0:
                prefill[p, P_RUN] = head
                _set(tree, when, ended_source + p, end)
            _set(tree, when, source, free_at[p, 0] if r >= 0 else NEVER)
        elif source >= lane_source:
            k = source - lane_source
            seen = max(seen, k) if seen_at == t else k
            seen_at = t
            _boundary(
                k, t, seen, reqs, lanes, phases, heaps, decode, tree, when, knots, values, sizes, quad,
                base, ctx, lane_source, moved_source, ticks_per_token, latency_ticks, first_from_decode,
            )  # fmt: skip
        elif source >= moved_source:
            d = source - moved_source
            r = decode[d, D_THEAD]
            decode[d, D_THEAD] = reqs[r, NXT]
            _set(tree, when, source, reqs[reqs[r, NXT], MOVED] if reqs[r, NXT] >= 0 else NEVER)
            if prefills:
                p = reqs[r, SOURCE]
                prefill[p, P_FREE] += _blocks(reqs[r, INPUT])
                if prefill[p, P_HEAD] >= 0 and when[start_source + p] == NEVER:
                    _set(tree, when, start_source + p, max(t, free_at[p, 0]))
            _join(r, d, t, -1, reqs, lanes, phases, decode, tree, when, lane_source)
        elif source >= ended_source:
            p = source - ended_source
            r = prefill[p, P_RUN]
            freed = False
            for _ in range(reqs[r, BATCH]):
                after = reqs[r, NXT]
                queued[p] -= reqs[r, INPUT]
                reqs[r, EXTRA] = 0
                if not first_from_decode or reqs[r, STEPS] == 0:
                    reqs[r, FIRST] = t
                if reqs[r, STEPS] == 0:
                    reqs[r, LAST] = t
                    prefill[p, P_FREE] += _blocks(reqs[r, INPUT])
                    freed = True
                else:
                    _to_decode(
                        r, t, reqs, lanes, phases, decode, loads, tree, when, lane_source, moved_source,
                        ticks_per_token, latency_ticks,
                    )  # fmt: skip
                r = after
            if r < 0:
                prefill[p, P_TAIL] = -1
            prefill[p, P_RUN] = -1 if r == prefill[p, P_HEAD] else r
            _set(tree, when, source, reqs[r, EXTRA] if prefill[p, P_RUN] >= 0 else NEVER)
            if freed and prefill[p, P_HEAD] >= 0 and when[start_source + p] == NEVER:
                _set(tree, when, start_source + p, max(t, free_at[p, 0]))
        else:
            r = coming
            coming += 1
            while coming < n and reqs[coming, STEPS] < 0:
                coming += 1
            _set(tree, when, 0, reqs[coming, ARRIVAL] if coming < n else NEVER)
            if prefills:
                p = _choose_prefill(queued)
                queued[p] += reqs[r, INPUT]
                reqs[r, SOURCE] = p
                reqs[r, NXT] = -1
                if prefill[p, P_TAIL] >= 0:
                    reqs[prefill[p, P_TAIL], NXT] = r
                prefill[p, P_TAIL] = r
                if prefill[p, P_HEAD] < 0:
                    prefill[p, P_HEAD] = r
                    _set(tree, when, start_source + p, max(t, free_at[p, 0]))
            else:
                reqs[r, FIRST] = t
                if reqs[r, STEPS] == 0:
                    reqs[r, LAST] = t
                else:
                    _to_decode(
                        r, t, reqs, lanes, phases, decode, loads, tree, when, lane_source, moved_source,
                        ticks_per_token, latency_ticks,
                    )  # fmt: skip

    for r in range(n):
        for i, column in enumerate((START, FIRST, MOVED, BEGUN, LAST)):
            ticks = reqs[r, column]
            times[i, r] = -1 if ticks < 0 else ticks // TICKS + origin
    return events

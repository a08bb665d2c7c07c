"""The event kernel: instances that may prefill, may decode, or both, serving one list of requests, in integer time.

Time is counted in ticks of 1/1024 ns (int64), so that k decode steps add up in closed form exactly. Every
duration is at least one tick. State lies in tables of int64, one row per request, instance or lane; a list of
requests is a chain through the column NXT. Each source of events has one next time in a tournament tree; the
earliest goes first, ties go to the lowest source. Sources in order: the routers' view, arrivals, transfer ends
(by instance), lanes (a step ends, the next begins).

Instances stand in the order prefill, mixed, decode: those that may prefill are the first ones, those that may
decode the last ones. An instance has pp lanes, and lane s's row also holds when its pipeline stage s is free.

With pp 1 a lane does not stop at every decode step: it plans as many equal steps as nobody disturbs (until its
next request ends, or memory for growing contexts runs out) and is cut short at the first boundary after a
disturbance. The blocks that a plan will grow into are taken from the instance's slack at once, and given back
when it is cut; so slack = free blocks − growth still planned. With pp > 1 lanes wait for each other's stages,
and every step is an event. The rules themselves are in the package's docstring.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from disaggserve import dispatch
from disaggserve.simulate.structures import (
    NEVER,
    NXT,
    append,
    cached,
    compiled,
    inlined,
    insert,
    prepend,
    push,
    remove,
    schedule,
    spliced,
)

TICKS = 1024  # per nanosecond
_ID_BITS = 24  # of a key in a lane's heap: finishing step above, request below
MAX_REQUESTS = 1 << _ID_BITS
_ID_MASK = MAX_REQUESTS - 1

# One row per request. Times in ticks, -1 = has not happened.
(INPUT, STEPS, PAST, PRV, DONE, PREFILLER, DECODER, JOIN, OWED, READY, START, FIRST, MOVED, BEGUN, LAST) = (
    range(1, 16)
)
REQUEST_COLUMNS = 16
# STEPS: decode steps wanted, -1 = fits nowhere. PAST: prompt tokens that need no more compute. DONE: steps made
# when it last left a lane. JOIN: the lane's step count when it joined, -1 = never. OWED: ticks of one stage for
# its recompute or swap. READY: when its KV may be moved from, NEVER = now. MOVED: when it is there; in a stepwise
# pull READY until the decode side has heard of it.

# One row per instance. Chains, each with head and tail: prompts not wholly in a step (Q), what waits to be
# admitted for decode (W) and was preempted (B), transfers under way to it (T), by MOVED.
(
    I_LANE, I_PP, I_TABLE, I_PREFILLS, I_DECODES, I_CHUNKED, I_TOKENS, I_REQUESTS, I_SLACK, I_MARK, I_PULLED,
    I_LINK, I_OUTSIDE, I_QHEAD, I_QTAIL, I_WHEAD, I_WTAIL, I_BHEAD, I_BTAIL, I_THEAD, I_TTAIL,
    I_BLOCKS, I_RESERVE,
) = range(23)  # fmt: skip
INSTANCE_COLUMNS = 23
I_CHAINS = (I_QHEAD, I_WHEAD, I_BHEAD, I_THEAD)
# MARK, PULLED: inline pulls go on while those pulled and not in a batch hold fewer blocks than MARK. OUTSIDE:
# KV tokens of what is assigned here for decode and in no lane's batch. RESERVE, of all its BLOCKS: stay free when
# decode admits, unless all are.

# One row per lane. The plan: from T0, after EXTRA ticks for prompts, recomputes and swaps, K decode steps of
# E + Q·i (i = 0 … K−1) ticks; the first STEPS of them take SPAN. C = Σ (context + 1) of its N-th step, B
# requests in the batch, COUNT with those about to join. FRESH: those that joined since the last decode step and
# whose next step is the first in a block (they have it). ENDING: prompts that the step in progress completes.
(
    L_INSTANCE, L_RUNNING, L_T0, L_K, L_EXTRA, L_E, L_Q, L_STEPS, L_SPAN, L_C, L_B, L_N, L_TAIL, L_JHEAD, L_JTAIL,
    L_COUNT, L_FRESH, L_ENDING, L_PULL, L_LAST_STAGE, L_STAGE_FREE, L_PHASE,
) = range(22)  # fmt: skip
LANE_COLUMNS = L_PHASE + 16  # L_PHASE + x: requests of the batch by (tokens − step) mod 16

_VIEW, _ARRIVALS, _TRANSFERS = range(3)

Table = npt.NDArray[np.int64]


class World(NamedTuple):
    """The state of requests and instances, and the rules of the deployment. int64 tables; always of the same
    types: every new combination would be compiled anew. Beside it stand `heaps` [lanes, …]: what is in each lane's
    batch, by the step after which it ends. (Every call hands all of it over, so what few need is not in it.)"""

    reqs: Any  # [n, REQUEST_COLUMNS]
    insts: Any  # [instances, INSTANCE_COLUMNS]
    lanes: Any  # [lanes, LANE_COLUMNS]
    tree: Any
    when: Any  # by source
    ticks_per_token: float  # of a transfer
    latency_ticks: float  # negative: KV needs no transfer
    swap_ticks: float  # per token; negative: the preempted are recomputed
    first_from_decode: bool
    sticky: bool
    pushes: bool
    inline: bool
    stepwise: bool
    overlap: bool


class Routing(NamedTuple):
    """What the routers know, int64."""

    queued: Any  # [may prefill] prompt tokens queued or being computed
    loads: Any  # [may decode] scratch
    pace: Any  # [may prefill] ns a token, [] = all alike
    views: Any  # [1 + routers, may prefill + may decode]: the snapshot, and what each router added since
    sight: Any  # [may prefill] scratch
    age: int  # of the view, ticks; 0: exact


class Costs(NamedTuple):
    """Times of one stage by shape: prefill in float64 ns, decode in int64 ticks."""

    knots: Any  # [shapes, knots]
    values: Any
    sizes: Any  # [shapes]
    quad: Any  # [shapes]
    base: Any  # [shapes, batches]
    ctx: Any


_choose_prefill = compiled(dispatch.choose_prefill)
_choose_decode = compiled(dispatch.choose_decode)


@inlined
def _blocks(tokens: int) -> int:
    return (tokens + 15) >> 4


@inlined
def _held(insts: Any, reqs: Any, i: int, r: int) -> int:
    """Blocks that a prompt holds where it is prefilled; where it may decode, its first step's too."""
    return _blocks(reqs[r, INPUT] + (1 if insts[i, I_DECODES] and reqs[r, STEPS] > 0 else 0))


@inlined
def _source(insts: Any, k: int) -> int:
    return _TRANSFERS + len(insts) + k


# -------------------------------------------------------------------------------------------------- step times


@inlined
def _prefill_ns(c: Costs, table: int, total: int) -> float:
    i = 0
    while i < c.sizes[table] - 2 and c.knots[table, i + 1] <= total:
        i += 1
    slope = (c.values[table, i + 1] - c.values[table, i]) / (c.knots[table, i + 1] - c.knots[table, i])
    ns: float = c.values[table, i] + slope * (total - c.knots[table, i])
    return ns


@inlined
def _prefill_ticks(c: Costs, table: int, total: int, squares: int) -> Any:
    return max(1, int(np.rint((_prefill_ns(c, table, total) + c.quad[table] * squares) * 1024.0)))


@compiled
def _chunk_ticks(c: Costs, table: int, total: int, squares: int, batch: int, fixed: int) -> Any:
    """Ticks that chunks add to a decode step of `batch` requests, whose matrix products alone take `fixed`."""
    linear = int(np.rint(_prefill_ns(c, table, total + batch) * 1024.0))
    return max(0, linear - fixed) + int(np.rint(c.quad[table] * squares * 1024.0))


@inlined
def _swap_ticks(w: World, i: int, tokens: int) -> int:
    return max(1, int(np.rint(tokens * w.swap_ticks / w.insts[i, I_PP])))


@inlined
def _move_ticks(w: World, tokens: int) -> int:
    latency = 0.0 if w.stepwise else w.latency_ticks  # is over before a stepwise pull begins
    return max(1, int(np.rint(tokens * w.ticks_per_token + latency)))


# ------------------------------------------------------------------------------------------------- lanes' plans


@inlined
def _span(lanes: Any, k: int, steps: int) -> Any:
    """Ticks from T0 to the end of so many steps of the plan."""
    return lanes[k, L_EXTRA] + steps * lanes[k, L_E] + lanes[k, L_Q] * (steps * (steps - 1) // 2)


@inlined
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


@inlined
def _growth(lanes: Any, k: int, steps: int) -> Any:
    """Blocks that a lane's batch takes after the first of so many steps from now."""
    more = steps - 1
    grown = (more >> 4) * lanes[k, L_B]
    step = lanes[k, L_N] + 1
    for i in range(more & 15):
        grown += lanes[k, L_PHASE + ((1 - step - i) & 15)]
    return grown


@compiled
def _cut(w: World, i: int, t: int, seen: int) -> None:
    """End the plan of instance i (of one lane) at its first boundary that is still to come at time t, so that
    its slack is what is free now.

    `seen`: lanes up to this one have had their boundaries of this tick; -1 = none has.
    """
    lanes = w.lanes
    k = w.insts[i, I_LANE]
    if lanes[k, L_K] <= 1:
        return
    steps = _steps_until(lanes, k, t + 1 if k <= seen else t)
    if steps < lanes[k, L_K]:
        w.insts[i, I_SLACK] += _growth(lanes, k, lanes[k, L_K]) - _growth(lanes, k, steps)
        lanes[k, L_K] = steps
        schedule(w.tree, w.when, _source(w.insts, k), lanes[k, L_T0] + _span(lanes, k, steps))


@compiled
def _wake(w: World, i: int, t: int, seen: int) -> None:
    """There may be new work: an idle lane begins when the first stage is free; else the plan is cut."""
    insts, when = w.insts, w.when
    first = insts[i, I_LANE]
    for k in range(first, first + insts[i, I_PP]):
        if when[_source(insts, k)] == NEVER:
            schedule(w.tree, when, _source(insts, k), max(t, w.lanes[first, L_STAGE_FREE]))
            return
    _cut(w, i, t, seen)


@compiled
def _join(w: World, r: int, i: int, t: int, seen: int) -> None:
    """Deal a request to the lane with the fewest; it joins when that lane's next step begins."""
    insts, lanes, when = w.insts, w.lanes, w.when
    first = insts[i, I_LANE]
    k = first
    for other in range(first + 1, first + insts[i, I_PP]):
        if lanes[other, L_COUNT] < lanes[k, L_COUNT]:
            k = other
    lanes[k, L_COUNT] += 1
    append(w.reqs, lanes, k, L_JHEAD, r)
    if when[_source(insts, k)] == NEVER:
        schedule(w.tree, when, _source(insts, k), max(t, lanes[first, L_STAGE_FREE]))
    else:
        _cut(w, i, t, seen)


# --------------------------------------------------------------------------------------------- between instances


@inlined
def _queue_prompt(w: World, r: int, t: int, seen: int) -> None:
    p = w.reqs[r, PREFILLER]
    first = w.insts[p, I_QHEAD] < 0
    append(w.reqs, w.insts, p, I_QHEAD, r)
    if first:
        _wake(w, p, t, seen)


@inlined
def _boundary(w: World, i: int, t: int, seen: int) -> Any:
    """When the next step of instance i may begin, t or later."""
    lanes, k = w.lanes, w.insts[i, I_LANE]
    if w.insts[i, I_PP] > 1:
        return max(t, lanes[k, L_STAGE_FREE])
    if not lanes[k, L_RUNNING]:
        return t
    if lanes[k, L_K] <= 1:
        return w.when[_source(w.insts, k)]
    return lanes[k, L_T0] + _span(lanes, k, _steps_until(lanes, k, t + 1 if k <= seen else t))


@inlined
def _transfer(w: World, r: int, i: int, t: int, seen: int) -> None:
    """Move a request's KV to instance i, whose link takes one at a time, or come back when it has heard of it."""
    end = w.reqs[r, READY]
    if not w.stepwise or end <= t:
        begin = _boundary(w, i, t, seen) if w.stepwise else min(t, end)
        end = max(begin, w.insts[i, I_LINK]) + _move_ticks(w, w.reqs[r, INPUT])
        if w.overlap:
            end = max(end, t + _move_ticks(w, min(w.reqs[r, INPUT], 16)))
        w.insts[i, I_LINK] = end
    w.reqs[r, MOVED] = end
    insert(w.reqs, w.insts, i, I_THEAD, r, MOVED)
    schedule(w.tree, w.when, _TRANSFERS + i, w.reqs[w.insts[i, I_THEAD], MOVED])


@inlined
def _room(w: World, i: int) -> Any:
    """Blocks that decode may take for a request."""
    slack = w.insts[i, I_SLACK]
    return slack if slack == w.insts[i, I_BLOCKS] else slack - w.insts[i, I_RESERVE]


@compiled
def _admit(w: World, i: int, t: int, seen: int) -> None:
    """Admit for decode while the first one's blocks are free: the preempted, then who waits, in order."""
    reqs, insts = w.reqs, w.insts
    tight = False
    while True:
        chain = I_BHEAD if insts[i, I_BHEAD] >= 0 else I_WHEAD
        r = insts[i, chain]
        if r < 0:
            return
        need = _blocks(reqs[r, INPUT] + reqs[r, DONE] + 1)
        if need > _room(w, i) and not tight:
            _cut(w, i, t, seen)
            tight = True
        if need > _room(w, i):
            return
        insts[i, I_SLACK] -= need
        insts[i, chain] = reqs[r, NXT]
        if chain == I_BHEAD:
            _join(w, r, i, t, seen)
        elif w.latency_ticks < 0:
            reqs[r, MOVED] = t
            _join(w, r, i, t, seen)
        elif w.pushes:
            _queue_prompt(w, r, t, seen)
        else:
            _transfer(w, r, i, t, seen)


@compiled
def _release(w: World, i: int, blocks: int, t: int, seen: int) -> None:
    """Blocks of instance i are free again."""
    insts = w.insts
    insts[i, I_SLACK] += blocks
    if (insts[i, I_BHEAD] >= 0 or insts[i, I_WHEAD] >= 0) and not w.inline:
        _admit(w, i, t, seen)
    if insts[i, I_QHEAD] >= 0:
        _wake(w, i, t, seen)


@inlined
def _measure(w: World, loads: Any, t: int, seen: int) -> None:
    """KV tokens of each instance that may decode, as they are now."""
    lanes, insts = w.lanes, w.insts
    first = len(insts) - len(loads)
    for j in range(len(loads)):
        i = first + j
        tokens = insts[i, I_OUTSIDE]
        for k in range(insts[i, I_LANE], insts[i, I_LANE] + insts[i, I_PP]):
            tokens += lanes[k, L_C]
            if lanes[k, L_K] > 1:
                tokens += lanes[k, L_B] * (_steps_until(lanes, k, t + 1 if k <= seen else t) - 1)
        loads[j] = tokens


@inlined
def _decode_instance(w: World, n: Routing, r: int, t: int, seen: int) -> Any:
    """The instance that is to decode a request: the one with the fewest KV tokens, as its router sees them."""
    loads, views = n.loads, n.views
    first = len(w.insts) - len(loads)
    if len(loads) == 1:
        return first
    if n.age == 0:
        _measure(w, loads, t, seen)
        return first + _choose_decode(loads)
    router, prefills = 1 + r % (len(views) - 1), len(n.queued)
    for j in range(len(loads)):
        loads[j] = views[0, prefills + j] + views[router, prefills + j]
    j = _choose_decode(loads)
    views[router, prefills + j] += w.reqs[r, INPUT] + 1
    return first + j


@spliced
def _prefill_instance(n: Routing, r: int, tokens: int) -> Any:
    """The instance that is to prefill a request: the one with the shortest queue, as its router sees it."""
    queued, sight, views = n.queued, n.sight, n.views
    if n.age == 0:
        p = _choose_prefill(queued, n.pace)
    else:
        router = 1 + r % (len(views) - 1)
        for p in range(len(queued)):
            sight[p] = views[0, p] + views[router, p]
        p = _choose_prefill(sight, n.pace)
        views[router, p] += tokens
    queued[p] += tokens
    return p


@compiled
def _look(w: World, n: Routing, t: int, seen: int) -> None:
    """The routers' common snapshot of all loads, at an instant before anything else happens at it."""
    queued, loads, views = n.queued, n.loads, n.views
    _measure(w, loads, t, seen)
    for p in range(len(queued)):
        views[0, p] = queued[p]
    for j in range(len(loads)):
        views[0, len(queued) + j] = loads[j]
    for router in range(1, len(views)):
        for x in range(views.shape[1]):
            views[router, x] = 0


@inlined
def _wait_for_decode(w: World, r: int, d: int, t: int, seen: int) -> None:
    """Request r is assigned to instance d for decode, and waits there for blocks."""
    first = w.insts[d, I_WHEAD] < 0
    append(w.reqs, w.insts, d, I_WHEAD, r)
    if first:
        if w.inline:
            _wake(w, d, t, seen)
        else:
            _admit(w, d, t, seen)


@spliced
def _prefilled(w: World, n: Routing, r: int, i: int, ready: int, t: int, seen: int) -> bool:
    """The last of a prompt is computed. Whether that freed blocks of instance i."""
    reqs, insts = w.reqs, w.insts
    n.queued[i] -= reqs[r, INPUT]
    last = reqs[r, STEPS] == 0
    if last or not w.first_from_decode:
        reqs[r, FIRST] = t
    if last:
        reqs[r, LAST] = t
        insts[i, I_SLACK] += _held(insts, reqs, i, r)
        return True
    if w.stepwise:
        reqs[r, READY] = t + int(np.rint(w.latency_ticks))
    elif w.overlap:
        reqs[r, READY] = ready
    if w.pushes:
        _transfer(w, r, reqs[r, DECODER], t, seen)
        return False
    d = i
    if not w.sticky:
        d = _decode_instance(w, n, r, t, seen)
        if (
            d != i and insts[i, I_DECODES]
        ):  # it may stay; so it never waits for a full one, which may wait for this
            need = _blocks(reqs[r, INPUT] + 1)
            if need > _room(w, d):
                _cut(w, d, t, seen)
            if need > _room(w, d) or insts[d, I_WHEAD] >= 0 or insts[d, I_BHEAD] >= 0:
                d = i
    insts[d, I_OUTSIDE] += reqs[r, INPUT] + 1
    if d == i:
        reqs[r, MOVED] = t
        _join(w, r, i, t, seen)
    else:
        _wait_for_decode(w, r, d, t, seen)
        if not w.stepwise:
            reqs[r, READY] = NEVER
    return False


# ------------------------------------------------------------------------------------------------ one lane's step


@spliced
def _end(w: World, heaps: Any, n: Routing, k: int, i: int, t: int, seen: int) -> None:
    """A lane's plan has run to its end: requests end, prompts are done, what was pulled is there."""
    reqs, lanes, insts = w.reqs, w.lanes, w.insts
    now = lanes[k, L_N] + lanes[k, L_K]
    lanes[k, L_N] = now
    lanes[k, L_C] += lanes[k, L_B] * lanes[k, L_K]
    lanes[k, L_K] = 0
    freed = False
    while lanes[k, L_B] > 0 and heaps[k, 0] >> _ID_BITS <= now:
        r = heaps[k, 0] & _ID_MASK
        remove(heaps, k, lanes[k, L_B], 0)
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
        lanes[k, L_PHASE + ((tokens + 1 - now) & 15)] -= 1
        insts[i, I_SLACK] += _blocks(tokens)
        reqs[r, LAST] = t
        freed = True
    r = lanes[k, L_ENDING]
    lanes[k, L_ENDING] = -1
    while r >= 0:
        after = reqs[r, NXT]
        if _prefilled(w, n, r, i, lanes[k, L_LAST_STAGE], t, seen):
            freed = True
        r = after
    r = lanes[k, L_PULL]
    if r >= 0:
        lanes[k, L_PULL] = -1
        reqs[r, MOVED] = t
        insts[i, I_PULLED] += _blocks(reqs[r, INPUT])
        lanes[k, L_COUNT] += 1
        append(reqs, lanes, k, L_JHEAD, r)
        _release(w, reqs[r, PREFILLER], _held(insts, reqs, reqs[r, PREFILLER], r), t, seen)
    if freed and not w.inline and (insts[i, I_BHEAD] >= 0 or insts[i, I_WHEAD] >= 0):
        _admit(w, i, t, seen)


@inlined
def _pulls(w: World, i: int) -> bool:
    """Whether an instance that pulls in its loop takes the first that waits."""
    r = w.insts[i, I_WHEAD]
    return bool(
        w.inline
        and r >= 0
        and w.insts[i, I_PULLED] < w.insts[i, I_MARK]
        and _blocks(w.reqs[r, INPUT] + 1) <= w.insts[i, I_SLACK]
    )


@inlined
def _enter(w: World, heaps: Any, r: int, k: int, t: int) -> int:
    """Request r enters the lane's batch; returns the ticks of a stage that it owes."""
    reqs, lanes = w.reqs, w.lanes
    now = lanes[k, L_N]
    reqs[r, JOIN] = now
    if reqs[r, BEGUN] < 0:
        reqs[r, BEGUN] = t
    tokens = reqs[r, INPUT] + reqs[r, DONE] + 1
    w.insts[lanes[k, L_INSTANCE], I_OUTSIDE] -= tokens
    lanes[k, L_C] += tokens
    lanes[k, L_PHASE + ((tokens - now) & 15)] += 1
    if tokens & 15 == 1:
        lanes[k, L_FRESH] += 1
    push(heaps, k, lanes[k, L_B], ((now + reqs[r, STEPS] - reqs[r, DONE]) << _ID_BITS) | r)
    lanes[k, L_B] += 1
    reqs[r, PRV] = lanes[k, L_TAIL]
    reqs[r, NXT] = -1
    if lanes[k, L_TAIL] >= 0:
        reqs[lanes[k, L_TAIL], NXT] = r
    lanes[k, L_TAIL] = r
    owed: int = reqs[r, OWED]
    return owed


@inlined
def _gather(w: World, heaps: Any, k: int, i: int, t: int) -> int:
    """All who are to join the lane do; returns the ticks that they owe. (An engine that pulls in its loop counts
    the blocks of who joins twice, as it waits and as it runs: both must fit.)"""
    reqs, lanes, insts = w.reqs, w.lanes, w.insts
    owed = 0
    r = lanes[k, L_JHEAD]
    while r >= 0:
        if w.inline:
            if _blocks(reqs[r, INPUT] + 1) > insts[i, I_SLACK] and lanes[k, L_B] > 0:
                break
            insts[i, I_PULLED] -= _blocks(reqs[r, INPUT])
        after = reqs[r, NXT]
        owed += _enter(w, heaps, r, k, t)
        r = after
    lanes[k, L_JHEAD] = r
    return owed


@spliced
def _grow(w: World, heaps: Any, c: Costs, k: int, i: int) -> int:
    """Take the blocks of the batch's next step; where they are not free, preempt the last of the batch, and
    again until they are. Returns the ticks that this adds to the step (or takes away with who owed them)."""
    reqs, lanes, insts = w.reqs, w.lanes, w.insts
    now = lanes[k, L_N]
    needed = lanes[k, L_PHASE + ((1 - now) & 15)] - lanes[k, L_FRESH]
    extra = 0
    while needed > insts[i, I_SLACK]:
        r = lanes[k, L_TAIL]
        key = ((reqs[r, JOIN] + reqs[r, STEPS] - reqs[r, DONE]) << _ID_BITS) | r
        at = 0
        while heaps[k, at] != key:
            at += 1
        remove(heaps, k, lanes[k, L_B], at)
        done = reqs[r, DONE] + now - reqs[r, JOIN]
        tokens = reqs[r, INPUT] + done
        lanes[k, L_TAIL] = reqs[r, PRV]
        if reqs[r, PRV] >= 0:
            reqs[reqs[r, PRV], NXT] = -1
        lanes[k, L_B] -= 1
        lanes[k, L_COUNT] -= 1
        lanes[k, L_C] -= tokens + 1
        lanes[k, L_PHASE + ((tokens + 1 - now) & 15)] -= 1
        insts[i, I_OUTSIDE] += tokens + 1
        if reqs[r, JOIN] == now:
            insts[i, I_SLACK] += _blocks(tokens + 1)
            extra -= reqs[r, OWED]
            if tokens & 15 == 0:
                lanes[k, L_FRESH] -= 1
        else:
            insts[i, I_SLACK] += _blocks(tokens)
            if tokens & 15 == 0:
                needed -= 1
        reqs[r, DONE] = done
        if w.swap_ticks >= 0:
            reqs[r, OWED] = _swap_ticks(w, i, tokens)
            extra += reqs[r, OWED]
            append(reqs, insts, i, I_BHEAD, r)
        else:
            reqs[r, OWED] = _prefill_ticks(c, insts[i, I_TABLE], tokens, tokens * tokens)
            prepend(reqs, insts, i, I_BHEAD, r)
    insts[i, I_SLACK] -= needed
    return extra


@spliced
def _return(w: World, heaps: Any, k: int, i: int, t: int) -> int:
    """An engine that pulls in its loop: the preempted come back first, then who was pulled joins."""
    reqs, lanes, insts = w.reqs, w.lanes, w.insts
    owed = 0
    while insts[i, I_BHEAD] >= 0:
        r = insts[i, I_BHEAD]
        need = _blocks(reqs[r, INPUT] + reqs[r, DONE] + 1)
        if need > insts[i, I_SLACK]:
            break
        insts[i, I_SLACK] -= need
        insts[i, I_BHEAD] = reqs[r, NXT]
        lanes[k, L_COUNT] += 1
        owed += _enter(w, heaps, r, k, t)
    if insts[i, I_BHEAD] < 0 or lanes[k, L_B] == 0:
        owed += _gather(w, heaps, k, i, t)
    return owed


@inlined
def _take(w: World, k: int, i: int, t: int, budget: int) -> tuple[int, int]:
    """Take prompts, or chunks of them, into the lane's step: tokens, Σ (chunk² + 2·chunk·tokens before it)."""
    reqs, lanes, insts = w.reqs, w.lanes, w.insts
    total, squares, count = 0, 0, 0
    tail = -1
    r = insts[i, I_QHEAD]
    while r >= 0:
        if insts[i, I_REQUESTS] > 0 and count >= insts[i, I_REQUESTS]:
            break
        chunk = reqs[r, INPUT] - reqs[r, PAST]
        if insts[i, I_CHUNKED]:
            chunk = min(chunk, budget - total)
            if chunk <= 0:
                break
        elif count > 0 and total + chunk > budget:
            break
        if reqs[r, START] < 0:
            held = _held(insts, reqs, i, r)
            if held > insts[i, I_SLACK]:
                break
            if insts[i, I_DECODES] and (insts[i, I_BHEAD] >= 0 or insts[i, I_WHEAD] >= 0):
                break
            insts[i, I_SLACK] -= held
            reqs[r, START] = t
        squares += chunk * (chunk + 2 * reqs[r, PAST])
        reqs[r, PAST] += chunk
        total += chunk
        count += 1
        if reqs[r, PAST] < reqs[r, INPUT]:
            break
        if tail < 0:
            lanes[k, L_ENDING] = r
        tail = r
        r = reqs[r, NXT]
    if tail >= 0:
        reqs[tail, NXT] = -1
    insts[i, I_QHEAD] = r
    return total, squares


@spliced
def _begin(w: World, heaps: Any, c: Costs, k: int, i: int, t: int, seen: int) -> Any:
    """The lane's next step: who joins, grows, is preempted; prompts; how long it lasts and how often. Returns
    when the lane is to be looked at again."""
    reqs, lanes, insts = w.reqs, w.lanes, w.insts
    first, pp = insts[i, I_LANE], insts[i, I_PP]
    if pp > 1 and lanes[first, L_STAGE_FREE] > t:
        work = lanes[k, L_B] > 0 or lanes[k, L_JHEAD] >= 0 or insts[i, I_QHEAD] >= 0
        work = work or (w.inline and (insts[i, I_WHEAD] >= 0 or insts[i, I_BHEAD] >= 0))
        return lanes[first, L_STAGE_FREE] if work else NEVER
    if _pulls(w, i):
        r = insts[i, I_WHEAD]
        insts[i, I_WHEAD] = reqs[r, NXT]
        insts[i, I_SLACK] -= _blocks(reqs[r, INPUT] + 1)
        lanes[k, L_PULL] = r
        lanes[k, L_RUNNING] = 1
        end = t + _move_ticks(w, reqs[r, INPUT])
        lanes[first, L_STAGE_FREE] = end
        return end

    extra = 0
    if not w.inline:
        extra += _gather(w, heaps, k, i, t)
    total, squares, size = 0, 0, 0
    if insts[i, I_QHEAD] >= 0 and not insts[i, I_CHUNKED]:
        total, squares = _take(w, k, i, t, insts[i, I_TOKENS])
    if total == 0:
        extra += _grow(w, heaps, c, k, i)
        if w.inline:
            extra += _return(w, heaps, k, i, t)
        size = lanes[k, L_B]
        if insts[i, I_QHEAD] >= 0 and insts[i, I_CHUNKED]:
            total, squares = _take(w, k, i, t, insts[i, I_TOKENS] - size)
    if total == 0 and size == 0:
        return NEVER

    now = lanes[k, L_N]
    if extra > 0:  # is paid with this step
        r = lanes[k, L_TAIL]
        while r >= 0 and reqs[r, JOIN] == now:
            reqs[r, OWED] = 0
            r = reqs[r, PRV]
    table = insts[i, I_TABLE]
    last = c.base.shape[1] - 1
    fixed, slope = 0, 0
    if size > 0:
        if size <= last:
            fixed = c.base[table, size]
            slope = c.ctx[table, size]
        else:
            fixed = c.base[table, last] + (c.base[table, last] - c.base[table, last - 1]) * (size - last)
            slope = c.ctx[table, last]
        lanes[k, L_FRESH] = 0
    if total > 0 and size > 0:
        extra += _chunk_ticks(c, table, total, squares, size, fixed)
    elif total > 0:
        extra += _prefill_ticks(c, table, total, squares)
    one = extra + fixed + slope * lanes[k, L_C]
    end = t + one
    lanes[k, L_RUNNING] = 1
    lanes[k, L_LAST_STAGE] = t
    if pp > 1:
        lanes[first, L_STAGE_FREE] = end
        for stage in range(1, pp):
            lanes[k, L_LAST_STAGE] = max(end, lanes[first + stage, L_STAGE_FREE])
            end = lanes[k, L_LAST_STAGE] + one
            lanes[first + stage, L_STAGE_FREE] = end
    if w.first_from_decode and size > 0:
        r = lanes[k, L_TAIL]
        while r >= 0 and reqs[r, JOIN] == now:
            if reqs[r, FIRST] < 0:
                reqs[r, FIRST] = end
            r = reqs[r, PRV]
    steps = 1 if size > 0 else 0
    if steps > 0 and pp == 1 and total == 0 and not _pulls(w, i):
        lanes[k, L_T0] = t
        lanes[k, L_EXTRA] = extra
        lanes[k, L_E] = fixed + slope * lanes[k, L_C]
        lanes[k, L_Q] = slope * size
        lanes[k, L_STEPS] = 1
        lanes[k, L_SPAN] = one
        steps = (heaps[k, 0] >> _ID_BITS) - now
        grown = _growth(lanes, k, steps)
        if grown > insts[i, I_SLACK]:
            steps = min(steps, 1 + ((insts[i, I_SLACK] // size) << 4))
            grown = _growth(lanes, k, steps)
            while True:
                next_one = lanes[k, L_PHASE + ((1 - now - steps) & 15)]
                if grown + next_one > insts[i, I_SLACK]:
                    break
                grown += next_one
                steps += 1
        insts[i, I_SLACK] -= grown
        end = t + _span(lanes, k, steps)
    lanes[k, L_K] = steps
    if pp > 1 and total > 0 and insts[i, I_QHEAD] >= 0:
        _wake(w, i, t, seen)
    return end


# ----------------------------------------------------------------------------------------------------- everything


def lay_out(insts: Table, heap_size: int) -> tuple[Table, ...]:
    """The kernel's lanes, heaps, tree and times of events for these instances. Fills in I_LANE.

    They are made here because compiled code that makes no array needs no reference counts (`_nrt`), which took
    half of its time.
    """
    insts[:, [column + tail for column in I_CHAINS for tail in (0, 1)]] = -1
    lanes_of = insts[:, I_PP]
    insts[:, I_LANE] = np.cumsum(lanes_of) - lanes_of
    count = int(lanes_of.sum())
    lanes = np.zeros((count, LANE_COLUMNS), np.int64)
    lanes[:, L_INSTANCE] = np.repeat(np.arange(len(insts)), lanes_of)
    lanes[:, [L_TAIL, L_JHEAD, L_JTAIL, L_ENDING, L_PULL]] = -1
    width = 1 << (_TRANSFERS + len(insts) + count - 1).bit_length()
    tree, when = np.empty(2 * width, np.int64), np.full(width, NEVER, np.int64)
    return lanes, np.empty((count, heap_size), np.int64), tree, when


@cached
def serve(w: World, heaps: Any, n: Routing, c: Costs, requests: Any, times: Any) -> int:
    """Serve the requests; fills in `times`; returns the number of events.

    requests int64 [4, n]: arrival ns, not falling; prompt tokens; decode steps, -1 = fits nowhere; prompt tokens
    that need no compute. times int64 [5, n]: ns of prefill start, first token, end of transfer, decode start,
    last token; -1 where it never happened.

    With no instance that may prefill requests arrive at the decode side. With none that may decode every request
    ends at its prefill's end.
    """
    reqs, insts, lanes, tree, when = w.reqs, w.insts, w.lanes, w.tree, w.when
    count, prefills = len(reqs), len(n.queued)
    lane_source = _TRANSFERS + len(insts)
    width = len(when)
    for i in range(width):
        tree[width + i] = i
    for i in range(width - 1, 0, -1):
        tree[i] = tree[2 * i]
    origin = requests[0, 0] if count else 0
    for r in range(count):
        for column in range(REQUEST_COLUMNS):
            reqs[r, column] = -1
        reqs[r, INPUT] = requests[1, r]
        reqs[r, STEPS] = requests[2, r]
        reqs[r, PAST] = requests[3, r]
        reqs[r, DONE] = 0
        reqs[r, OWED] = 0
        reqs[r, READY] = NEVER
    coming = 0
    while coming < count and reqs[coming, STEPS] < 0:
        coming += 1
    if coming < count:
        schedule(tree, when, _ARRIVALS, (requests[0, coming] - origin) * TICKS)
        if n.age > 0:
            schedule(tree, when, _VIEW, n.age)

    events = 0
    none: Any = np.int64(-1)  # a literal is a type of its own: all that gets it would be compiled twice
    seen, seen_at = none, none
    while True:
        source = tree[1]
        t = when[source]
        if t == NEVER:
            break
        events += 1
        if seen_at != t:
            seen, seen_at = none, t
        if source >= lane_source:
            k = source - lane_source
            seen = max(seen, k)
            i = lanes[k, L_INSTANCE]
            if lanes[k, L_RUNNING]:
                lanes[k, L_RUNNING] = 0
                _end(w, heaps, n, k, i, t, seen)
            schedule(tree, when, source, _begin(w, heaps, c, k, i, t, seen))
        elif source >= _TRANSFERS:
            i = source - _TRANSFERS
            r = insts[i, I_THEAD]
            insts[i, I_THEAD] = reqs[r, NXT]
            schedule(tree, when, source, reqs[reqs[r, NXT], MOVED] if reqs[r, NXT] >= 0 else NEVER)
            if w.stepwise and reqs[r, MOVED] == reqs[r, READY]:
                _transfer(w, r, i, t, seen)
            else:
                _release(w, reqs[r, PREFILLER], _held(insts, reqs, reqs[r, PREFILLER], r), t, seen)
                _join(w, r, i, t, seen)
        elif source == _ARRIVALS:
            r = coming
            coming += 1
            while coming < count and reqs[coming, STEPS] < 0:
                coming += 1
            schedule(tree, when, source, (requests[0, coming] - origin) * TICKS if coming < count else NEVER)
            if prefills:
                p = _prefill_instance(n, r, reqs[r, INPUT])
                reqs[r, PREFILLER] = p
            else:
                reqs[r, FIRST] = t
            if reqs[r, STEPS] > 0 and (w.pushes or not prefills):
                d = _decode_instance(w, n, r, t, seen)
                reqs[r, DECODER] = d
                insts[d, I_OUTSIDE] += reqs[r, INPUT] + 1
                _wait_for_decode(w, r, d, t, seen)
            elif prefills:
                _queue_prompt(w, r, t, seen)
            else:
                reqs[r, LAST] = t
        else:
            _look(w, n, t, seen)
            schedule(tree, when, source, NEVER)
            if when[tree[1]] < NEVER:
                schedule(tree, when, source, t + n.age)

    for r in range(count):
        for row, column in enumerate((START, FIRST, MOVED, BEGUN, LAST)):
            ticks = reqs[r, column]
            times[row, r] = -1 if ticks < 0 else ticks // TICKS + origin
    return events

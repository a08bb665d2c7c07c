"""The simulator that DistServe published, rule by rule, so that its figures can be had again (REFERENCE § 3).

One prefill and one decode instance, each a pipeline of pp stages, every stage a first-come queue of its own:

* A prefill instance takes all that is queued, in order, up to its memory's tokens; the batch stays together. A
  stage lasts (a + b·Σlen + c·Σlen²)/pp + 1·pp ms.
* At the end of the last stage a request has its first token and enters decode at once: no transfer, no wait.
* A decode stage takes, from the head of its queue, what fits 50,000 tokens (each request's context + 1) and stops
  at the first that does not; so batches merge, and above that they rotate. It lasts (A + B·Σ(context + 1) +
  C·batch)/pp ms. After the last stage each request is one token longer; it leaves after `output` rounds.
* The first stage of either adds the public simulator's own overhead, 2 ms + 0.1 µs per token of context.

TTFT is arrival to first token; TPOT is the time from there to the end over `output` steps. A quantile of each is
tested apart. There is no memory in decode and no link in between.

Requests that travel together are one group with a count, a sum of contexts and a counter of rounds, so that a
stage event costs the same for any batch; a group is walked only where a request leaves it, or it is cut at 50,000
tokens. Time is in ticks of 1/1024 ns (int64), arrivals are rounded to 1 µs: no ulp between machines is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from disaggserve.api.errors import InvalidInput
from disaggserve.latency import Fit
from disaggserve.simulate import cache
from disaggserve.simulate.judging import Prediction, Promise, judge
from disaggserve.simulate.serving import Outcome
from disaggserve.workload import Lengths, Requests

cache.prepare()

import numba  # noqa: E402 — the cache folder must be named before numba is imported

Ints = npt.NDArray[np.int64]
TICKS = 1024  # per nanosecond
MS = 1_000_000 * TICKS
NEVER = 2**62
DECODE_TOKENS = 50_000  # of one decode batch, whatever the memory
OVERHEAD = 2 * MS  # of a first stage
OVERHEAD_PER_TOKEN = 100 * TICKS  # 0.0001 ms

# Rows of the kernel's working space: of requests, of groups (never more than requests).
NEXT, FINISH, HEAD, TAIL, COUNT, CONTEXT, ROUNDS, SOONEST, BEHIND = range(9)
# Of decode stages.
QUEUE, BACK, RUNNING, END = range(4)

F = TypeVar("F", bound=Callable[..., Any])


def _inlined(function: F) -> F:
    return cast(F, numba.njit(forceinline=True, _nrt=False)(function))


def _cached(function: F) -> F:
    return cast(F, numba.njit(cache=True, nogil=True, _nrt=False)(function))


@_cached
def serve_prefill(
    arrival: Any, inputs: Any, times: Any, most: int, limit: int, allowed: int, free: Any, first: Any
) -> int:
    """Ticks of the first tokens into `first`; returns how many requests are at or over the limit.

    Stops when `allowed` are. `times`: of `_prefill_times`. `free`: when each stage is next free, zeros.
    """
    n = len(arrival)
    head = missed = 0
    while head < n:
        t = max(free[0], arrival[head])
        total, squares, end = 0, 0, head
        while end < n and arrival[end] <= t and total + inputs[end] <= most:
            total += inputs[end]
            squares += inputs[end] * inputs[end]
            end += 1
        stage = np.int64(np.rint(times[0] + times[1] * total + times[2] * squares))
        t += OVERHEAD + OVERHEAD_PER_TOKEN * total + stage
        free[0] = t
        for s in range(1, len(free)):
            t = max(free[s], t) + stage
            free[s] = t
        for r in range(head, end):
            first[r] = t
            if t - arrival[r] >= limit:
                missed += 1
        if missed >= allowed:
            return missed
        head = end
    return missed


@_inlined
def _append(work: Any, stages: Any, s: int, g: int) -> None:
    """Group g to the back of the queue of stage s."""
    work[BEHIND, g] = -1
    if stages[s, QUEUE] < 0:
        stages[s, QUEUE] = g
    else:
        work[BEHIND, stages[s, BACK]] = g
    stages[s, BACK] = g


@_inlined
def _join(work: Any, a: int, b: int) -> None:
    """The requests of group b behind those of a. The smaller one is counted anew in the rounds of the larger."""
    shift = work[ROUNDS, a] - work[ROUNDS, b]
    if work[COUNT, a] >= work[COUNT, b]:
        small, by, soonest = b, shift, work[SOONEST, b] + shift
        kept = work[SOONEST, a]
    else:
        small, by, soonest = a, -shift, work[SOONEST, a] - shift
        kept = work[SOONEST, b]
        work[ROUNDS, a] = work[ROUNDS, b]
    r = work[HEAD, small]
    while r >= 0:
        work[FINISH, r] += by
        r = work[NEXT, r]
    work[SOONEST, a] = min(kept, soonest)
    work[NEXT, work[TAIL, a]] = work[HEAD, b]
    work[TAIL, a] = work[TAIL, b]
    work[COUNT, a] += work[COUNT, b]
    work[CONTEXT, a] += work[CONTEXT, b]


@_inlined
def _cut(work: Any, total: Any, g: int, h: int, room: int) -> bool:
    """Moves from the head of g to the empty group h what fits `room` tokens; whether anything did.

    SOONEST of the rest may then be too early: it is found out when those rounds are made.
    """
    count, context, soonest, last = 0, 0, NEVER, -1
    r = work[HEAD, g]
    rounds = work[ROUNDS, g]
    while True:
        held = total[r] - work[FINISH, r] + rounds
        if held + 1 > room:
            break
        room -= held + 1
        count += 1
        context += held
        soonest = min(soonest, work[FINISH, r])
        last = r
        r = work[NEXT, r]
    if count == 0:
        return False
    work[HEAD, h], work[TAIL, h] = work[HEAD, g], last
    work[NEXT, last] = -1
    work[HEAD, g] = r
    work[COUNT, h], work[CONTEXT, h], work[ROUNDS, h], work[SOONEST, h] = count, context, rounds, soonest
    work[COUNT, g] -= count
    work[CONTEXT, g] -= context
    return True


@_cached
def serve_decode(
    first: Any, outputs: Any, total: Any, times: Any, limits: Any, allowed: int, enough: int,
    work: Any, stages: Any, last: Any,
) -> int:  # fmt: skip
    """Ends of the requests into `last`, ticks; returns how many are under their limit, or −1 where `allowed` are not.

    Stops as soon as `enough` are under it, or `allowed` are not. `total`: input + output. `limits`: ticks from
    the first token to the end. `times`: of `_decode_times`. `work`, `stages`: space, one row per stage.
    """
    n, pp = len(first), len(stages)
    for s in range(pp):
        stages[s, QUEUE] = -1
        stages[s, RUNNING] = -1
        stages[s, END] = NEVER
    spare = 0  # groups that are not in use, chained by BEHIND
    for g in range(n):
        work[BEHIND, g] = g + 1
    coming = hits = misses = 0
    while hits + misses < n:
        t, s = NEVER, -1
        if coming < n:
            t = first[coming]
        for i in range(pp):
            if stages[i, END] < t:
                t, s = stages[i, END], i
        waking = 0
        if s < 0:  # a prefill batch has its first tokens
            g = spare
            spare = work[BEHIND, g]
            work[HEAD, g] = coming
            count, context, soonest = 0, 0, NEVER
            while coming < n and first[coming] == t:
                work[NEXT, coming] = coming + 1
                work[FINISH, coming] = outputs[coming]
                soonest = min(soonest, outputs[coming])
                context += total[coming] - outputs[coming]
                count += 1
                coming += 1
            work[NEXT, coming - 1] = -1
            work[TAIL, g] = coming - 1
            work[COUNT, g], work[CONTEXT, g], work[ROUNDS, g], work[SOONEST, g] = count, context, 0, soonest
            _append(work, stages, 0, g)
        else:
            g = stages[s, RUNNING]
            stages[s, RUNNING] = -1
            stages[s, END] = NEVER
            waking = s + 1
            if waking == pp:
                waking = 0
                work[ROUNDS, g] += 1
                work[CONTEXT, g] += work[COUNT, g]
                rounds = work[ROUNDS, g]
                if rounds == work[SOONEST, g]:
                    soonest, before, r = NEVER, -1, work[HEAD, g]
                    while r >= 0:
                        after = work[NEXT, r]
                        if work[FINISH, r] == rounds:
                            last[r] = t
                            if t - first[r] < limits[r]:
                                hits += 1
                            else:
                                misses += 1
                            work[COUNT, g] -= 1
                            work[CONTEXT, g] -= total[r]
                            if before < 0:
                                work[HEAD, g] = after
                            else:
                                work[NEXT, before] = after
                        else:
                            soonest = min(soonest, work[FINISH, r])
                            before = r
                        r = after
                    work[TAIL, g] = before
                    work[SOONEST, g] = soonest
                    if misses >= allowed:
                        return -1
                    if hits >= enough:
                        return hits
            if work[COUNT, g] > 0:
                _append(work, stages, waking, g)
            else:
                work[BEHIND, g] = spare
                spare = g
        # The stage that is free again goes on with its own queue; the one that was given something may start.
        for turn in range(2):
            i = s if turn == 0 else waking
            if i < 0 or stages[i, RUNNING] >= 0 or stages[i, QUEUE] < 0:
                continue
            taken, room = -1, DECODE_TOKENS
            while stages[i, QUEUE] >= 0:
                g = stages[i, QUEUE]
                need = work[CONTEXT, g] + work[COUNT, g]
                if need <= room:
                    stages[i, QUEUE] = work[BEHIND, g]
                    room -= need
                    if taken < 0:
                        taken = g
                    else:
                        _join(work, taken, g)
                        work[BEHIND, g] = spare
                        spare = g
                    continue
                h = spare
                if _cut(work, total, g, h, room):
                    if taken < 0:
                        spare = work[BEHIND, h]
                        taken = h
                    else:
                        _join(work, taken, h)
                break
            batch, context = work[COUNT, taken], work[CONTEXT, taken]
            regime = 0 if batch < times[3] else 4
            stage = times[regime] + times[regime + 1] * (context + batch) + times[regime + 2] * batch
            if i == 0:
                stage += OVERHEAD + OVERHEAD_PER_TOKEN * context
            stages[i, RUNNING] = taken
            stages[i, END] = t + stage
    return hits


class Simulator:
    """One list of requests, served at any rate: lengths in their order, arrivals as published.

    Raises `InvalidInput` for lengths that the published simulator would never end on.
    """

    def __init__(self, lengths: Lengths, promise: Promise) -> None:
        n = len(lengths)
        self.inputs = lengths.input.astype(np.int64)
        self.outputs = lengths.output.astype(np.int64)
        self.total = self.inputs + self.outputs
        self.promise = promise
        if n < 2:
            raise InvalidInput(f"lengths {lengths.name}: {n} request; the published search takes 2 or more")
        if int(self.total.max()) > DECODE_TOKENS:
            raise InvalidInput(
                f"lengths {lengths.name}: a request has {self.total.max()} tokens, and no published decode batch "
                f"takes more than {DECODE_TOKENS:,}; leave such requests out"
            )
        # Seed 0 as published. Poisson is gamma(1, 1/rate): the unit draw over the rate.
        gaps = np.random.RandomState(0).gamma(1.0, 1.0, n - 1)
        self.unit_us = np.concatenate(([0.0], np.cumsum(gaps))) * 1e6
        self.ttft_ticks = round(min(promise.ttft_s * 1e9 * TICKS, NEVER))
        whole = np.minimum(self.outputs * (promise.tpot_s * 1e9 * TICKS), NEVER)
        self.tpot_ticks = np.rint(whole).astype(np.int64)
        # The quantile lies between two order statistics (as pandas takes it): counts alone tell on which side of
        # the limit it is, unless the limit lies between the two as well.
        place = promise.attainment * (n - 1)
        self.below = int(place)
        self.part = place - self.below
        self.allowed = n - self.below  # so many at or over the limit, and it is missed
        self.enough = self.below + (2 if self.part > 0 else 1)  # so many under it, and it is kept
        self._work = np.empty((9, n + 1), dtype=np.int64)
        self._last = np.empty(n, dtype=np.int64)

    def first_tokens(self, fit: Fit, pp: int, most_tokens: int, rate: float) -> Ints | None:
        """When each request has its first token, ticks; None where the quantile of TTFT misses the promise.

        `most_tokens`: of one prefill batch; no prompt is longer. `rate`: req/s.
        """
        arrival = self._arrivals(rate)
        first, missed = self._prefill(arrival, fit, pp, most_tokens, self.allowed)
        if missed >= self.allowed:
            return None
        surely = len(first) - missed >= self.enough
        return first if surely or self._under(first - arrival, self.ttft_ticks) else None

    def keeps_tpot(self, fit: Fit, pp: int, first: Ints) -> bool:
        """Whether the quantile of TPOT keeps the promise, for requests with first tokens at these ticks."""
        hits = self._decode(first, fit, pp, self.allowed, self.enough)
        if hits < 0 or hits >= self.enough:
            return hits >= 0
        return self._under((self._last - first) / self.outputs, self.promise.tpot_s * 1e9 * TICKS)

    def predict(self, prefill: tuple[Fit, int, int], decode: tuple[Fit, int], rate: float) -> Prediction:
        """Joint attainment and percentiles of all requests; `prefill`: fit, pp, most tokens; `decode`: fit, pp.

        A published decode makes `output` steps after the first token: in our words, one token more.
        """
        never, arrival = len(self.inputs) + 1, self._arrivals(rate)
        first, _ = self._prefill(arrival, *prefill, never)
        self._decode(first, *decode, never, never)
        arrival_ns, first_ns, last_ns = (ticks // TICKS for ticks in (arrival, first, self._last))
        outcome = Outcome(first_ns, first_ns, first_ns, first_ns, last_ns, events=0)
        inputs, outputs = self.inputs.astype(np.int32), (self.outputs + 1).astype(np.int32)
        return judge(Requests(arrival_ns, inputs, outputs), outcome, self.promise)

    def _arrivals(self, rate: float) -> Ints:
        arrivals: Ints = np.rint(self.unit_us / rate).astype(np.int64) * (1000 * TICKS)
        return arrivals

    def _prefill(self, arrival: Ints, fit: Fit, pp: int, most_tokens: int, allowed: int) -> tuple[Ints, int]:
        first, free = np.empty_like(arrival), np.zeros(pp, dtype=np.int64)
        missed: int = serve_prefill(
            arrival, self.inputs, _prefill_times(fit, pp), most_tokens, self.ttft_ticks, allowed, free, first
        )
        return first, missed

    def _decode(self, first: Ints, fit: Fit, pp: int, allowed: int, enough: int) -> int:
        hits: int = serve_decode(
            first, self.outputs, self.total, _decode_times(fit, pp), self.tpot_ticks, allowed, enough,
            self._work, np.empty((pp, 4), dtype=np.int64), self._last,
        )  # fmt: skip
        return hits

    def _under(self, values: npt.NDArray[Any], limit: float) -> bool:
        low, high = np.sort(values)[self.below : self.below + 2]
        return bool(low + (high - low) * self.part < limit)


def warm_up() -> None:
    """Compile the two kernels, or load them from the cache."""
    lengths = Lengths("warm-up", np.ones(2, np.int32), np.ones(2, np.int32))
    fit = Fit((1.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.0), 95, True)
    Simulator(lengths, Promise(1.0, 1.0, 0.9)).predict((fit, 1, 1), (fit, 1), 1.0)


@functools.lru_cache(maxsize=256)
def _prefill_times(fit: Fit, pp: int) -> npt.NDArray[np.float64]:
    """Ticks of one stage: constant, per token of Σlen, per token² of Σlen²."""
    a, b, c = fit.prefill
    return np.array([a / pp + pp, b / pp, c / pp]) * MS


@functools.lru_cache(maxsize=256)
def _decode_times(fit: Fit, pp: int) -> Ints:
    """Ticks of one stage: constant, per token of Σ(context + 1), per request; the threshold; the same above it."""
    small, large = (
        np.rint(np.array(f) * (MS / pp)).astype(np.int64) for f in (fit.decode_small, fit.decode_large)
    )
    return np.concatenate((small, [fit.threshold], large))

"""The simulator once more, plainly: every decode step is an event, nothing is planned ahead, no arrays.

It says what the kernel must do, bit for bit (tests/property/test_kernel_oracle.py). Times are integers of
1/1024 ns, every duration is at least 1. Events of one instant go by kind, then by number of the instance or lane.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque

from disaggserve.simulate import Deployment, Pool
from disaggserve.workload import Requests

ARRIVAL, PREFILL_END, TRANSFER_END, BOUNDARY, PREFILL_START = range(5)


@dataclasses.dataclass(eq=False)
class Request:
    input: int
    steps: int  # decode steps that it wants
    arrival: int
    done: int = 0  # decode steps made
    begun: bool = False  # has been in a batch: if it waits, it was preempted
    fresh: bool = False  # joined its batch at this boundary: the blocks of its next step are reserved
    prefill: Prefill | None = None
    decode: Decode | None = None
    prefill_start: int = -1
    first: int = -1
    transfer_end: int = -1
    decode_start: int = -1
    last: int = -1

    @property
    def tokens(self) -> int:  # in the KV cache while its next step runs
        return self.input + self.done + 1


@dataclasses.dataclass(eq=False)
class Prefill:
    number: int
    pool: Pool
    free: int
    stage_free: list[int]
    waiting: deque[Request] = dataclasses.field(default_factory=deque)
    flying: deque[list[Request]] = dataclasses.field(default_factory=deque)
    queued_tokens: int = 0
    asked: bool = False  # a start event is on the way


@dataclasses.dataclass(eq=False)
class Lane:
    number: int
    decode: Decode
    batch: list[Request] = dataclasses.field(default_factory=list)
    joining: list[Request] = dataclasses.field(default_factory=list)
    busy: bool = False  # a boundary event is on the way


@dataclasses.dataclass(eq=False)
class Decode:
    number: int
    pool: Pool
    free: int
    lanes: list[Lane] = dataclasses.field(default_factory=list)
    waiting: deque[Request] = dataclasses.field(default_factory=deque)
    requests: list[Request] = dataclasses.field(default_factory=list)  # assigned and not finished
    link_free: int = 0


def blocks(tokens: int) -> int:
    return -(-tokens // 16)


def prefill_ticks(pool: Pool, lengths: list[int]) -> int:
    times, total = pool.times, sum(lengths)
    knots, values = times.prefill_knots_tokens, times.prefill_knots_ns
    i = max(0, min(sum(1 for k in knots if k <= total) - 1, len(knots) - 2))
    slope = (values[i + 1] - values[i]) / (knots[i + 1] - knots[i])
    ns = values[i] + slope * (total - knots[i]) + times.prefill_quad_ns * sum(n * n for n in lengths)
    return max(1, round(float(ns) * 1024.0))


def step_ticks(pool: Pool, batch: list[Request]) -> int:
    base, ctx = pool.times.decode_base_ns, pool.times.decode_ctx_ns

    def ticks(table: object, i: int) -> int:
        return round(float(table[i]) * (1024 * pool.times.pp))  # type: ignore[index]

    last, size = len(base) - 1, len(batch)
    if size <= last:
        fixed = max(1, ticks(base, size))
    else:
        a, b = max(1, ticks(base, last - 1)), max(1, ticks(base, last))
        fixed = b + (b - a) * (size - last)
    return fixed + ticks(ctx, min(size, last)) * sum(r.tokens for r in batch)


class Oracle:
    """Without prefill pools: decode alone (`run_decode`); without decode pools: prefill alone (`run_prefill`)."""

    def __init__(self, deployment: Deployment, requests: Requests) -> None:
        self.deployment = deployment
        self.from_decode = deployment.first_token_from == "decode"
        self.ticks_per_token = deployment.kv_bytes_per_token / deployment.link_bytes_s * 1e9 * 1024
        self.latency_ticks = deployment.link_latency_s * 1e9 * 1024
        self.prefills: list[Prefill] = []
        for pool in deployment.prefill:
            for _ in range(pool.count):
                self.prefills.append(Prefill(len(self.prefills), pool, pool.blocks, [0] * pool.times.pp))
        self.decodes: list[Decode] = []
        lanes = 0
        for pool in deployment.decode:
            for _ in range(pool.count):
                decode = Decode(len(self.decodes), pool, pool.blocks)
                decode.lanes = [Lane(lanes + i, decode) for i in range(pool.times.pp)]
                lanes += pool.times.pp
                self.decodes.append(decode)
        self.origin = int(requests.arrival_ns[0]) if len(requests) else 0
        self.requests = [
            Request(int(i), self.steps(int(o)), (int(a) - self.origin) * 1024)
            for a, i, o in zip(requests.arrival_ns, requests.input, requests.output, strict=True)
        ]
        self.events: list[tuple[int, int, int, int, object]] = []
        self.serial = 0

    def steps(self, output: int) -> int:
        if not self.decodes:
            return 0
        return output if self.from_decode else output - 1

    def at(self, t: int, kind: int, number: int, what: object) -> None:
        self.serial += 1
        heapq.heappush(self.events, (t, kind, number, self.serial, what))

    def run(self) -> dict[str, list[int]]:
        for request in self.requests:
            if self.fits(request):
                self.at(request.arrival, ARRIVAL, 0, request)
        handlers = {
            ARRIVAL: self.arrive,
            PREFILL_END: self.end_prefill,
            TRANSFER_END: self.end_transfer,
            BOUNDARY: self.boundary,
            PREFILL_START: self.start_prefill,
        }
        while self.events:
            t, kind, _, _, what = heapq.heappop(self.events)
            handlers[kind](t, what)  # type: ignore[operator]

        def ns(name: str) -> list[int]:
            ticks = [getattr(r, name) for r in self.requests]
            return [-1 if t < 0 else t // 1024 + self.origin for t in ticks]

        return {name: ns(name) for name in ("prefill_start", "first", "transfer_end", "decode_start", "last")}

    def fits(self, r: Request) -> bool:
        prompt = all(blocks(r.input) <= p.pool.blocks for p in self.prefills)
        whole = all(blocks(r.input + r.steps) <= d.pool.blocks for d in self.decodes)
        return prompt and (whole or r.steps == 0)

    # ------------------------------------------------------------------------------------------------ prefill

    def arrive(self, t: int, r: Request) -> None:
        if not self.prefills:
            self.first_token(t, r)
            return
        r.prefill = p = min(self.prefills, key=lambda p: p.queued_tokens)
        p.queued_tokens += r.input
        p.waiting.append(r)
        if len(p.waiting) == 1:
            self.ask_start(t, p)

    def ask_start(self, t: int, p: Prefill) -> None:
        if p.waiting and not p.asked:
            p.asked = True
            self.at(max(t, p.stage_free[0]), PREFILL_START, p.number, p)

    def start_prefill(self, t: int, p: Prefill) -> None:
        p.asked = False
        batch: list[Request] = []
        while p.waiting:
            r = p.waiting[0]
            total = sum(x.input for x in batch) + r.input
            if blocks(r.input) > p.free or (batch and total > p.pool.batch_tokens):
                break
            p.free -= blocks(r.input)
            r.prefill_start = t
            batch.append(p.waiting.popleft())
        if not batch:
            return  # a transfer that frees blocks asks again
        ticks = prefill_ticks(p.pool, [r.input for r in batch])
        for stage, free in enumerate(p.stage_free):
            p.stage_free[stage] = max(t, free) + ticks
            t = p.stage_free[stage]
        p.flying.append(batch)
        self.at(t, PREFILL_END, p.number, p)
        self.ask_start(p.stage_free[0], p)

    def end_prefill(self, t: int, p: Prefill) -> None:
        for r in p.flying.popleft():
            p.queued_tokens -= r.input
            self.first_token(t, r)
            if r.steps == 0:
                p.free += blocks(r.input)
                self.ask_start(t, p)

    def first_token(self, t: int, r: Request) -> None:
        if r.steps == 0 or not self.from_decode:
            r.first = t
        if r.steps == 0:
            r.last = t
            return
        # A step in progress has not made its token yet.
        r.decode = d = min(self.decodes, key=lambda d: sum(x.tokens for x in d.requests))
        d.requests.append(r)
        d.waiting.append(r)
        self.admit(t, d)

    # ------------------------------------------------------------------------------------------------- decode

    def admit(self, t: int, d: Decode) -> None:
        while d.waiting and blocks(d.waiting[0].tokens) <= d.free:
            r = d.waiting.popleft()
            d.free -= blocks(r.tokens)
            if r.begun:
                self.join(t, r)
            elif not self.prefills:
                r.transfer_end = t
                self.join(t, r)
            else:
                d.link_free = max(t, d.link_free) + max(
                    1, round(r.input * self.ticks_per_token + self.latency_ticks)
                )
                self.at(d.link_free, TRANSFER_END, d.number, r)

    def end_transfer(self, t: int, r: Request) -> None:
        assert r.prefill is not None
        r.transfer_end = t
        r.prefill.free += blocks(r.input)
        self.ask_start(t, r.prefill)
        self.join(t, r)

    def join(self, t: int, r: Request) -> None:
        assert r.decode is not None
        lane = min(r.decode.lanes, key=lambda lane: len(lane.batch) + len(lane.joining))
        lane.joining.append(r)
        if not lane.busy:
            lane.busy = True
            self.at(t, BOUNDARY, lane.number, lane)

    def boundary(self, t: int, lane: Lane) -> None:
        d = lane.decode
        lane.busy = True  # for who joins during this boundary
        for r in lane.batch:
            r.done += 1
            r.fresh = False
            if r.first < 0:
                r.first = t
        for r in [r for r in lane.batch if r.done == r.steps]:
            lane.batch.remove(r)
            d.requests.remove(r)
            d.free += blocks(r.tokens - 1)
            r.last = t
        self.admit(t, d)
        recomputed = []
        for r in lane.joining:
            r.fresh = True
            if r.begun:
                recomputed.append(r)
            else:
                r.decode_start = t
            r.begun = True
        lane.batch += lane.joining
        lane.joining = []
        while self.wanted(lane) > d.free:
            victim = lane.batch.pop()
            d.free += blocks(victim.tokens) if victim.fresh else blocks(victim.tokens - 1)
            d.waiting.appendleft(victim)
        d.free -= self.wanted(lane)
        lane.busy = bool(lane.batch)
        if lane.batch:
            again = [prefill_ticks(d.pool, [r.tokens - 1]) for r in recomputed if r in lane.batch]
            ticks = d.pool.times.pp * sum(again) + step_ticks(d.pool, lane.batch)
            self.at(t + ticks, BOUNDARY, lane.number, lane)

    def wanted(self, lane: Lane) -> int:
        """Blocks that the batch's next step takes."""
        return sum(1 for r in lane.batch if not r.fresh and blocks(r.tokens) > blocks(r.tokens - 1))

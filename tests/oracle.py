"""The simulator once more, plainly: every decode step is an event, nothing is planned ahead, no arrays.

It says what the kernel must do, bit for bit (tests/property/test_kernel_oracle.py). Times are integers of
1/1024 ns, every duration is at least 1. Events of one instant go by kind, then by number of the instance or lane.
Blocks never go below none or above all, which every change of them checks.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Callable

from disaggserve.simulate import Deployment, Pool, serving
from disaggserve.workload import Requests

VIEW, ARRIVAL, TRANSFER_END, LANE = range(4)


@dataclasses.dataclass(eq=False)
class Request:
    number: int
    input: int
    steps: int  # decode steps that it wants
    arrival: int
    past: int  # prompt tokens that need no more compute
    done: int = 0  # decode steps made
    begun: bool = False  # has been in a batch: if it waits, it was preempted
    fresh: bool = False  # no decode step since it joined its batch: the blocks of the next one are reserved
    owed: int = 0  # ticks of one stage for its recompute or swap
    ready: int | None = None  # its KV may be moved from then on; None: from now on
    prefill: Instance | None = None
    decode: Instance | None = None
    prefill_start: int = -1
    first: int = -1
    transfer_end: int = -1
    decode_start: int = -1
    last: int = -1

    @property
    def tokens(self) -> int:  # in the KV cache while its next step runs
        return self.input + self.done + 1


@dataclasses.dataclass(eq=False)
class Lane:
    number: int
    instance: Instance
    batch: list[Request] = dataclasses.field(default_factory=list)
    joining: list[Request] = dataclasses.field(default_factory=list)
    ending: list[Request] = dataclasses.field(default_factory=list)  # prompts that the step completes
    pulled: Request | None = None  # the loop waits for its KV
    running: bool = False  # a step is under way
    decoding: bool = False  # and it is a decode step of the batch
    asked: bool = False  # an event is on the way
    last_stage: int = 0  # when the step in progress begins its last stage


@dataclasses.dataclass(eq=False)
class Instance:
    number: int
    pool: Pool
    prefills: bool
    decodes: bool
    free: int
    stage_free: list[int]
    lanes: list[Lane] = dataclasses.field(default_factory=list)
    queue: deque[Request] = dataclasses.field(default_factory=deque)  # prompts not wholly in a step
    queued_tokens: int = 0
    waiting: deque[Request] = dataclasses.field(default_factory=deque)  # to be admitted for decode
    preempted: deque[Request] = dataclasses.field(default_factory=deque)
    requests: list[Request] = dataclasses.field(default_factory=list)  # to decode here, not finished
    link_free: int = 0

    def take(self, blocks: int) -> None:
        self.free -= blocks
        assert 0 <= self.free <= self.pool.blocks

    @property
    def kv_tokens(self) -> int:  # a step in progress has not made its tokens yet
        return sum(r.tokens for r in self.requests)


def blocks(tokens: int) -> int:
    return -(-tokens // 16)


def knots_ns(pool: Pool, total: int) -> float:
    knots, values = pool.times.prefill_knots_tokens, pool.times.prefill_knots_ns
    i = max(0, min(sum(1 for k in knots if k <= total) - 1, len(knots) - 2))
    slope = (values[i + 1] - values[i]) / (knots[i + 1] - knots[i])
    return float(values[i] + slope * (total - knots[i]))


def prefill_ticks(pool: Pool, total: int, squares: int) -> int:
    return max(1, round((knots_ns(pool, total) + pool.times.prefill_quad_ns * squares) * 1024.0))


def stage_ticks(pool: Pool, batch: list[Request], chunks: list[tuple[int, int]]) -> int:
    """Of a step with these decodes and chunks, each (tokens, tokens of that prompt before it)."""
    total, squares = sum(c for c, _ in chunks), sum(c * c + 2 * c * p for c, p in chunks)
    if not batch:
        return prefill_ticks(pool, total, squares)
    base, ctx = pool.times.decode_base_ns, pool.times.decode_ctx_ns

    def ticks(table: object, i: int) -> int:
        return round(float(table[i]) * 1024)  # type: ignore[index]

    last, size = len(base) - 1, len(batch)
    if size <= last:
        linear = max(1, ticks(base, size))
    else:
        a, b = max(1, ticks(base, last - 1)), max(1, ticks(base, last))
        linear = b + (b - a) * (size - last)
    attention = ticks(ctx, min(size, last)) * sum(r.tokens for r in batch)
    if chunks:
        linear = max(linear, round(knots_ns(pool, total + size) * 1024.0))
        attention += round(pool.times.prefill_quad_ns * squares * 1024.0)
    return linear + attention


class Oracle:
    """`moves` False: KV needs no transfer. Without prefill pools: decode alone (`run_decode`); without decode
    pools: prefill alone (`run_prefill`)."""

    def __init__(self, deployment: Deployment, requests: Requests, *, moves: bool = True) -> None:
        self.deployment = d = deployment
        self.moves = moves
        self.from_decode = d.first_token_from == "decode"
        self.inline = d.transfer == "inline" and not d.sticky
        self.stepwise = d.transfer == "step"
        self.pushes = d.handoff == "push" and not d.sticky
        self.token_ticks = d.kv_bytes_per_token / d.link_bytes_s * 1e9 * 1024
        self.swap_ticks = d.kv_bytes_per_token * 1e9 * 1024 / d.swap_bytes_s if d.swap_bytes_s else -1.0
        self.latency_ticks = d.link_latency_s * 1e9 * 1024
        self.view_ticks = round(d.view_age_s * 1e9 * 1024)
        self.instances: list[Instance] = []
        lanes = 0
        roles = [(d.prefill, True, False), (d.mixed, True, True), (d.decode, False, True)]
        for pool, prefills, decodes in [(p, a, b) for pools, a, b in roles for p in pools]:
            for _ in range(pool.count):
                i = Instance(len(self.instances), pool, prefills, decodes, pool.blocks, [0] * pool.times.pp)
                i.lanes = [Lane(lanes + k, i) for k in range(pool.times.pp)]
                lanes += pool.times.pp
                self.instances.append(i)
        self.prefills = [i for i in self.instances if i.prefills]
        self.decodes = [i for i in self.instances if i.decodes]
        self.seen: dict[Instance, tuple[int, int]] = dict.fromkeys(
            self.instances, (0, 0)
        )  # the routers' snapshot
        self.added: dict[tuple[str, int, Instance], int] = {}  # by (prefill | decode, router, instance) since
        self.origin = int(requests.arrival_ns[0]) if len(requests) else 0
        cached = requests.cached
        self.requests = [
            Request(
                n,
                int(requests.input[n]),
                self.steps(int(requests.output[n])),
                (int(requests.arrival_ns[n]) - self.origin) * 1024,
                0 if cached is None else min(int(cached[n]), int(requests.input[n]) - 1),
            )
            for n in range(len(requests))
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
        served = [r for r in self.requests if self.fits(r)]
        for request in served:
            self.at(request.arrival, ARRIVAL, 0, request)
        if self.view_ticks:
            self.at(self.view_ticks, VIEW, 0, None)
        handlers = {VIEW: self.look, ARRIVAL: self.arrive, TRANSFER_END: self.link, LANE: self.lane}
        while self.events:
            t, kind, _, _, what = heapq.heappop(self.events)
            handlers[kind](t, what)  # type: ignore[operator]
        assert all(r.last >= 0 for r in served)
        assert all(i.free == i.pool.blocks and not i.requests for i in self.instances)

        def ns(name: str) -> list[int]:
            ticks = [getattr(r, name) for r in self.requests]
            return [-1 if t < 0 else t // 1024 + self.origin for t in ticks]

        return {name: ns(name) for name in ("prefill_start", "first", "transfer_end", "decode_start", "last")}

    def fits(self, r: Request) -> bool:
        prompt = all(blocks(r.input) <= i.pool.blocks for i in self.prefills)
        whole = all(blocks(r.input + r.steps) <= i.pool.blocks for i in self.decodes)
        return prompt and (whole or r.steps == 0)

    # ------------------------------------------------------------------------------------------------ routers

    def look(self, t: int, _: object) -> None:
        self.seen = {i: (i.queued_tokens, i.kv_tokens) for i in self.instances}
        self.added = {}
        if self.events:
            self.at(t + self.view_ticks, VIEW, 0, None)

    def load(self, role: str, r: Request, i: Instance) -> int:
        router = r.number % self.deployment.routers
        if not self.view_ticks:
            return i.queued_tokens if role == "prefill" else i.kv_tokens
        return self.seen[i][role == "decode"] + self.added.get((role, router, i), 0)

    def choose(self, role: str, r: Request, tokens: int) -> Instance:
        def pace(i: Instance) -> int:
            if role == "decode" or not self.deployment.mixed:
                return 1
            return round(i.pool.times.prefill_stage_s([i.pool.batch_tokens]) * 1e9 / i.pool.batch_tokens)

        among = self.prefills if role == "prefill" else self.decodes
        chosen = min(among, key=lambda i: self.load(role, r, i) * pace(i))
        key = (role, r.number % self.deployment.routers, chosen)
        self.added[key] = self.added.get(key, 0) + tokens
        return chosen

    def arrive(self, t: int, r: Request) -> None:
        if self.prefills:
            r.prefill = self.choose("prefill", r, r.input)
            r.prefill.queued_tokens += r.input
        else:
            r.first = t
        if r.steps > 0 and (self.pushes or not self.prefills):
            r.decode = self.choose("decode", r, r.input + 1)
            r.decode.requests.append(r)
            self.wait_for_decode(t, r)
        elif self.prefills:
            self.queue_prompt(t, r)
        else:
            r.last = t

    def queue_prompt(self, t: int, r: Request) -> None:
        assert r.prefill is not None
        r.prefill.queue.append(r)
        if len(r.prefill.queue) == 1:
            self.wake(t, r.prefill)

    def wait_for_decode(self, t: int, r: Request) -> None:
        assert r.decode is not None
        r.decode.waiting.append(r)
        if len(r.decode.waiting) == 1:
            if self.inline:
                self.wake(t, r.decode)
            else:
                self.admit(t, r.decode)

    # --------------------------------------------------------------------------------------- memory and links

    def held(self, i: Instance, r: Request) -> int:
        """Blocks that a prompt holds where it is prefilled; where it may decode, its first step's too."""
        return blocks(r.input + 1 if i.decodes and r.steps > 0 else r.input)

    def release(self, t: int, i: Instance, count: int) -> None:
        i.take(-count)
        self.admit(t, i)
        if i.queue:
            self.wake(t, i)

    def room(self, i: Instance) -> int:
        """Blocks that decode may take for a request."""
        return i.free if i.free == i.pool.blocks else i.free - i.pool.blocks // serving.RESERVE

    def admit(self, t: int, i: Instance) -> None:
        if self.inline:
            return
        while i.preempted or i.waiting:
            r = i.preempted[0] if i.preempted else i.waiting[0]
            if blocks(r.tokens) > self.room(i):
                return
            i.take(blocks(r.tokens))
            if i.preempted:
                i.preempted.popleft()
                self.join(t, r)
                continue
            i.waiting.popleft()
            if not self.moves:
                r.transfer_end = t
                self.join(t, r)
            elif self.pushes:
                self.queue_prompt(t, r)
            else:
                self.move(t, r)

    def move_ticks(self, tokens: int) -> int:
        latency = 0.0 if self.stepwise else self.latency_ticks  # is over before a stepwise pull begins
        return max(1, round(tokens * self.token_ticks + latency))

    def move(self, t: int, r: Request) -> None:
        assert r.decode is not None
        begin = t if r.ready is None else r.ready
        if self.stepwise:
            if begin > t:
                self.at(begin, TRANSFER_END, r.decode.number, (self.move, r))
                return
            begin = max(t, r.decode.stage_free[0])
        end = max(begin, r.decode.link_free) + self.move_ticks(r.input)
        if self.deployment.overlap:
            end = max(end, t + self.move_ticks(min(16, r.input)))
        r.decode.link_free = end
        self.at(end, TRANSFER_END, r.decode.number, (self.end_transfer, r))

    def link(self, t: int, what: tuple[Callable[[int, Request], None], Request]) -> None:
        do, r = what
        do(t, r)

    def end_transfer(self, t: int, r: Request) -> None:
        assert r.prefill is not None
        r.transfer_end = t
        self.release(t, r.prefill, self.held(r.prefill, r))
        self.join(t, r)

    def join(self, t: int, r: Request) -> None:
        assert r.decode is not None
        lane = min(r.decode.lanes, key=lambda lane: len(lane.batch) + len(lane.joining))
        lane.joining.append(r)
        if not lane.asked:
            self.ask(max(t, r.decode.stage_free[0]), lane)

    def wake(self, t: int, i: Instance) -> None:
        idle = next((lane for lane in i.lanes if not lane.asked), None)
        if idle:
            self.ask(max(t, i.stage_free[0]), idle)

    def ask(self, t: int, lane: Lane) -> None:
        lane.asked = True
        self.at(t, LANE, lane.number, lane)

    # -------------------------------------------------------------------------------------------- one lane's step

    def lane(self, t: int, lane: Lane) -> None:
        if lane.running:
            lane.running = False
            self.end(t, lane)
        lane.asked = False
        self.begin(t, lane)

    def end(self, t: int, lane: Lane) -> None:
        i, freed = lane.instance, False
        for r in lane.batch if lane.decoding else []:
            r.done += 1
            r.fresh = False
            if r.first < 0:
                r.first = t
        for r in [r for r in lane.batch if r.done == r.steps]:
            lane.batch.remove(r)
            i.requests.remove(r)
            i.take(-blocks(r.tokens - 1))
            r.last = t
            freed = True
        ending, lane.ending = lane.ending, []
        for r in ending:
            freed |= self.end_prompt(t, r, lane)
        if lane.pulled:
            r, lane.pulled = lane.pulled, None
            assert r.prefill is not None
            r.transfer_end = t
            lane.joining.append(r)
            self.release(t, r.prefill, self.held(r.prefill, r))
        if freed:
            self.admit(t, i)

    def end_prompt(self, t: int, r: Request, lane: Lane) -> bool:
        """Whether that freed blocks."""
        i = lane.instance
        i.queued_tokens -= r.input
        if r.steps == 0 or not self.from_decode:
            r.first = t
        if r.steps == 0:
            r.last = t
            i.take(-self.held(i, r))
            return True
        if self.stepwise:
            r.ready = t + round(self.latency_ticks)
        elif self.deployment.overlap:
            r.ready = lane.last_stage
        if self.pushes:
            self.move(t, r)
            return False
        d = i if self.deployment.sticky else self.choose("decode", r, r.input + 1)
        full = bool(d.waiting or d.preempted) or blocks(r.input + 1) > self.room(d)
        if i.decodes and full:
            d = i
        r.decode = d
        d.requests.append(r)
        if d is i:
            r.transfer_end = t
            self.join(t, r)
        else:
            self.wait_for_decode(t, r)
            if not self.stepwise:
                r.ready = None
        return False

    def begin(self, t: int, lane: Lane) -> None:
        i = lane.instance
        if i.stage_free[0] > t:
            loop = self.inline and (i.waiting or i.preempted)
            if lane.batch or lane.joining or i.queue or loop:
                self.ask(i.stage_free[0], lane)
            return
        if self.pull(t, lane):
            return
        lane.asked = True  # for who looks for an idle lane meanwhile
        if not self.inline:
            self.gather(t, lane)
        chunks: list[tuple[int, int]] = []
        swapped_out = 0
        if i.pool.policy == "whole":
            chunks = self.take_prompts(t, lane, i.pool.batch_tokens)
        lane.decoding = not chunks
        if lane.decoding:
            swapped_out = self.grow(lane)
            if self.inline:
                self.come_back(t, lane)
            if i.pool.policy == "chunked":
                chunks = self.take_prompts(t, lane, i.pool.batch_tokens - len(lane.batch))
        batch = lane.batch if lane.decoding else []
        if not batch and not chunks:
            lane.asked = False
            return
        ticks = stage_ticks(i.pool, batch, chunks) + swapped_out + sum(r.owed for r in lane.batch)
        for r in lane.batch:
            r.owed = 0
        for stage, free in enumerate(i.stage_free):
            lane.last_stage = max(t, free)
            t = lane.last_stage + ticks
            i.stage_free[stage] = t
        lane.running = True
        self.ask(t, lane)
        if chunks and i.queue:
            self.wake(0, i)

    def pull(self, t: int, lane: Lane) -> bool:
        """An engine that pulls in its loop takes the first that waits, while few enough are pulled already."""
        i = lane.instance
        if not self.inline or not i.waiting:
            return False
        idle = sum(blocks(r.input) for k in i.lanes for r in k.joining)
        need = blocks(i.waiting[0].input + 1)
        if idle >= math.ceil(self.deployment.pull_below * i.pool.blocks) or need > i.free:
            return False
        lane.pulled = i.waiting.popleft()
        i.take(need)
        lane.running, lane.decoding = True, False
        i.stage_free[0] = t + self.move_ticks(lane.pulled.input)
        self.ask(i.stage_free[0], lane)
        return True

    def enter(self, t: int, r: Request, lane: Lane) -> None:
        r.fresh = True
        if not r.begun:
            r.decode_start = t
        r.begun = True
        lane.batch.append(r)

    def gather(self, t: int, lane: Lane) -> None:
        while lane.joining:
            # An engine that pulls in its loop counts the blocks of who joins twice: as it waits and as it runs.
            if self.inline and lane.batch and blocks(lane.joining[0].tokens) > lane.instance.free:
                break
            self.enter(t, lane.joining.pop(0), lane)

    def come_back(self, t: int, lane: Lane) -> None:
        i = lane.instance
        while i.preempted and blocks(i.preempted[0].tokens) <= i.free:
            i.take(blocks(i.preempted[0].tokens))
            self.enter(t, i.preempted.popleft(), lane)
        if not i.preempted or not lane.batch:
            self.gather(t, lane)

    def grow(self, lane: Lane) -> int:
        """Blocks for the batch's next step; preempts for them. Returns ticks of swapping out."""
        i, swapped = lane.instance, 0
        while self.wanted(lane) > i.free:
            victim = lane.batch.pop()
            i.take(-blocks(victim.tokens if victim.fresh else victim.tokens - 1))
            tokens = victim.tokens - 1
            if self.swap_ticks >= 0:
                victim.owed = max(1, round(tokens * self.swap_ticks / i.pool.times.pp))
                swapped += victim.owed
                i.preempted.append(victim)
            else:
                victim.owed = prefill_ticks(i.pool, tokens, tokens * tokens)
                i.preempted.appendleft(victim)
        i.take(self.wanted(lane))
        return swapped

    def wanted(self, lane: Lane) -> int:
        """Blocks that the batch's next step takes."""
        return sum(1 for r in lane.batch if not r.fresh and blocks(r.tokens) > blocks(r.tokens - 1))

    def take_prompts(self, t: int, lane: Lane, budget: int) -> list[tuple[int, int]]:
        """Prompts or chunks of them for the lane's step: (tokens, tokens of that prompt before)."""
        i, chunks = lane.instance, list[tuple[int, int]]()
        while i.queue and not (i.pool.batch_requests and len(chunks) == i.pool.batch_requests):
            r = i.queue[0]
            left = budget - sum(c for c, _ in chunks)
            chunk = r.input - r.past
            if i.pool.policy == "chunked":
                chunk = min(chunk, left)
                if chunk <= 0:
                    break
            elif chunks and chunk > left:
                break
            if r.prefill_start < 0:
                if self.held(i, r) > i.free or (i.decodes and (i.preempted or i.waiting)):
                    break
                i.take(self.held(i, r))
                r.prefill_start = t
            chunks.append((chunk, r.past))
            r.past += chunk
            if r.past < r.input:
                break
            lane.ending.append(i.queue.popleft())
        return chunks

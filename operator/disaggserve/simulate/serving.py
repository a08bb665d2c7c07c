"""What is simulated (pools of instances) and what comes out: a thin layer of arrays around the kernel."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from disaggserve.api.errors import InvalidInput
from disaggserve.latency import StepTimes
from disaggserve.simulate import kernel
from disaggserve.workload import Requests

Times = npt.NDArray[np.int64]
RESERVE = 100  # of so many blocks one stays free when decode admits: room to grow, or it preempts at once
_MAX_SPAN_NS = 2**50  # 13 days of arrivals: leaves room in 63 bits of ticks for queues to drain


class BadDeployment(InvalidInput):
    """What cannot be simulated, in one sentence."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Instances of one shape and role."""

    count: int
    times: StepTimes  # of one pipeline stage; .pp
    blocks: int  # KV blocks (16 tokens each) of one instance
    batch_tokens: int = 512  # of a step with prompts in it (L_m, or the chunk); decode alone does not use it
    policy: Literal["whole", "chunked"] = "whole"  # whole prompts, a longer one alone | cut to what is left
    batch_requests: int = 0  # prompts in one step at most; 0: no limit


@dataclasses.dataclass(frozen=True, eq=False)
class Deployment:
    """All instances of a plan, how KV moves between them, and the habits of their engine and routers."""

    prefill: tuple[Pool, ...]
    decode: tuple[Pool, ...]
    kv_bytes_per_token: int
    link_bytes_s: float
    link_latency_s: float = 0.0
    first_token_from: Literal["prefill", "decode"] = "prefill"
    mixed: tuple[Pool, ...] = ()  # whose instances prefill and decode
    sticky: bool = False  # a request decodes where it was prefilled (colocated engines)
    handoff: Literal["pull", "push"] = (
        "pull"  # decode fetches after prefill | reserves before, prefill pushes
    )
    overlap: bool = False  # KV moves layer by layer while the last stage of its prefill runs
    routers: int = 1
    view_age_s: float = 0.0  # routers see all loads as of the last multiple of it; 0: as they are
    # As soon as it may | with a step of decode | between two of them: its loop stands still
    transfer: Literal["link", "step", "inline"] = "link"
    pull_below: float = 0.05  # inline: the share of blocks that those pulled and not in a batch may hold
    swap_bytes_s: float | None = None  # the preempted are swapped out and in at this rate; None: recomputed


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What became of each request, int64 ns, -1 where it never happened (the request fits no memory)."""

    prefill_start_ns: Times
    first_ns: Times  # first token at the user
    transfer_end_ns: Times
    decode_start_ns: Times
    last_ns: Times
    events: int  # of the kernel, for measuring it


def run(deployment: Deployment, requests: Requests) -> Outcome:
    """Serve the requests on the deployment. Raises `BadDeployment`."""
    d = deployment
    if not (d.mixed or (d.prefill and d.decode)):
        raise BadDeployment("a deployment needs prefill and decode instances, or mixed ones")
    if not d.link_bytes_s > 0 or d.link_latency_s < 0 or d.kv_bytes_per_token < 0:
        raise BadDeployment("a link needs a bandwidth above 0, a latency and KV bytes of 0 or more")
    if d.mixed and not d.sticky and (d.handoff == "push" or d.transfer == "inline"):
        raise BadDeployment(
            "handoff push and transfer inline are of prefill and decode instances, not of mixed ones"
        )
    if d.sticky and (d.prefill or d.decode):
        raise BadDeployment("sticky is for mixed instances alone, and this deployment has others")
    if d.handoff == "push" and d.transfer != "link":
        raise BadDeployment(f"transfer {d.transfer} is a pull, and handoff is push")
    if d.transfer == "inline" and not 0 < d.pull_below <= 1:
        raise BadDeployment(f"pull_below is {d.pull_below}, not a share of blocks above 0 and up to 1")
    if d.routers < 1 or not 0 <= d.view_age_s < 1e6:
        raise BadDeployment(
            f"{d.routers} routers with views {d.view_age_s} s old; at least 1, of 0 s or more"
        )
    if d.swap_bytes_s is not None and not d.swap_bytes_s > 0:
        raise BadDeployment(f"swap_bytes_s is {d.swap_bytes_s}, not a bandwidth above 0")
    return _serve(d, requests, moves=True)


def run_copies(deployment: Deployment, requests: Requests, copies: int) -> Outcome:
    """Serve the requests on so many copies of the deployment, each a queue of its own: every request goes to one of them
    at random, the same one each time. Of Poisson arrivals each copy's part is Poisson again. Raises `BadDeployment`."""
    if copies == 1:
        return run(deployment, requests)
    dealt = np.random.default_rng(copies).integers(copies, size=len(requests))
    times = np.full((5, len(requests)), -1, np.int64)
    events = 0
    for copy in range(copies):
        mine = np.flatnonzero(dealt == copy)
        found = run(deployment, requests.take(mine))
        times[:, mine] = (
            found.prefill_start_ns,
            found.first_ns,
            found.transfer_end_ns,
            found.decode_start_ns,
            found.last_ns,
        )
        events += found.events
    return Outcome(times[0], times[1], times[2], times[3], times[4], events)


def run_prefill(pool: Pool, requests: Requests) -> Outcome:
    """The prefill phase alone (Algorithm 1): decode is free, so every request ends with its first token."""
    return _serve(Deployment((pool,), (), 0, 1.0), requests, moves=False)


def run_decode(pool: Pool, requests: Requests) -> Outcome:
    """The decode phase alone: every request's first token is out and its KV there when it arrives."""
    return _serve(Deployment((), (pool,), 0, 1.0), requests, moves=False)


def warm_up() -> None:
    """Compile the kernel, or load it from the cache; processes call it before they measure or fork."""
    none = np.zeros(0, np.int64)
    _serve(
        Deployment((), (), 0, 1.0), Requests(none, none.astype(np.int32), none.astype(np.int32)), moves=False
    )


def _serve(d: Deployment, requests: Requests, *, moves: bool) -> Outcome:
    """Run the kernel. Without `moves` KV needs no transfer."""
    arrival = requests.arrival_ns
    n = len(arrival)
    origin = int(arrival[0]) if n else 0
    if n >= kernel.MAX_REQUESTS:
        raise BadDeployment(f"{n:,} requests are more than the {kernel.MAX_REQUESTS:,} that one run holds")
    if n and (int(arrival[-1]) - origin > _MAX_SPAN_NS or np.any(np.diff(arrival) < 0)):
        raise BadDeployment("requests must be in order of arrival and within 13 days")
    pools = d.prefill + d.mixed + d.decode
    for pool in pools:
        if pool.count < 1 or pool.blocks < 1 or pool.times.pp < 1:
            raise BadDeployment(
                f"a pool has {pool.count} instances of {pool.blocks} KV blocks, pp {pool.times.pp}"
            )
        if pool.batch_tokens < 1 or pool.batch_requests < 0:
            raise BadDeployment(
                f"a pool's steps hold {pool.batch_tokens} tokens and {pool.batch_requests} prompts; at least 1, and 0 or more"
            )
    prefills, decodes = d.prefill + d.mixed, d.mixed + d.decode
    from_decode = d.first_token_from == "decode"

    rows = np.empty((4, n), dtype=np.int64)
    rows[0], rows[1] = arrival, requests.input
    rows[2] = requests.output - (0 if from_decode else 1) if decodes else 0
    rows[3] = 0 if requests.cached is None else np.minimum(requests.cached, requests.input - 1)
    inputs, steps = rows[1], rows[2]
    fits = np.ones(n, dtype=np.bool_)
    if prefills:
        fits &= _blocks(inputs) <= min(p.blocks for p in prefills)
    if decodes:
        fits &= (steps == 0) | (_blocks(inputs + steps) <= min(p.blocks for p in decodes))
    steps[~fits] = -1

    insts = np.zeros((sum(p.count for p in pools), kernel.INSTANCE_COLUMNS), dtype=np.int64)
    begin = 0
    for which, pool in enumerate(pools):
        own = insts[begin : begin + pool.count]
        begin += pool.count
        own[:, kernel.I_PP], own[:, kernel.I_TABLE] = pool.times.pp, which
        own[:, kernel.I_PREFILLS] = which < len(prefills)
        own[:, kernel.I_DECODES] = which >= len(d.prefill)
        own[:, kernel.I_CHUNKED] = pool.policy == "chunked"
        own[:, kernel.I_TOKENS], own[:, kernel.I_REQUESTS] = pool.batch_tokens, pool.batch_requests
        own[:, kernel.I_SLACK] = pool.blocks
        own[:, kernel.I_BLOCKS], own[:, kernel.I_RESERVE] = pool.blocks, pool.blocks // RESERVE
        own[:, kernel.I_MARK] = math.ceil(d.pull_below * pool.blocks)
    # No lane holds more requests than its instance has blocks.
    lanes, heaps, tree, when = kernel.lay_out(insts, min(n, max((p.blocks for p in decodes), default=1)))
    may_prefill, may_decode = sum(p.count for p in prefills), sum(p.count for p in decodes)
    token_ticks = d.kv_bytes_per_token * 1e9 * kernel.TICKS
    world = kernel.World(
        np.empty((n, kernel.REQUEST_COLUMNS), dtype=np.int64),
        insts,
        lanes,
        tree,
        when,
        float(d.kv_bytes_per_token / d.link_bytes_s * 1e9 * kernel.TICKS),
        float(d.link_latency_s * 1e9 * kernel.TICKS) if moves else -1.0,
        -1.0 if d.swap_bytes_s is None else float(token_ticks / d.swap_bytes_s),
        from_decode,
        bool(d.sticky),
        d.handoff == "push" and not d.sticky,
        d.transfer == "inline" and not d.sticky,
        d.transfer == "step",
        bool(d.overlap),
    )
    routing = kernel.Routing(
        np.zeros(may_prefill, dtype=np.int64),
        np.zeros(may_decode, dtype=np.int64),
        _paces(prefills) if d.mixed else np.zeros(0, dtype=np.int64),
        np.zeros((1 + d.routers, may_prefill + may_decode), dtype=np.int64),
        np.zeros(may_prefill, dtype=np.int64),
        round(d.view_age_s * 1e9 * kernel.TICKS),
    )
    times = np.empty((5, n), dtype=np.int64)
    events: int = kernel.serve(world, heaps, routing, _costs(tuple(p.times for p in pools)), rows, times)
    start, first, moved, begun, last = times
    return Outcome(start, first, moved, begun, last, events)


def _paces(pools: tuple[Pool, ...]) -> Times:
    """ns a prompt token on each instance, in steps as full as they may be."""
    paces = [round(p.times.prefill_stage_s([p.batch_tokens]) * 1e9 / p.batch_tokens) for p in pools]
    return np.repeat(np.array(paces, dtype=np.int64), [p.count for p in pools])


def _blocks(tokens: Times) -> Times:
    return (tokens + 15) >> 4


@functools.lru_cache(maxsize=256)
def _costs(times: tuple[StepTimes, ...]) -> kernel.Costs:
    """Times of one stage of each pool as the kernel's arrays."""
    widest = max((len(t.prefill_knots_tokens) for t in times), default=0)
    batches = max((len(t.decode_base_ns) for t in times), default=0)
    knots, values = np.zeros((2, len(times), widest))
    base, ctx = np.zeros((2, len(times), batches), dtype=np.int64)
    for i, t in enumerate(times):
        size = len(t.prefill_knots_tokens)
        knots[i, :size], values[i, :size] = t.prefill_knots_tokens, t.prefill_knots_ns
        if len(t.decode_base_ns) != batches or len(t.decode_ctx_ns) != batches:
            raise BadDeployment("decode tables of one deployment must reach to the same batch")
        base[i] = np.maximum(np.rint(t.decode_base_ns * kernel.TICKS), 1)
        ctx[i] = np.rint(t.decode_ctx_ns * kernel.TICKS)
    sizes = np.array([len(t.prefill_knots_tokens) for t in times], dtype=np.int64)
    quad = np.array([t.prefill_quad_ns for t in times], dtype=np.float64)
    return kernel.Costs(knots, values, sizes, quad, base, ctx)

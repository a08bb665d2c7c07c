"""What is simulated (pools of instances) and what comes out: a thin layer of arrays around the kernel."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from disaggserve.api.errors import InvalidInput
from disaggserve.latency import StepTimes
from disaggserve.simulate import kernel
from disaggserve.workload import Requests

Times = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_MAX_SPAN_NS = 2**50  # 13 days of arrivals: leaves room in 63 bits of ticks for queues to drain


class BadDeployment(InvalidInput):
    """What cannot be simulated, in one sentence."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Instances of one shape and role."""

    count: int
    times: StepTimes  # of one pipeline stage; .pp
    blocks: int  # KV blocks (16 tokens each) of one instance
    batch_tokens: int = 512  # prefill: prompts are batched up to so many tokens (L_m); decode: not used


@dataclasses.dataclass(frozen=True, eq=False)
class Deployment:
    """All instances of a plan and how KV moves between them."""

    prefill: tuple[Pool, ...]
    decode: tuple[Pool, ...]
    kv_bytes_per_token: int
    link_bytes_s: float
    link_latency_s: float = 0.0
    first_token_from: Literal["prefill", "decode"] = "prefill"


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
    if not deployment.prefill or not deployment.decode:
        raise BadDeployment("a deployment needs prefill and decode instances")
    if not deployment.link_bytes_s > 0 or deployment.link_latency_s < 0 or deployment.kv_bytes_per_token < 0:
        raise BadDeployment("a link needs a bandwidth above 0, a latency and KV bytes of 0 or more")
    return _serve(
        deployment.prefill,
        deployment.decode,
        requests,
        deployment.kv_bytes_per_token / deployment.link_bytes_s * 1e9 * kernel.TICKS,
        deployment.link_latency_s * 1e9 * kernel.TICKS,
        deployment.first_token_from == "decode",
    )


def run_prefill(pool: Pool, requests: Requests) -> Outcome:
    """The prefill phase alone (Algorithm 1): decode is free, so every request ends with its first token."""
    return _serve((pool,), (), requests, 0.0, 0.0, False)


def run_decode(pool: Pool, requests: Requests) -> Outcome:
    """The decode phase alone: every request's first token is out and its KV there when it arrives."""
    return _serve((), (pool,), requests, 0.0, -1.0, False)


def warm_up() -> None:
    """Compile the kernel, or load it from the cache; processes call it before they measure or fork."""
    none = np.zeros(0, np.int64)
    _serve((), (), Requests(none, none.astype(np.int32), none.astype(np.int32)), 0.0, 0.0, False)


def _serve(
    prefill: tuple[Pool, ...],
    decode: tuple[Pool, ...],
    requests: Requests,
    ticks_per_token: float,
    latency_ticks: float,
    first_from_decode: bool,
) -> Outcome:
    arrival = requests.arrival_ns
    n = len(arrival)
    origin = int(arrival[0]) if n else 0
    if n >= kernel.MAX_REQUESTS:
        raise BadDeployment(f"{n:,} requests are more than the {kernel.MAX_REQUESTS:,} that one run holds")
    if n and (int(arrival[-1]) - origin > _MAX_SPAN_NS or np.any(np.diff(arrival) < 0)):
        raise BadDeployment("requests must be in order of arrival and within 13 days")
    for pool in prefill + decode:
        if pool.count < 1 or pool.blocks < 1 or pool.times.pp < 1:
            raise BadDeployment(
                f"a pool has {pool.count} instances of {pool.blocks} KV blocks, pp {pool.times.pp}"
            )

    rows = np.empty((3, n), dtype=np.int64)
    rows[0], rows[1] = arrival, requests.input
    rows[2] = requests.output - (0 if first_from_decode else 1) if decode else 0
    inputs, steps = rows[1], rows[2]
    fits = np.ones(n, dtype=np.bool_)
    if prefill:
        fits &= _blocks(inputs) <= min(p.blocks for p in prefill)
    if decode:
        fits &= (steps == 0) | (_blocks(inputs + steps) <= min(p.blocks for p in decode))
    steps[~fits] = -1

    pools = prefill + decode
    prefills = _rows(prefill, kernel.PREFILL_COLUMNS)
    for row, (which, pool) in zip(prefills, _instances(prefill), strict=True):
        row[[kernel.P_HEAD, kernel.P_TAIL, kernel.P_RUN]] = -1
        row[[kernel.P_FREE, kernel.P_PP]] = pool.blocks, pool.times.pp
        row[[kernel.P_BATCH, kernel.P_TABLE]] = pool.batch_tokens, which
    decodes = _rows(decode, kernel.DECODE_COLUMNS)
    for row, (which, pool) in zip(decodes, _instances(decode), strict=True):
        row[[kernel.D_WHEAD, kernel.D_WTAIL, kernel.D_THEAD, kernel.D_TTAIL]] = -1
        row[[kernel.D_SLACK, kernel.D_PP, kernel.D_TABLE]] = pool.blocks, pool.times.pp, len(prefill) + which

    times = np.empty((5, n), dtype=np.int64)
    # No lane holds more requests than its instance has blocks.
    heap_size = min(n, max((p.blocks for p in decode), default=1))
    arguments: list[Any] = [
        rows,
        times,
        np.empty((n, kernel.REQUEST_COLUMNS), dtype=np.int64),
        prefills,
        decodes,
        *kernel.tables(prefills, decodes, heap_size),
        *_tables(tuple(p.times for p in pools)),
        # Always the same types: every new combination would be compiled anew.
        float(ticks_per_token),
        float(latency_ticks),
        bool(first_from_decode),
    ]
    events: int = kernel.serve(*arguments)
    start, first, moved, begun, last = times
    return Outcome(start, first, moved, begun, last, events)


def _blocks(tokens: Times) -> Times:
    return (tokens + 15) >> 4


def _instances(pools: tuple[Pool, ...]) -> list[tuple[int, Pool]]:
    return [(which, pool) for which, pool in enumerate(pools) for _ in range(pool.count)]


def _rows(pools: tuple[Pool, ...], columns: int) -> Times:
    return np.zeros((sum(p.count for p in pools), columns), dtype=np.int64)


@functools.lru_cache(maxsize=256)
def _tables(times: tuple[StepTimes, ...]) -> tuple[Floats, Floats, Times, Floats, Times, Times]:
    """Step times of each pool as the kernel's arrays: prefill in ns, decode in ticks of a whole pass (pp stages)."""
    widest = max((len(t.prefill_knots_tokens) for t in times), default=0)
    batches = max((len(t.decode_base_ns) for t in times), default=0)
    knots, values = np.zeros((2, len(times), widest))
    base, ctx = np.zeros((2, len(times), batches), dtype=np.int64)
    for i, t in enumerate(times):
        size = len(t.prefill_knots_tokens)
        knots[i, :size], values[i, :size] = t.prefill_knots_tokens, t.prefill_knots_ns
        if len(t.decode_base_ns) != batches or len(t.decode_ctx_ns) != batches:
            raise BadDeployment("decode tables of one deployment must reach to the same batch")
        base[i] = np.maximum(np.rint(t.decode_base_ns * (kernel.TICKS * t.pp)), 1)
        ctx[i] = np.rint(t.decode_ctx_ns * (kernel.TICKS * t.pp))
    sizes = np.array([len(t.prefill_knots_tokens) for t in times], dtype=np.int64)
    quad = np.array([t.prefill_quad_ns for t in times], dtype=np.float64)
    return knots, values, sizes, quad, base, ctx

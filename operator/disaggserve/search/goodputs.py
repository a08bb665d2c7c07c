"""Goodput of one shape, of a pair and of a whole plan, by simulation; remembered within one search only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from disaggserve import simulate
from disaggserve.catalogue import BLOCK_TOKENS, GPU, Link
from disaggserve.engines import Role
from disaggserve.latency import StepTimes
from disaggserve.search import predicting
from disaggserve.search.problem import Problem, Shape
from disaggserve.simulate import Deployment, Outcome, Pool, Prediction
from disaggserve.workload import Requests, Workload

SCREEN = 3000  # requests that show which of several are worth a closer look
DRAWN = 16  # requests of so many (rate, number, seed) are remembered
PART = 64  # instances of a larger pool that tell for all of them
ENOUGH = 9000  # requests a seed after warm-up, where they come sooner than the steady 600 s; 3000 make decode look 5 % better
RESOLUTION = 0.02


class Kept(NamedTuple):
    """Shares of requests that keep the promise, TTFT, TPOT."""

    both: float
    ttft: float
    tpot: float


_Drawn = dict[tuple[float, int, int], Requests]


class Goodputs:
    """Simulations of one search on one GPU product, counted, each goodput taken once.

    `drawn`: requests by rate, how many and seed, shared where one search has several of these.
    """

    def __init__(self, problem: Problem, gpu: GPU, drawn: _Drawn | None = None) -> None:
        self.problem, self.gpu = problem, gpu
        self.simulations = 0
        self._drawn: _Drawn = {} if drawn is None else drawn
        self._pools: dict[tuple[Shape, int], Pool] = {}
        self._phases: dict[tuple[Role, Shape], float] = {}
        self._alone: dict[tuple[Role, Shape, int, float], float] = {}
        self._fluid: dict[tuple[Role, Shape], float] = {}

    def pool(self, shape: Shape, count: int = 1) -> Pool:
        """Instances of that shape on this GPU."""
        if (shape, count) not in self._pools:
            p = self.problem
            self._pools[shape, count] = predicting.pool(p.model, self.gpu, p.engine, *shape, count, p.profile)
        return self._pools[shape, count]

    def phase(self, role: Role, shape: Shape) -> float:
        """Goodput of one instance with its phase alone (Algorithm 1's inner loop), req/s; 0 where the promise
        is not kept even without load.

        Prefill is judged on TTFT, decode on TPOT, both against the attainment of the promise.
        """
        key = (role, shape)
        if key not in self._phases:
            self._phases[key] = self._phase(role, shape)
        return self._phases[key]

    def _phase(self, role: Role, shape: Shape) -> float:
        if self.idle(role, shape, self.problem.promise.attainment) > self._limit_s(role):
            return 0.0
        return self._highest(
            lambda rate, seed: self._one_phase(role, shape, 1, rate, seed, ENOUGH), self.guess(role, shape)
        )

    def alone(self, role: Role, shape: Shape, count: int, rate: float) -> float:
        """Share of requests that keep their limit when `count` instances serve this phase and nothing else does.

        On one seed of a few thousand requests: to see what is worth a simulation of both phases. The other phase
        only makes it worse (queues before the link, prefill's memory held), chance aside. Of more than PART
        instances PART are simulated with their share of the rate: what more of them in one pool gain is little.
        """
        part = min(count, PART)
        key = (role, shape, part, rate * part / count)
        if key not in self._alone:
            self._alone[key] = self._one_phase(*key, predicting.SEARCH_SEEDS[0], SCREEN)
        return self._alone[key]

    def _one_phase(self, role: Role, shape: Shape, count: int, rate: float, seed: int, enough: int) -> float:
        pool = self.pool(shape, count)
        if role == "prefill":
            return self._kept(lambda r: simulate.run_prefill(pool, r), rate, seed, enough).ttft
        return self._kept(lambda r: simulate.run_decode(pool, r), rate, seed, enough).tpot

    def fluid(self, role: Role, shape: Shape) -> float:
        """Requests per second that one instance cannot exceed, whatever the queue: work per request, the best
        batch, and for decode the largest batch that memory and TPOT allow on average."""
        key = (role, shape)
        if key not in self._fluid:
            pool, workload = self.pool(shape), self.problem.workload
            self._fluid[key] = (
                _prefill_fluid(pool, workload)
                if role == "prefill"
                else _decode_per_s(pool, workload, self.problem.promise.tpot_s)
            )
        return self._fluid[key]

    def guess(self, role: Role, shape: Shape) -> float:
        """A rate near the goodput of one instance, to begin from."""
        pool, workload = self.pool(shape), self.problem.workload
        if role == "prefill":
            return 0.7 * _prefill_per_s(pool, workload)
        return 0.9 * _decode_per_s(pool, workload, self.problem.promise.tpot_s)

    def joint(self, deployment: Deployment, start: float, good: float = 0.0, bad: float = math.inf) -> float:
        """Goodput of a whole deployment, req/s: highest rate at which enough requests keep both limits.

        `good`, `bad`: rates below and above `start` at which it is known to keep them, and not to.
        """
        return self._highest(
            lambda rate, seed: self._kept(lambda r: simulate.run(deployment, r), rate, seed).both,
            start,
            good,
            bad,
        )

    def kept(
        self,
        deployment: Deployment,
        rate: float,
        seeds: Sequence[int] = predicting.SEARCH_SEEDS,
        enough: int = ENOUGH,
    ) -> Kept:
        """Mean shares over the seeds at that rate."""
        seeds = predicting.needed(seeds, rate)
        self.simulations += len(seeds)
        drawn = {seed: self._requests(rate, enough, seed) for seed in seeds}
        warmup, window = predicting.warmup_s(rate), predicting.window_s(rate, enough)

        def run(seed: int) -> Kept:
            return self._judged(drawn[seed], simulate.run(deployment, drawn[seed]), warmup, window)

        rows = predicting.side_by_side(run, seeds)
        return Kept(*(float(np.mean(column)) for column in zip(*rows, strict=True)))

    def idle(self, role: Role, shape: Shape, quantile: float, link: Link | None = None) -> float:
        """TTFT or TPOT in seconds of the request at that quantile, without any other traffic.

        With `link`, TPOT has each request's KV transfer in it (where the first token comes from prefill).
        """
        return float(np.quantile(self.idle_rows(role, shape, link), quantile, method="inverted_cdf"))

    def idle_rows(self, role: Role, shape: Shape, link: Link | None = None) -> npt.NDArray[np.float64]:
        """The same in seconds by row of the lengths."""
        times, lengths = self.pool(shape).times, self.problem.workload.lengths
        if role == "prefill":
            prompt = _computed(self.problem.workload)
            alone_ns = _stage_ns(times, prompt) + times.prefill_quad_ns * prompt**2
            return alone_ns * (1e-9 * times.pp)
        # Context + 1 grows by one a step: the mean over output − 1 steps.
        mean = lengths.input + (lengths.output + 2) / 2
        by_row = times.decode_stage_s(1, 0) + mean * (times.decode_stage_s(1, 1) - times.decode_stage_s(1, 0))
        by_row = by_row * times.pp
        if link is not None and self.problem.engine.first_token_from == "prefill":
            by_row = by_row + self.moved_rows(link) / np.maximum(lengths.output - 1, 1)
        return np.where(lengths.output > 1, by_row, 0.0)

    def idle_first_rows(self, shape: Shape, link: Link) -> npt.NDArray[np.float64]:
        """Seconds from the end of prefill to the user's first token without load, by row of the lengths, for a decode
        instance of that shape: none where the token comes from prefill, else the KV transfer and one decode step."""
        times, lengths = self.pool(shape).times, self.problem.workload.lengths
        if self.problem.engine.first_token_from == "prefill":
            return np.zeros(len(lengths))
        a_token = times.decode_stage_s(1, 1) - times.decode_stage_s(1, 0)
        step = times.decode_stage_s(1, 0) + (lengths.input + 2) * a_token
        return self.moved_rows(link) + step * times.pp

    def moved_rows(self, link: Link) -> npt.NDArray[np.float64]:
        """Seconds that the KV of each row's prompt takes over the link."""
        per_token_s = self.problem.model.kv_bytes_per_token() / link.bytes_per_s
        return self.problem.workload.lengths.input.astype(np.float64) * per_token_s + link.latency_s

    def _limit_s(self, role: Role) -> float:
        return self.problem.promise.ttft_s if role == "prefill" else self.problem.promise.tpot_s

    def _highest(
        self, kept: Callable[[float, int], float], start: float, good: float = 0.0, bad: float = math.inf
    ) -> float:
        target = self.problem.promise.attainment

        def attain(rate: float) -> float:
            # Once the seeds left cannot make up for the misses, the answer is known.
            seeds = predicting.needed(predicting.SEARCH_SEEDS, rate)
            total, left = 0.0, len(seeds)
            for seed in seeds:
                total, left = total + kept(rate, seed), left - 1
                if total + left < target * len(seeds):
                    break
            return (total + left) / len(seeds)

        return simulate.goodput(attain, target, start=start, low=good, high=bad, resolution=RESOLUTION)

    def _requests(self, rate: float, enough: int, seed: int) -> Requests:
        key = (rate, enough, seed)
        if key not in self._drawn:
            if len(self._drawn) >= DRAWN:
                self._drawn.clear()
            workload = dataclasses.replace(self.problem.workload, rate=rate)
            seconds = predicting.warmup_s(rate) + predicting.window_s(rate, enough) + predicting.COOLDOWN_S
            self._drawn[key] = workload.requests(seconds, self.problem.seed * 1000 + seed)
        return self._drawn[key]

    def _kept(self, run: Callable[[Requests], Outcome], rate: float, seed: int, enough: int = ENOUGH) -> Kept:
        self.simulations += 1
        requests = self._requests(rate, enough, seed)
        warmup, window = predicting.warmup_s(rate), predicting.window_s(rate, enough)
        return self._judged(requests, run(requests), warmup, window)

    def _judged(self, requests: Requests, outcome: Outcome, warmup: float, window: float) -> Kept:
        """Shares of those that arrive in the `window` seconds after the warm-up."""
        begin, end = np.searchsorted(requests.arrival_ns, [int(warmup * 1e9), int((warmup + window) * 1e9)])
        cut = slice(int(begin), int(end))
        first, last = outcome.first_ns[cut], outcome.last_ns[cut]
        steps = np.maximum(requests.output[cut] - 1, 1)
        ttft = (first >= 0) & (first - requests.arrival_ns[cut] <= self.problem.promise.ttft_s * 1e9)
        tpot = (last >= 0) & ((last - first) <= self.problem.promise.tpot_s * 1e9 * steps)
        if not len(first):
            return Kept(0.0, 0.0, 0.0)
        return Kept(float(np.mean(ttft & tpot)), float(np.mean(ttft)), float(np.mean(tpot)))


class Measured(NamedTuple):
    """Goodput of a deployment, req/s; what the datasheet allows, req/s per GPU."""

    goodput: float
    bound: float
    simulations: int


def measure(
    problem: Problem, deployment: Deployment, predicted: Prediction, gpu: GPU, decode_gpu: GPU
) -> Measured:
    """What a given deployment is good for; `predicted`: on fresh seeds, at the workload's rate."""
    goodputs, rate = Goodputs(problem, gpu), problem.workload.rate
    goodput = goodputs.joint(deployment, rate)
    if predicted.attainment >= problem.promise.attainment:
        goodput = max(goodput, rate)  # met on fresh seeds, whatever the search's own say of it
    node_gpus = max(n.gpus_total for n in problem.inventory.nodes)
    simulations = goodputs.simulations + len(predicting.FRESH_SEEDS)
    return Measured(goodput, bound_per_gpu(problem, gpu, node_gpus, decode_gpu), simulations)


def _prefill_per_s(pool: Pool, workload: Workload) -> float:
    """Prompts per second of one instance that is never idle, unbatched."""
    lengths = workload.lengths.input[:: max(1, len(workload.lengths) // 256)]
    return 1.0 / float(np.mean([pool.times.prefill_stage_s([n]) for n in lengths.tolist()]))


def _computed(workload: Workload) -> npt.NDArray[np.float64]:
    """Prompt tokens by row of the lengths, those aside that a prefix cache holds."""
    prompt = workload.lengths.input.astype(np.float64)
    trace = workload.trace
    if trace is None or trace.cached is None or len(trace) != len(prompt):
        return prompt
    return np.maximum(prompt - trace.cached, 1.0)


def _stage_ns(times: StepTimes, tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A prefill stage by tokens of the batch, attention's square aside."""
    knots, ns = times.prefill_knots_tokens, times.prefill_knots_ns
    slope = (ns[-1] - ns[-2]) / (knots[-1] - knots[-2])
    beyond = np.maximum(tokens - knots[-1], 0.0)
    values: npt.NDArray[np.float64] = np.interp(tokens, knots, ns) + slope * beyond
    return values


def _prefill_fluid(pool: Pool, workload: Workload) -> float:
    """Prompts per second of one instance that is never idle, each batched at the best batch's time per token."""
    times, lengths = pool.times, _computed(workload)
    totals = np.linspace(1, max(pool.batch_tokens, 2), 64)
    a_token = float(np.min(_stage_ns(times, totals) / totals))
    batched = np.minimum(lengths * a_token, _stage_ns(times, lengths))
    work = np.where(lengths <= pool.batch_tokens, batched, _stage_ns(times, lengths))
    return 1e9 / float(np.mean(work + times.prefill_quad_ns * lengths**2))


def _decode_per_s(pool: Pool, workload: Workload, tpot_s: float) -> float:
    """Requests per second of one instance at the largest mean batch that memory and TPOT allow."""
    times, lengths = pool.times, workload.lengths
    # As seen over time: a request counts for each of its steps.
    steps = np.maximum(lengths.output - 1, 0)
    context = float(np.sum(steps * (lengths.input + lengths.output / 2)) / max(1, np.sum(steps)))
    batch = np.arange(1, len(times.decode_base_ns))
    stage_s = (times.decode_base_ns[1:] + times.decode_ctx_ns[1:] * batch * context) * 1e-9
    fits = (stage_s * times.pp <= tpot_s) & (batch * times.pp * context <= pool.blocks * BLOCK_TOKENS)
    rate = np.where(fits, batch / stage_s, 0.0)
    best = float(rate.max()) or float(1 / stage_s[0])
    return best / max(1.0, float(np.mean(lengths.output)) - 1)


def bound_per_gpu(problem: Problem, gpu: GPU, node_gpus: int, decode_gpu: GPU | None = None) -> float:
    """What the hardware's datasheet allows, req/s per GPU, whatever the software; 0 where it cannot be said.

    GPU seconds of a request, prefill and decode on GPUs of their own. Prefill: the flops of its matrices and
    causal attention at peak. Decode: each token reads its request's KV, and the weights shared by the largest
    batch whose KV fits a node's GPUs beside one copy of the weights, at peak bandwidth; or its flops, if those
    take longer. Promises, links and queues are not in it. `decode_gpu`: decode's, on nodes
    of `node_gpus`, where it is another.
    """
    model, lengths = problem.model, problem.workload.lengths
    layers = model.layers * (model.attention_params + model.ffn_params)
    prompt = lengths.input.astype(np.float64)
    attention = 2 * model.layers * model.heads * model.head_dim
    prefill_s = float(np.mean(2 * layers * prompt + attention * prompt**2)) / gpu.bf16_flops
    context = float(np.mean(prompt + lengths.output / 2))
    tokens = float(np.mean(lengths.output)) - 1
    weights = float((layers + model.table_params) * model.bytes_per_weight)
    gpu = decode_gpu or gpu
    room = node_gpus * gpu.memory_bytes - weights
    batch = math.floor(room / (model.kv_bytes_per_token() * context)) if room > 0 else 0
    if batch < 1:
        return 0.0
    read_s = (weights / batch + context * model.kv_bytes_per_token()) / gpu.bandwidth_bytes_s
    decode_s = tokens * max(read_s, 2 * (layers + model.table_params) / gpu.bf16_flops)
    return 1.0 / (prefill_s + decode_s)

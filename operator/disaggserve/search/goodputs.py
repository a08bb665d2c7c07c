"""Goodput of one shape, of a pair and of a whole plan, by simulation; remembered within one search only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from disaggserve import simulate
from disaggserve.catalogue import BLOCK_TOKENS, GPU, Link
from disaggserve.engines import Role
from disaggserve.search import predicting
from disaggserve.search.problem import Problem, Shape
from disaggserve.simulate import Deployment, Outcome, Pool
from disaggserve.workload import Requests, Workload

ENOUGH = 9000  # requests a seed after warm-up, where they come sooner than the steady 600 s; 3000 make decode look 5 % better
RESOLUTION = 0.02


class Kept(NamedTuple):
    """Shares of requests that keep the promise, TTFT, TPOT."""

    both: float
    ttft: float
    tpot: float


class Goodputs:
    """Simulations of one search on one GPU product, counted, each goodput taken once."""

    def __init__(self, problem: Problem, gpu: GPU) -> None:
        self.problem, self.gpu = problem, gpu
        self.simulations = 0
        self._phases: dict[tuple[Role, Shape], float] = {}

    def pool(self, shape: Shape, count: int = 1) -> Pool:
        """Instances of that shape on this GPU."""
        return predicting.pool(self.problem.model, self.gpu, self.problem.engine, *shape, count)

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
        problem, pool = self.problem, self.pool(shape)
        if self.idle(role, shape, problem.promise.attainment) > self._limit_s(role):
            return 0.0
        if role == "prefill":

            def run(requests: Requests) -> Outcome:
                return simulate.run_prefill(pool, requests)

        else:

            def run(requests: Requests) -> Outcome:
                return simulate.run_decode(pool, requests)

        which = 1 if role == "prefill" else 2
        return self._highest(lambda rate, seed: self._kept(run, rate, seed)[which], self.guess(role, shape))

    def guess(self, role: Role, shape: Shape) -> float:
        """A rate near the goodput of one instance, to begin from."""
        pool, workload = self.pool(shape), self.problem.workload
        if role == "prefill":
            return 0.7 * _prefill_per_s(pool, workload)
        return _decode_per_s(pool, workload, self.problem.promise.tpot_s)

    def joint(self, deployment: Deployment, start: float) -> float:
        """Goodput of a whole deployment, req/s: highest rate at which enough requests keep both limits."""
        return self._highest(
            lambda rate, seed: self._kept(lambda r: simulate.run(deployment, r), rate, seed).both, start
        )

    def kept(self, deployment: Deployment, rate: float) -> Kept:
        """Mean shares over the search's seeds at that rate."""
        rows = [
            self._kept(lambda r: simulate.run(deployment, r), rate, seed) for seed in predicting.SEARCH_SEEDS
        ]
        return Kept(*(float(np.mean(column)) for column in zip(*rows, strict=True)))

    def idle(self, role: Role, shape: Shape, quantile: float, link: Link | None = None) -> float:
        """TTFT or TPOT in seconds of the request at that quantile, without any other traffic.

        With `link`, TPOT has each request's KV transfer in it (where the first token comes from prefill).
        """
        times, lengths = self.pool(shape).times, self.problem.workload.lengths
        if role == "prefill":
            values = [times.prefill_stage_s([n]) for n in np.unique(lengths.input).tolist()]
            by_row = np.array(values)[np.unique(lengths.input, return_inverse=True)[1]]
        else:
            # Context + 1 grows by one a step: the mean over output − 1 steps.
            mean = lengths.input + (lengths.output + 2) / 2
            by_row = times.decode_stage_s(1, 0) + mean * (
                times.decode_stage_s(1, 1) - times.decode_stage_s(1, 0)
            )
            if link is not None and self.problem.engine.first_token_from == "prefill":
                moved_s = link.latency_s + lengths.input * (
                    self.problem.model.kv_bytes_per_token() / link.bytes_per_s
                )
                by_row = by_row + moved_s / np.maximum(lengths.output - 1, 1) / times.pp
            by_row = np.where(lengths.output > 1, by_row, 0.0)
        return float(np.quantile(by_row, quantile, method="inverted_cdf")) * times.pp

    def _limit_s(self, role: Role) -> float:
        return self.problem.promise.ttft_s if role == "prefill" else self.problem.promise.tpot_s

    def _highest(self, kept: Callable[[float, int], float], start: float) -> float:
        target = self.problem.promise.attainment

        def attain(rate: float) -> float:
            # Once the seeds left cannot make up for the misses, the answer is known.
            total, left = 0.0, len(predicting.SEARCH_SEEDS)
            for seed in predicting.SEARCH_SEEDS:
                total, left = total + kept(rate, seed), left - 1
                if total + left < target * len(predicting.SEARCH_SEEDS):
                    break
            return (total + left) / len(predicting.SEARCH_SEEDS)

        return simulate.goodput(attain, target, start=start, resolution=RESOLUTION)

    def _kept(self, run: Callable[[Requests], Outcome], rate: float, seed: int) -> Kept:
        self.simulations += 1
        warmup, window = predicting.WARMUP_S, predicting.window_s(rate, ENOUGH)
        workload = dataclasses.replace(self.problem.workload, rate=rate)
        requests = workload.requests(warmup + window + predicting.COOLDOWN_S, self.problem.seed * 1000 + seed)
        outcome = run(requests)
        begin, end = np.searchsorted(requests.arrival_ns, [int(warmup * 1e9), int((warmup + window) * 1e9)])
        cut = slice(int(begin), int(end))
        first, last = outcome.first_ns[cut], outcome.last_ns[cut]
        steps = np.maximum(requests.output[cut] - 1, 1)
        ttft = (first >= 0) & (first - requests.arrival_ns[cut] <= self.problem.promise.ttft_s * 1e9)
        tpot = (last >= 0) & ((last - first) <= self.problem.promise.tpot_s * 1e9 * steps)
        if not len(first):
            return Kept(0.0, 0.0, 0.0)
        return Kept(float(np.mean(ttft & tpot)), float(np.mean(ttft)), float(np.mean(tpot)))


def _prefill_per_s(pool: Pool, workload: Workload) -> float:
    """Prompts per second of one instance that is never idle, unbatched."""
    lengths = workload.lengths.input[:: max(1, len(workload.lengths) // 256)]
    return 1.0 / float(np.mean([pool.times.prefill_stage_s([n]) for n in lengths.tolist()]))


def _decode_per_s(pool: Pool, workload: Workload, tpot_s: float) -> float:
    """Requests per second of one instance at the largest batch that memory and TPOT allow, about."""
    times, lengths = pool.times, workload.lengths
    context = float(np.mean(lengths.input + lengths.output / 2))
    batch = np.arange(1, len(times.decode_base_ns))
    stage_s = (times.decode_base_ns[1:] + times.decode_ctx_ns[1:] * batch * context) * 1e-9
    fits = (stage_s * times.pp <= 0.9 * tpot_s) & (batch * times.pp * context <= pool.blocks * BLOCK_TOKENS)
    rate = np.where(fits, batch / stage_s, 0.0)
    best = float(rate.max()) or float(1 / stage_s[0])
    return best / max(1.0, float(np.mean(lengths.output)) - 1)


def bound_per_gpu(problem: Problem, gpu: GPU, node_gpus: int) -> float:
    """What the hardware's datasheet allows, req/s per GPU, whatever the software; 0 where it cannot be said.

    GPU seconds of a request, prefill and decode on GPUs of their own. Prefill: the flops of its matrices and
    causal attention at peak. Decode: each token reads its request's KV, and the weights shared by the largest
    batch whose KV fits a node's GPUs beside one copy of the weights, at peak bandwidth; or its flops, if those
    take longer. Promises, links and queues are not in it.
    """
    model, lengths = problem.model, problem.workload.lengths
    layers = model.layers * (model.attention_params + model.ffn_params)
    prompt = lengths.input.astype(np.float64)
    attention = 2 * model.layers * model.heads * model.head_dim
    prefill_s = float(np.mean(2 * layers * prompt + attention * prompt**2)) / gpu.bf16_flops
    context = float(np.mean(prompt + lengths.output / 2))
    tokens = float(np.mean(lengths.output)) - 1
    weights = float((layers + model.table_params) * model.bytes_per_weight)
    room = node_gpus * gpu.memory_bytes - weights
    batch = math.floor(room / (model.kv_bytes_per_token() * context)) if room > 0 else 0
    if batch < 1:
        return 0.0
    read_s = (weights / batch + context * model.kv_bytes_per_token()) / gpu.bandwidth_bytes_s
    decode_s = tokens * max(read_s, 2 * (layers + model.table_params) / gpu.bf16_flops)
    return 1.0 / (prefill_s + decode_s)

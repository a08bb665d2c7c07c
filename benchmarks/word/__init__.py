"""What the programs `word_*.py` share: what to send, what the simulator says of what was sent, and the table of both."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import statistics
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from disaggserve import catalogue, latency, simulate
from disaggserve.latency import fitting, measurements
from disaggserve.workload import Lengths, Workload, read_trace
from disaggworker.profiling.grid import Cell, LeftOut
from disaggworker.profiling.grid import table as rows_of
from disaggworker.profiling.over_http import OverHTTP
from e2e import load

# What is measured over HTTP, as `disaggworker profile` does, some seconds of it: it is measured often.
PREFILLS = 5  # steps of prefill, at least
BATCHES = (1, 1, 1, 2)  # prompts in one of them, in turns
DECODE = tuple(Cell("decode", *both) for both in ((1, 101), (4, 101), (8, 101), (2, 331), (4, 331)))
SPEEDS = {"prefill": 6, "decode": 4}  # of a core, at which each load is simulated
_OPENING = 12  # profiles before the first load, two minutes
PARTS = 15  # loads of each rate
_IDLE_S = 10.0  # between two of them, in the trace that is kept
LATE_BOUND = 0.01  # of the steps of a paced worker
# Bounds every measured step from below, and no CPU comes near: a profile is of a model and a GPU of the catalogue.
GPU = catalogue.gpu("NVIDIA-A100-SXM4-80GB")


@dataclasses.dataclass(frozen=True)
class Row:
    """One rate. `served` and `simulated` have attainment, attainmentLow, attainmentHigh, ttft and tpot {p50, p90}, seconds."""

    rate: float  # req/s
    requests: int
    served: dict[str, Any]
    simulated: dict[str, Any]
    late: float | None  # share of steps; None: not paced

    @property
    def difference(self) -> float:
        """Served less simulated attainment."""
        return float(self.served["attainment"] - self.simulated["attainment"])


def table(rows: Sequence[Row]) -> str:
    """Markdown, for the page of benchmarks."""
    lines = [
        "| req/s | requests | served, % (95 % interval) | simulated, % | difference, points | late steps | "
        "TTFT p50, p90, ms: served / simulated | TPOT p50, p90, ms: served / simulated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        served, simulated = row.served, row.simulated
        times = " | ".join(
            " / ".join(
                f"{1e3 * said[what]['p50']:.0f}, {1e3 * said[what]['p90']:.0f}"
                for said in (served, simulated)
            )
            for what in ("ttft", "tpot")
        )
        lines.append(
            f"| {row.rate:.2f} | {row.requests} | {100 * served['attainment']:.1f} "
            f"({100 * served['attainmentLow']:.1f} to {100 * served['attainmentHigh']:.1f}) | "
            f"{100 * simulated['attainment']:.1f} | {100 * row.difference:+.1f} | "
            f"{'–' if row.late is None else f'{row.late:.2%}'} | {times} |"
        )
    return "\n".join(lines)


def verdict(rows: Sequence[Row], bound: float) -> int:
    """Prints the table and whether it holds; the exit code."""
    print(table(rows))
    print(
        f"largest difference {max(abs(row.difference) for row in rows) * 100:.1f} points, bound {bound * 100:g}"
    )
    if late := [row.rate for row in rows if row.late is not None and row.late >= LATE_BOUND]:
        print(
            f"not valid at {late} req/s: {LATE_BOUND:.0%} of the steps and more were late; it wants a quieter machine"
        )
        return 1
    return int(any(abs(row.difference) > bound for row in rows))


@dataclasses.dataclass(frozen=True)
class Posed:
    """What is asked of a deployment of one prefill and one decode instance."""

    lengths: Lengths
    one_s: float  # a prompt's mean time
    promise: simulate.Promise


def posed(
    times: latency.StepTimes,
    link: float,
    prompts: tuple[int, int],
    answers: tuple[int, int],
    context: int,
    steps: float,
    seed: int,
) -> Posed:
    """Lengths drawn evenly from `prompts` and `answers` (tokens, the last one included) and a promise by step times, both printed:
    four prompts' time, and `steps` decode steps of 8 requests with `context` tokens each. `link`: bytes/s."""
    rng = np.random.default_rng(seed)
    pair = (rng.integers(least, most + 1, 1000).astype(np.int32) for least, most in (prompts, answers))
    lengths = Lengths("{} to {} in, {} to {} out".format(*prompts, *answers), *pair)
    one_s = float(np.mean([times.prefill_stage_s([int(n)]) for n in lengths.input]))
    promise = simulate.Promise(4 * one_s, steps * times.decode_stage_s(8, 8 * context), 0.9)
    print(
        f"1 prefill + 1 decode, {lengths.name}: a prompt takes {one_s * 1e3:.0f} ms on average, a decode step of 8 at {context} "
        f"tokens {promise.tpot_s / steps * 1e3:.0f} ms; link {link / 1e9:.2f} GB/s\n"
        f"promise: TTFT {promise.ttft_s * 1e3:.0f} ms (4 prompts' time), TPOT {promise.tpot_s * 1e3:.0f} ms ({steps:g} such steps)"
    )
    return Posed(lengths, one_s, promise)


def opening(profile: Callable[[], Sequence[measurements.Row]]) -> list[measurements.Row]:
    """What rates and promise go by: a few profiles, for one alone may fall into a slow minute of the machine."""
    return [row for _ in range(_OPENING) for row in profile()]


def drawn(rate: float, count: int, lengths: Lengths, spare_s: float, seed: int) -> list[load.Wanted]:
    """So many Poisson requests at `rate` req/s; they are drawn over twice the time that they take and `spare_s`, so that none is missing."""
    found = Workload(rate, 1.0, lengths).requests(2 * count / rate + spare_s, seed)
    rows = zip(found.arrival_ns, found.input, found.output, strict=True)
    return [(int(at) / 1e9, int(i), int(o)) for at, i, o in rows][:count]


def profiled(model: str, prompts: tuple[int, int], prefill: str, decode: str) -> list[measurements.Row]:
    """What the server at `prefill` needs for its steps while the one at `decode` does its own, and the other way round, for so they
    share this machine; addresses that end in /v1. Both go on until each has been through once.

    `prompts`: shortest and longest that will be served. Lengths are drawn anew each time, as in traffic: one that comes again is faster.
    """
    least, most = prompts
    steps = (Cell("prefill", b, random.randint(least, most // b)) for b in itertools.cycle(BATCHES))
    first, second = threading.Event(), threading.Event()
    with ThreadPoolExecutor(2) as threads:
        parts = (
            threads.submit(_profiled, model, prefill, steps, PREFILLS, first, second),
            threads.submit(_profiled, model, decode, itertools.cycle(DECODE), len(DECODE), second, first),
        )
        return [row for part in parts for row in part.result()]


def _profiled(
    model: str,
    url: str,
    cells: Iterable[Cell],
    least: int,
    mine: threading.Event,
    other: threading.Event,
) -> list[measurements.Row]:
    found: list[measurements.Row] = []
    try:
        with OverHTTP(url, model, 0) as door:
            for cell in cells:
                try:
                    found += measurements.read(rows_of({cell: door.time(cell)}, 1, 1), url)
                except LeftOut:
                    if cell.phase == "decode" or cell.batch == 1:
                        raise
                    # They were not in one step: there will be others.
                if len(found) >= least:
                    mine.set()
                    if other.is_set():
                        break
    finally:
        mine.set()  # the other one must not wait for who failed
    return found


def fitted(
    rows: Sequence[measurements.Row], engine: str, model: catalogue.Model, folder: Path
) -> latency.StepTimes:
    """Step times of this engine here, by its own measurements, of which those of the same step count as their mean; says how far
    the fit is off, and keeps the profile.

    As long in the mean as what was measured: a fit by relative errors goes with the faster one of a core's two speeds.
    """
    same: dict[object, list[measurements.Row]] = {}
    for row in rows:
        same.setdefault((row.phase, row.batch, row.tokens, row.context_tokens), []).append(row)
    means = [
        dataclasses.replace(of_one[0], seconds=statistics.mean(row.seconds for row in of_one))
        for of_one in same.values()
    ]
    document = fitting.fit(means, "fitted to this machine", None, None, engine)
    profile = latency.Profile.of(document.model_dump(mode="json", exclude_none=True), model.id)
    profile.dump(folder / "profile.json")
    (fit,) = document.fits
    said = (
        f"{phase}: {evidence.rows} rows, off by {evidence.residuals.median:.1%} (median), {evidence.residuals.max:.1%} (most)"
        for phase, evidence in (("prefill", fit.prefill.evidence), ("decode", fit.decode.evidence))
    )
    print("; ".join(said), file=sys.stderr)
    times = latency.step_times(model, GPU, 1, 1, profile)

    def longer(phase: measurements.Phase) -> float:
        mine = [row for row in rows if row.phase == phase]
        return sum(row.seconds for row in mine) / sum(_said(times, row) for row in mine)

    return _slowed(times, longer("prefill"), longer("decode"))


def _slowed(times: latency.StepTimes, prefill: float, decode: float) -> latency.StepTimes:
    """So many times as long."""
    return dataclasses.replace(
        times,
        prefill_knots_ns=times.prefill_knots_ns * prefill,
        prefill_quad_ns=times.prefill_quad_ns * prefill,
        decode_base_ns=times.decode_base_ns * decode,
        decode_ctx_ns=times.decode_ctx_ns * decode,
    )


def as_fast(times: latency.StepTimes, near: Sequence[measurements.Row]) -> list[latency.StepTimes]:
    """These step times at every speed that the machine had in the rows `near`: `SPEEDS`' so many of prefill by so many of decode, for
    the two are on different cores, each of which stands for as much time as the others.

    A core takes up to 1.8 times as long for some seconds, longer than a request, and the mean of both speeds says too little of queues.
    By time and not by rows: of those, measured one after another, there are more in a fast second, while requests come at any time.
    """

    def slower(phase: measurements.Phase) -> list[float]:
        rows = sorted((row.seconds / _said(times, row), row.seconds) for row in near if row.phase == phase)
        factors, seconds = map(np.asarray, zip(*rows, strict=True))
        until = np.cumsum(seconds) / seconds.sum()
        shares = (np.arange(SPEEDS[phase]) + 0.5) / SPEEDS[phase]
        return list(factors[np.searchsorted(until, shares)])

    return [
        _slowed(times, prefill, decode)
        for prefill, decode in itertools.product(slower("prefill"), slower("decode"))
    ]


def _said(times: latency.StepTimes, row: measurements.Row) -> float:
    """Seconds of that step, of prompts of one length."""
    if row.phase == "prefill":
        return times.prefill_stage_s([row.tokens // row.batch] * row.batch)
    return times.decode_stage_s(row.batch, row.context_tokens + row.batch)


@dataclasses.dataclass(frozen=True)
class Load:
    """What became of it, and what was measured just before and just after it."""

    results: Sequence[load.Result]
    measured: Sequence[measurements.Row]


@dataclasses.dataclass(frozen=True)
class Sent:
    """Loads at `share` of what prefill can bear."""

    share: float
    rate: float  # req/s
    loads: list[Load] = dataclasses.field(default_factory=list)

    def joined(self) -> list[load.Result]:
        """One load after another, each into an idle deployment."""
        found: list[load.Result] = []
        begins_s = 0.0
        for one in self.loads:
            found += [dataclasses.replace(r, arrival_s=begins_s + r.arrival_s) for r in one.results]
            ends_s = max(r.arrival_s + r.ttft_s + r.tpot_s * r.output_tokens for r in one.results)
            begins_s += ends_s + _IDLE_S
        return found


async def taken(
    shares: Sequence[float],
    count: int,
    asked: Posed,
    load_of: Callable[[Sequence[load.Wanted], int], Awaitable[Sequence[load.Result]]],
    profile: Callable[[], Sequence[measurements.Row]],
) -> list[Sent]:
    """`count` requests at each of these shares of what prefill can bear, in `PARTS` loads, in turns with the other rates and with
    profiles, so that the machine's faster and slower minutes come to all alike. `load_of` is told a number, of which no two loads
    have the same."""
    sent = [Sent(share, share / asked.one_s) for share in shares]
    before = await asyncio.to_thread(profile)
    for number, (part, one) in enumerate(itertools.product(range(PARTS), sent)):
        some = count * (part + 1) // PARTS - count * part // PARTS
        results = await load_of(drawn(one.rate, some, asked.lengths, 10 * asked.one_s, number), number)
        after = await asyncio.to_thread(profile)
        one.loads.append(Load(results, [*before, *after]))
        before = after
        print(f"load {number + 1} of {PARTS * len(sent)}: {one.share:.0%} of prefill", file=sys.stderr)
    return sent


def judged(
    sent: Sequence[Sent],
    fit: Callable[[Sequence[measurements.Row]], latency.StepTimes],
    deployment: Callable[[latency.StepTimes], simulate.Deployment],
    promise: simulate.Promise,
    folder: Path,
) -> list[Row]:
    """The row of each rate: each load on deployments whose steps are those of all profiles together, as fast as the machine was in
    the two beside this load."""
    times = fit([row for one in sent for each in one.loads for row in each.measured])
    return [
        compared(
            one,
            [[deployment(steps) for steps in as_fast(times, each.measured)] for each in one.loads],
            promise,
            folder,
        )
        for one in sent
    ]


def compared(
    sent: Sent, deployments: Sequence[Sequence[simulate.Deployment]], promise: simulate.Promise, folder: Path
) -> Row:
    """What was served at a rate, and what is simulated of what was sent: each load on the deployment at each of its speeds."""
    trace, results = folder / f"sent-{sent.share:g}.csv", sent.joined()
    load.write_csv(results, trace)
    requests = read_trace(trace)
    of_load = np.split(np.arange(len(results)), np.cumsum([len(one.results) for one in sent.loads])[:-1])
    runs = [(rows, one) for rows, all_speeds in zip(of_load, deployments, strict=True) for one in all_speeds]
    outcomes = [simulate.run(one, requests.take(rows)) for rows, one in runs]
    found = simulate.judge(
        requests.take(np.concatenate([rows for rows, _ in runs])),
        simulate.one_after_another(outcomes),
        promise,
    )
    said = {
        "attainment": found.attainment,
        "ttft": dict(zip(("p50", "p90", "p99"), found.ttft, strict=True)),
        "tpot": dict(zip(("p50", "p90", "p99"), found.tpot, strict=True)),
    }
    served = load.summary(results, promise.ttft_s, promise.tpot_s)
    return Row(sent.rate, len(results), served, said, None)

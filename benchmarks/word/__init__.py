"""What the programs `word_*.py` share: what to send, what the simulator says of what was sent, and the table of both."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from disaggserve import catalogue, latency, simulate
from disaggserve.latency import fitting, measurements
from disaggserve.workload import Lengths, Workload, read_trace
from e2e import load

ROOT = Path(__file__).resolve().parents[2]
# What `disaggworker profile` measures over HTTP, short: it is measured often. Lengths as traffic has them: multiplications and
# attention are faster at powers of two than at what lies beside them.
PREFILL = ["--batches", "1", "--prompts", "67,131,237,359,509", "--contexts", "64", "--repeat", "4"]
DECODE = ["--batches", "1,2,4,8", "--prompts", "67", "--contexts", "101,331", "--repeat", "1"]
_OPENING = 3  # profiles before the first load
PARTS = 5  # loads of each rate
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


def profiled(prefill: Sequence[str], decode: Sequence[str], folder: Path) -> list[measurements.Row]:
    """Prefill's rows of `disaggworker profile` with the arguments `prefill` while another decodes, and decode's with the
    arguments `decode` while another prefills: so two workers will share this machine."""
    found = []
    for phase, mine, beside in (("prefill", prefill, decode), ("decode", decode, prefill)):
        rows = _beside(mine, beside, folder / f"measurements-{phase}.csv")
        found += [row for row in rows if row.phase == phase]
    return found


def _beside(mine: Sequence[str], other: Sequence[str], csv: Path) -> tuple[measurements.Row, ...]:
    program = [sys.executable, "-m", "disaggworker", "profile"]
    path = os.pathsep.join(str(ROOT / part) for part in ("operator", "worker_image"))
    env = os.environ | {"PYTHONPATH": path}
    endless = [*program, *other, "--repeat", "100000", "-o", os.devnull]
    beside = subprocess.Popen(endless, env=env, stdout=subprocess.DEVNULL)
    try:
        subprocess.run([*program, *mine, "-o", str(csv)], check=True, env=env, stdout=sys.stderr)
    finally:
        beside.terminate()
        beside.wait()
    return measurements.read(csv.read_text(), csv.name)


def fitted(
    rows: Sequence[measurements.Row], engine: str, model: catalogue.Model, folder: Path
) -> latency.StepTimes:
    """Step times of this engine here, by its own measurements, of which those of the same step count as their mean; says how far
    the fit is off, and keeps the profile."""
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
    return latency.step_times(model, GPU, 1, 1, profile)


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
    """The row of each rate."""
    return [
        compared(one, [deployment(fit(each.measured)) for each in one.loads], promise, folder) for one in sent
    ]


def compared(
    sent: Sent, deployments: Sequence[simulate.Deployment], promise: simulate.Promise, folder: Path
) -> Row:
    """What was served at a rate, and what is simulated of what was sent: each load on the deployment as it was measured then."""
    trace, results = folder / f"sent-{sent.share:g}.csv", sent.joined()
    load.write_csv(results, trace)
    requests = read_trace(trace)
    ends = np.cumsum([len(one.results) for one in sent.loads])
    outcomes = [
        simulate.run(deployment, requests.take(slice(int(end) - len(one.results), int(end))))
        for one, deployment, end in zip(sent.loads, deployments, ends, strict=True)
    ]
    found = simulate.judge(requests, simulate.one_after_another(outcomes), promise)
    said = {
        "attainment": found.attainment,
        "ttft": dict(zip(("p50", "p90", "p99"), found.ttft, strict=True)),
        "tpot": dict(zip(("p50", "p90", "p99"), found.tpot, strict=True)),
    }
    served = load.summary(results, promise.ttft_s, promise.tpot_s)
    return Row(sent.rate, len(results), served, said, None)

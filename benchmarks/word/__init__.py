"""What the programs `word_*.py` share: what to send, what the simulator says of what was sent, and the table of both."""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from disaggserve import catalogue, latency, simulate
from disaggserve.latency import fitting, measurements
from disaggserve.workload import Lengths, Workload, read_trace
from e2e import load

ROOT = Path(__file__).resolve().parents[2]
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


def drawn(rate: float, count: int, lengths: Lengths, spare_s: float, seed: int) -> list[load.Wanted]:
    """So many Poisson requests at `rate` req/s; they are drawn over `spare_s` more than that takes, so that none is missing."""
    found = Workload(rate, 1.0, lengths).requests(1.2 * count / rate + spare_s, seed)
    rows = zip(found.arrival_ns, found.input, found.output, strict=True)
    return [(int(at) / 1e9, int(i), int(o)) for at, i, o in rows][:count]


def profiled(
    prefill: Sequence[str], decode: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> list[measurements.Row]:
    """Prefill's rows of `disaggworker profile` with the arguments `prefill` while another decodes, and decode's with the
    arguments `decode` while another prefills: so two workers will share this machine."""
    found = []
    for phase, mine, beside in (("prefill", prefill, decode), ("decode", decode, prefill)):
        rows = _beside(mine, beside, folder / f"measurements-{phase}.csv", environment)
        found += [row for row in rows if row.phase == phase]
    return found


def _beside(
    mine: Sequence[str], other: Sequence[str], csv: Path, environment: Mapping[str, str]
) -> tuple[measurements.Row, ...]:
    program = [sys.executable, "-m", "disaggworker", "profile"]
    path = os.pathsep.join(str(ROOT / part) for part in ("operator", "worker_image"))
    env = os.environ | environment | {"PYTHONPATH": path}
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
    for phase, evidence in (("prefill", fit.prefill.evidence), ("decode", fit.decode.evidence)):
        off = evidence.residuals
        print(
            f"{phase}: {evidence.rows} rows, form {evidence.form}, off by {off.median:.1%} (median), "
            f"{off.p90:.1%} (p90), {off.max:.1%} (most)"
        )
    return latency.step_times(model, GPU, 1, 1, profile)


@dataclasses.dataclass(frozen=True)
class Sent:
    """A load at `share` of what prefill can bear, and what became of it."""

    share: float
    rate: float  # req/s
    results: Sequence[load.Result]


def judged(
    sent: Sequence[Sent],
    measured: Sequence[Sequence[measurements.Row]],
    fit: Callable[[Sequence[measurements.Row]], latency.StepTimes],
    deployment: Callable[[latency.StepTimes], simulate.Deployment],
    promise: simulate.Promise,
    folder: Path,
) -> list[Row]:
    """The row of each load, by what was measured just before it and just after: the machine is faster in one minute than in another."""
    return [
        compared(one, deployment(fit([*before, *after])), promise, folder)
        for one, (before, after) in zip(sent, itertools.pairwise(measured), strict=True)
    ]


def compared(sent: Sent, deployment: simulate.Deployment, promise: simulate.Promise, folder: Path) -> Row:
    """What was served of a load, and what is simulated of what was sent."""
    trace = folder / f"sent-{sent.share:g}.csv"
    load.write_csv(sent.results, trace)
    requests = read_trace(trace)
    found = simulate.judge(requests, simulate.run(deployment, requests), promise)
    said = {
        "attainment": found.attainment,
        "ttft": dict(zip(("p50", "p90", "p99"), found.ttft, strict=True)),
        "tpot": dict(zip(("p50", "p90", "p99"), found.tpot, strict=True)),
    }
    served = load.summary(sent.results, promise.ttft_s, promise.tpot_s)
    row = Row(sent.rate, len(sent.results), served, said, None)
    print(f"{sent.share:.0%} of prefill: {row.difference * 100:+.1f} points", file=sys.stderr)
    return row

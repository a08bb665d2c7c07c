"""What is sent: a trace from a file, or requests drawn from lengths at a rate; and what became of it."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer

from disaggserve import engines, simulate, workload
from disaggserve.api.errors import InvalidInput
from disaggserve.api.plan import digest
from disaggserve.cli.subject import Subject, limit
from disaggserve.simulate import Outcome, Prediction
from disaggserve.workload import Lengths, Requests, Workload

WARMUP_S = 60.0
COOLDOWN_S = 15.0  # of requests after the judged ones, which would else decode on an emptying instance
MOST = 10_000_000  # requests of one draw
ENOUGH = 300  # requests of one run at least, for a goodput
ALONE = 1000  # requests sent one by one, to see what is kept without load
LONGEST_S = 1e6  # of one run; the simulator holds 13 days


@dataclasses.dataclass(frozen=True)
class Given:
    """What the options say: a trace, or lengths with a rate."""

    trace: Path | None = None
    cache_blocks: int | None = None
    lengths: str | None = None
    rate: float | None = None
    duration: str = "600s"
    cv: float = 1.0
    seeds: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True, eq=False)
class Traffic:
    """Requests that fit one context length. `runs` go to the simulator one by one; judged is [begin_s, end_s) of each."""

    runs: tuple[Requests, ...]
    begin_s: float
    end_s: float
    rate: float | None  # req/s; None: a trace of one moment has none
    drawn: Workload | None  # what the runs were drawn from; None: the one run is a trace
    left_out: int
    inputs: dict[str, Any]  # for digests


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """The judged requests of all runs on one clock, and what became of them."""

    requests: Requests
    outcome: Outcome
    prediction: Prediction
    digest: str


def load(given: Given, context_length: int) -> Traffic:
    """Raises `WorkloadError`, or a usage error where options are missing or do not go together."""
    if (given.trace is None) == (given.lengths is None):
        raise typer.BadParameter("give a trace, or lengths with a rate", param_hint="--trace / --lengths")
    if given.trace is not None:
        if given.rate is not None:
            raise typer.BadParameter("a trace has its own; leave it out", param_hint="--rate")
        return of(*trace(given.trace, given.cache_blocks, context_length))
    if given.rate is None:
        raise typer.BadParameter("is missing: lengths say nothing of when requests come", param_hint="--rate")
    assert given.lengths is not None
    table, left_out = _lengths(given.lengths, context_length)
    traffic = Workload(given.rate, given.cv, table, "options")
    duration_s = limit("duration", given.duration)
    end_s = WARMUP_S + duration_s
    if given.rate * end_s > MOST:
        raise InvalidInput(
            f"{given.rate:g} req/s for {duration_s:g} s are more than {MOST:,} requests; lower --rate or --duration"
        )
    seeds = tuple(dict.fromkeys(given.seeds))
    runs = tuple(traffic.requests(end_s + COOLDOWN_S, seed) for seed in seeds)
    lengths = [traffic.lengths.input.tolist(), traffic.lengths.output.tolist()]
    inputs = {
        "lengths": digest(lengths),
        "leftOut": left_out,
        "rate": given.rate,
        "cv": given.cv,
        "duration": duration_s,
        "seeds": seeds,
    }
    return Traffic(runs, WARMUP_S, end_s, given.rate, traffic, left_out, inputs)


def _lengths(name: str, context_length: int) -> tuple[Lengths, int]:
    """A preset, cut to the context as a plan's first guess is; or a file's rows that fit it, and how many do not."""
    if name in workload.PRESETS:
        return workload.preset(name).scaled(1.0, context_length), 0
    whole = workload.read_lengths(name)
    table, left_out = whole.within(context_length)
    over_context(name, left_out, len(whole), context_length)
    return table, left_out


def trace(path: Path, cache_blocks: int | None, context_length: int) -> tuple[Requests, int]:
    """The requests of a file that fit the context, and how many were left out, which is said on stderr."""
    read = workload.read_trace(path, context_length=context_length, cache_blocks=cache_blocks)
    requests, left_out = read.within(context_length)
    over_context(path, left_out, len(read), context_length)
    return requests, left_out


def over_context(where: Path | str, out: int, of: int, context_length: int) -> str:
    """What to add to a source of which so many requests are left out, also said on stderr; empty where none is.

    Raises InvalidInput where there are no others.
    """
    if not out:
        return ""
    longer = f"longer than the model's context of {context_length} tokens"
    if out == of:
        raise InvalidInput(f"{where}: all {of} requests are {longer}")
    share = out / of
    digits = f"{share:.1%}" if share >= 0.001 else f"{max(share, 0.0001):.2%}"
    said = f"{out} of {of} requests ({digits}) {'is' if out == 1 else 'are'} {longer} and left out"
    print(f"{where}: {said}", file=sys.stderr)
    return f"; {said}"


def of(requests: Requests, left_out: int) -> Traffic:
    """A trace as traffic: all of it judged, from its first request on."""
    columns = (requests.arrival_ns, requests.input, requests.output, requests.cached)
    hashed = [None if c is None else hashlib.sha256(c.astype("<i8").tobytes()).hexdigest() for c in columns]
    begin_s, end_s = float(requests.arrival_ns[0]) / 1e9, float(requests.arrival_ns[-1]) / 1e9
    rate = workload.trace_rate(requests) if end_s > begin_s else None
    inputs = {"trace": hashed, "leftOut": left_out}
    return Traffic((requests,), begin_s, end_s + 1e-6, rate, None, left_out, inputs)


def send(subject: Subject, traffic: Traffic) -> Judged:
    """The traffic on one subject, all runs judged together. The digest holds the inputs and who kept the promise."""
    runs = [
        (r, simulate.run_copies(subject.deployment, r, subject.copies)) for r in _cached_by(subject, traffic)
    ]
    requests, outcome = simulate.joined(runs, traffic.begin_s, traffic.end_s)
    kept = simulate.kept(requests, outcome, subject.promise)
    p = subject.promise
    return Judged(
        requests,
        outcome,
        simulate.judge(requests, outcome, p),
        digest(
            {
                "deployment": subject.inputs,
                "promise": [p.ttft_s, p.tpot_s, p.attainment],
                "traffic": traffic.inputs,
                "kept": hashlib.sha256(kept.tobytes()).hexdigest(),
            }
        ),
    )


def _cached_by(subject: Subject, traffic: Traffic) -> list[Requests]:
    """The runs, without what a prefix cache holds where the engine has none, which is said on stderr."""
    share = traffic.runs[0].cached_share()
    if not share or engines.engine(subject.engine).prefix_cache:
        return list(traffic.runs)
    print(
        f"engine {subject.engine} has no prefix cache: prompts are computed whole, though {share:.1%} of their tokens "
        "could be found in one",
        file=sys.stderr,
    )
    return [dataclasses.replace(r, cached=None) for r in traffic.runs]


class Goodput(NamedTuple):
    """The highest rate that keeps the promise, req/s; 0: none does. `unloaded`: attainment of requests that come alone."""

    rate: float
    unloaded: float


def goodput(subject: Subject, traffic: Traffic, seeds: Sequence[int]) -> Goodput:
    """For the same traffic come faster or slower. Raises `BadTrace` for a trace without a rate."""
    runs = _cached_by(subject, traffic)
    drawn = traffic.drawn or workload.from_trace(runs[0], "trace")
    duration_s = traffic.end_s - traffic.begin_s
    unloaded = _unloaded(subject, runs[0])
    if (
        unloaded < subject.promise.attainment
    ):  # at rates so low that few come, chance would keep it all the same
        return Goodput(0.0, unloaded)

    def attain(rate: float) -> float:
        # At a low rate it takes longer to see enough of them; where that is more than a run can hold, none is.
        if ENOUGH / rate > LONGEST_S:
            return 0.0
        end_s = WARMUP_S + max(duration_s, ENOUGH / rate)
        at = dataclasses.replace(drawn, rate=rate)
        runs = [
            (r, simulate.run_copies(subject.deployment, r, subject.copies))
            for r in (at.requests(end_s + COOLDOWN_S, s) for s in seeds)
        ]
        return simulate.judge(*simulate.joined(runs, WARMUP_S, end_s), subject.promise).attainment

    return Goodput(simulate.goodput(attain, subject.promise.attainment, start=drawn.rate), unloaded)


def _unloaded(subject: Subject, requests: Requests) -> float:
    """Attainment of the first requests of a run, each sent alone."""
    some = requests.take(slice(0, ALONE))
    apart_ns = np.arange(len(some), dtype=np.int64) * round(LONGEST_S / ALONE * 1e9)
    alone = dataclasses.replace(some, arrival_ns=apart_ns)
    return simulate.judge(alone, simulate.run(subject.deployment, alone), subject.promise).attainment

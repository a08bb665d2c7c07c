"""`disaggserve replay`: a trace on a plan or a shape, judged window by window: where in the day the promise breaks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from disaggserve import simulate
from disaggserve.api.errors import InvalidInput
from disaggserve.cli import show, traffic
from disaggserve.cli.subject import Subject
from disaggserve.cli.traffic import Judged, Traffic
from disaggserve.simulate import Prediction

MOST_WINDOWS = 10_000


class Window(NamedTuple):
    """[begin_s, end_s) of the replay and what arrived in it; NaN where nothing did."""

    begin_s: float
    end_s: float
    rate: float  # req/s
    input_mean: float
    output_mean: float
    prediction: Prediction


def run(
    subject: Subject, trace: Path, cache_blocks: int | None, speed: float, window_s: float, output: str
) -> None:
    requests, left_out = traffic.trace(trace, cache_blocks, subject.context_length)
    sent = traffic.of(requests.faster(speed), left_out)
    with show.busy("replaying"):
        judged = traffic.send(subject, sent)
    found = windows(subject, judged, window_s)
    if output == "table":
        _table(subject, judged, found)
    else:
        show.dump(_values(subject, sent, judged, found), output)


def windows(subject: Subject, judged: Judged, window_s: float) -> list[Window]:
    """The replay cut into windows from its first request on; the last one ends with the trace."""
    first_s = float(judged.requests.arrival_ns[0]) / 1e9
    span_s = float(judged.requests.arrival_ns[-1]) / 1e9 - first_s
    count = int(span_s // window_s) + 1
    if count > MOST_WINDOWS:
        raise InvalidInput(
            f"{count:,} windows of {window_s:g} s; give a longer --window for {span_s:.0f} s of requests"
        )
    out: list[Window] = []
    for k in range(count):
        begin_s, end_s = k * window_s, min((k + 1) * window_s, span_s)
        here, outcome = simulate.joined(
            [(judged.requests, judged.outcome)], first_s + begin_s, first_s + begin_s + window_s
        )
        n = len(here)
        out.append(
            Window(
                begin_s,
                end_s,
                n / (end_s - begin_s) if end_s > begin_s else math.nan,
                float(here.input.mean()) if n else math.nan,
                float(here.output.mean()) if n else math.nan,
                simulate.judge(here, outcome, subject.promise),
            )
        )
    return out


def _values(subject: Subject, sent: Traffic, judged: Judged, found: list[Window]) -> dict[str, Any]:
    return {
        **show.attained(judged.prediction),
        "rate": show.figure(sent.rate),
        "gpus": subject.gpus,
        "leftOut": sent.left_out,
        "windows": [
            {
                "begin": show.figure(w.begin_s),
                "end": show.figure(w.end_s),
                "rate": show.figure(w.rate),
                "inputMean": show.figure(w.input_mean, 1),
                "outputMean": show.figure(w.output_mean, 1),
                **show.attained(w.prediction),
            }
            for w in found
        ],
        "latencySource": subject.latency_source,
        "digest": judged.digest,
    }


def _table(subject: Subject, judged: Judged, found: list[Window]) -> None:
    target = subject.promise.attainment
    table = show.table("from", "requests", "rate", "tokens in, out", "attainment", "TTFT p90", "TPOT p90")
    for w in found:
        p = w.prediction
        missed = p.attainment < target
        table.add_row(
            clock(w.begin_s),
            str(p.requests),
            show.rate(w.rate),
            f"{w.input_mean:.0f}, {w.output_mean:.0f}" if p.requests else "–",
            f"[red]{show.share(p)}[/]" if missed else show.share(p),
            show.duration(p.ttft[1]),
            show.duration(p.tpot[1]),
        )
    show.out(table)
    broken = sum(w.prediction.attainment < target for w in found)
    show.out(
        f"attainment {show.share(judged.prediction)}, target {target:.0%}, of {judged.prediction.requests} requests on "
        f"{show.gpus(subject.gpus)}, simulated; below the target in {broken} of {len(found)} windows"
    )
    show.out(f"step times: {subject.latency_source}")


def clock(seconds: float) -> str:
    """`1:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"

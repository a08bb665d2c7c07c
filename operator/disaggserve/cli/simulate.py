"""`disaggserve simulate`: requests on a plan or a shape."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from disaggserve import simulate
from disaggserve.api.errors import InvalidInput
from disaggserve.cli import show, traffic
from disaggserve.cli.subject import Subject
from disaggserve.cli.traffic import Judged, Traffic

_PARTS = ("queue", "prefill", "transfer", "decodeWait", "decode")


def run(subject: Subject, given: traffic.Given, output: str, rows: Path | None) -> None:
    sent = traffic.load(given, subject.context_length)
    with show.busy("simulating"):
        judged = traffic.send(subject, sent)
    if rows is not None:
        _write(rows, judged)
    if output == "table":
        _table(subject, sent, judged)
    else:
        show.dump(_values(subject, sent, judged), output)


def _parts(subject: Subject, judged: Judged) -> dict[str, float]:
    """Mean seconds of the completed requests by where they went; empty where none was completed."""
    found = simulate.parts(subject.deployment, judged.requests, judged.outcome)
    if not len(found.queue):
        return {}
    return {name: float(np.mean(part)) for name, part in zip(_PARTS, found, strict=True)}


def _values(subject: Subject, sent: Traffic, judged: Judged) -> dict[str, Any]:
    return {
        **show.attained(judged.prediction),
        "rate": show.figure(sent.rate),
        "gpus": subject.gpus,
        "leftOut": sent.left_out,
        "cachedShare": show.figure(judged.requests.cached_share()),
        "breakdown": {name: show.figure(value) for name, value in _parts(subject, judged).items()},
        "engine": subject.engine,
        "latencySource": subject.latency_source,
        "digest": judged.digest,
    }


def _table(subject: Subject, sent: Traffic, judged: Judged) -> None:
    p, promise = judged.prediction, subject.promise
    table = show.table("", "p50", "p90", "p99", "promise")
    table.add_row("TTFT", *map(show.duration, p.ttft), show.duration(promise.ttft_s))
    table.add_row("TPOT", *map(show.duration, p.tpot), show.duration(promise.tpot_s))
    show.out(
        f"attainment {show.share(p)}, target {promise.attainment:.0%}, of {p.requests} requests at "
        f"{show.rate(sent.rate)} on {show.gpus(subject.gpus)}, simulated"
    )
    show.out(table)
    words = {"decodeWait": "wait for decode"}
    if parts := _parts(subject, judged):
        show.out("mean: " + ", ".join(f"{words.get(n, n)} {show.duration(v)}" for n, v in parts.items()))
    if share := judged.requests.cached_share():
        show.out(f"prompt tokens found in the prefix cache: {share:.1%}")
    show.out(f"engine: {subject.engine}; step times: {subject.latency_source}")


def _write(path: Path, judged: Judged) -> None:
    """One row per request; times in seconds, empty where the request never got there."""
    requests, outcome = judged.requests, judged.outcome
    ttft = (outcome.first_ns - requests.arrival_ns) / 1e9
    tpot = (outcome.last_ns - outcome.first_ns) / 1e9 / np.maximum(requests.output - 1, 1)
    try:
        file = path.open("w", newline="")
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror}") from None
    with file:
        out = csv.writer(file)
        out.writerow(["arrival_s", "input_tokens", "output_tokens", "ttft_s", "tpot_s"])
        for k in range(len(requests)):
            done = outcome.last_ns[k] >= 0
            out.writerow(
                [
                    f"{requests.arrival_ns[k] / 1e9:.6f}",
                    int(requests.input[k]),
                    int(requests.output[k]),
                    f"{ttft[k]:.6f}" if done else "",
                    f"{tpot[k]:.6f}" if done else "",
                ]
            )

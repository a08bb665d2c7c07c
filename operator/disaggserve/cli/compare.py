"""`disaggserve compare`: the same requests on several plans and shapes, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape

from disaggserve.api.errors import InvalidInput
from disaggserve.cli import show, traffic
from disaggserve.cli.subject import Subject
from disaggserve.cli.traffic import Goodput, Judged, Traffic


def run(subjects: Sequence[Subject], given: traffic.Given, goodput: bool, output: str) -> None:
    if len(subjects) < 2:
        found = "only one plan or shape" if subjects else "no plan or shape"
        raise InvalidInput(f"there is {found} to compare; give at least two")
    sent = traffic.load(given, min(s.context_length for s in subjects))
    rows: list[tuple[Subject, Judged, Goodput | None]] = []
    for n, subject in enumerate(subjects, 1):
        with show.busy(f"simulating {n} of {len(subjects)}"):
            judged = traffic.send(subject, sent)
            rows.append((subject, judged, traffic.goodput(subject, sent, given.seeds) if goodput else None))
    if output == "table":
        _table(sent, rows)
    else:
        show.dump(_values(sent, rows), output)


def _values(sent: Traffic, rows: Sequence[tuple[Subject, Judged, Goodput | None]]) -> dict[str, Any]:
    return {
        "rate": show.figure(sent.rate),
        "leftOut": sent.left_out,
        "compared": [
            {
                "name": subject.name,
                "gpus": subject.gpus,
                **show.attained(judged.prediction),
                **({} if goodput is None else {"goodput": show.figure(goodput.rate, 4)}),
                "latencySource": subject.latency_source,
                "digest": judged.digest,
            }
            for subject, judged, goodput in rows
        ],
    }


def _goodput(found: Goodput, target: float) -> str:
    return (
        f"none: {found.unloaded:.1%} even without load" if found.unloaded < target else show.rate(found.rate)
    )


def _table(sent: Traffic, rows: Sequence[tuple[Subject, Judged, Goodput | None]]) -> None:
    with_goodput = rows[0][2] is not None
    table = show.table(
        "",
        "GPUs",
        "attainment",
        "TTFT p50, p90, p99",
        "TPOT p50, p90, p99",
        *(["goodput"] if with_goodput else []),
    )
    for subject, judged, goodput in rows:
        p = judged.prediction
        table.add_row(
            escape(subject.name),
            str(subject.gpus),
            show.share(p),
            ", ".join(map(show.duration, p.ttft)),
            ", ".join(map(show.duration, p.tpot)),
            *([] if goodput is None else [_goodput(goodput, subject.promise.attainment)]),
        )
    show.out(f"{rows[0][1].prediction.requests} requests at {show.rate(sent.rate)}, simulated")
    show.out(table)
    sources = dict.fromkeys(subject.latency_source for subject, _, _ in rows)
    show.out(f"step times: {'; '.join(sources)}")

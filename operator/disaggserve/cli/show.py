"""How plans and predictions are shown: tables for people, JSON and YAML for programs. Every number has its unit."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from disaggserve import simulate
from disaggserve.api.plan import Plan, Prediction, RolePlan, kind
from disaggserve.api.spec import Spec
from disaggserve.plan import Draft

# A pipe has no width: tables stay on their lines.
_out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing when piped."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(what):
        yield


def dump(value: dict[str, Any], output: str) -> None:
    print(
        json.dumps(value, indent=2) if output == "json" else yaml.safe_dump(value, sort_keys=False),
        end="\n" if output == "json" else "",
    )


def duration(value_s: float) -> str:
    """`62 ms`, `1.43 s`."""
    if math.isnan(value_s):
        return "–"
    return f"{value_s * 1000:.0f} ms" if value_s < 1 else f"{value_s:.2f} s"


def _nodes(role: RolePlan) -> str:
    return ", ".join(f"{n.name} ({n.count})" if n.count > 1 else n.name for n in role.nodes)


def roles_table(plan: Plan) -> Table:
    table = Table("role", "instances", "shape", "GPUs", "nodes", box=None, pad_edge=False)
    for r in plan.roles:
        prompts = f", {r.prompts()}" if r.role == "mixed" else ""
        shape = f"tp {r.tp}, pp {r.pp}{prompts}"
        table.add_row(kind(plan.roles, r.role), str(r.count), shape, str(r.gpus), _nodes(r))
    return table


def plan(spec: Spec, draft: Draft) -> None:
    """The plan in words."""
    p = draft.plan
    _out.print(
        f"[bold]{spec.model.id}[/]: TTFT {spec.slo.ttft}, TPOT {spec.slo.tpot}, {spec.slo.attainment:.0%} of requests, {p.rate:g} req/s"
        + (f", engine {p.setting.engine}" if p.setting else "")
    )
    _out.print(f"{p.algorithm}: {p.affinity.lower()} affinity, {p.affinity_reason}")
    _out.print()
    _out.print(roles_table(p))
    _out.print()
    _out.print(
        f"{p.gpus} GPUs; goodput {p.goodput:.2f} req/s, {p.goodput_per_gpu:.2f} req/s per GPU"
        + (f" ({p.bound_share:.0%} of the physical bound, {p.bound:.1f} req/s per GPU)" if p.bound else "")
    )
    _out.print(_prediction_line(p.predicted, spec.slo.attainment))
    _out.print(
        f"step times: {p.latency_source}; traffic: {p.workload.source}, mean {p.workload.input_mean:.0f} tokens in, {p.workload.output_mean:.0f} out"
    )
    if p.bottleneck:
        _out.print(f"what binds: {p.bottleneck}")
    if p.emulated:
        _out.print(
            "[yellow]emulated[/]: the nodes are simulated; what is served there keeps a real GPU's time without one"
        )
    if draft.refusal:
        _out.print(f"[red]not startable by this release[/]: {draft.refusal}")
    if p.rejected:
        table = Table("rejected", "because", box=None, pad_edge=False, title_justify="left")
        for r in p.rejected:
            table.add_row(r.what, r.reason)
        _out.print()
        _out.print(table)
    if p.refused_nodes:
        table = Table("node not counted", "because", box=None, pad_edge=False)
        for node in p.refused_nodes:
            table.add_row(node.name, node.reason)
        _out.print()
        _out.print(table)
    if p.search:
        _out.print(
            f"\n[dim]{p.search.simulations} simulations in {p.search.seconds:.2f} s ({p.search.cpu_seconds:.2f} CPU-s)[/]"
        )


def _prediction_line(p: Prediction, target: float) -> str:
    return (
        f"predicted: attainment {p.attainment:.1%} ({p.attainment_low:.1%} to {p.attainment_high:.1%}, target {target:.0%}); "
        f"TTFT p50 {duration(p.ttft.p50)}, p90 {duration(p.ttft.p90)}, p99 {duration(p.ttft.p99)}; "
        f"TPOT p50 {duration(p.tpot.p50)}, p90 {duration(p.tpot.p90)}, p99 {duration(p.tpot.p99)}"
    )


def figure(value: float | None, digits: int = 6) -> float | None:
    """For JSON, which knows no NaN."""
    return None if value is None or math.isnan(value) else round(float(value), digits)


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    return {name: figure(v) for name, v in zip(("p50", "p90", "p99"), values, strict=True)}


def attained(p: simulate.Prediction) -> dict[str, Any]:
    """What a simulation says, for programs: shares in 0…1, seconds."""
    return {
        "attainment": figure(p.attainment),
        "attainmentLow": figure(p.low),
        "attainmentHigh": figure(p.high),
        "ttft": percentiles(p.ttft),
        "tpot": percentiles(p.tpot),
        "requests": p.requests,
    }


def share(p: simulate.Prediction) -> str:
    """`91.2% (90.1% to 92.3%)`."""
    return "–" if math.isnan(p.attainment) else f"{p.attainment:.1%} ({p.low:.1%} to {p.high:.1%})"


def rate(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3g} req/s"


def gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False)


def out(*what: Any) -> None:
    _out.print(*what)

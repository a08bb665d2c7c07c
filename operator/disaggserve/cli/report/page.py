"""One self-contained HTML page about a plan: words, tables and drawings of what `curves` found. Pure: text in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from disaggserve.api.model import seconds
from disaggserve.api.plan import Plan, RolePlan
from disaggserve.api.spec import Spec
from disaggserve.cli.report import figures
from disaggserve.cli.report.curves import PARTS_MEANING, SCALES, Report
from disaggserve.cli.show import duration
from disaggserve.hardware import Inventory
from disaggserve.latency import Provenance
from disaggserve.plan import Draft
from disaggserve.simulate import Parts

# How far each source of step times can be off, where somebody has measured it (REFERENCE § 1, § 11).
_MARGINS = {
    "fitted": "fitted to measurements; the fit's residuals are its margin",
    "profile": (
        "a shipped profile, fitted by others to this GPU and model; its prefill holds a factor of 1.10 set by hand by its "
        "authors, and real decode with pp above 1 ran 20 to 35 % slower than it says"
    ),
    "roofline": (
        "computed from the GPU's datasheet with efficiency curves, not measured for this model; rooflines of this kind are "
        "off by 7 to 20 % on published end-to-end figures of H100 and H200. Fit your own measurements before you buy on it"
    ),
}


def render(spec: Spec, draft: Draft, inventory: Inventory, report: Report) -> str:
    """The whole page. Equal inputs give equal bytes: no clock and no measured time is in it."""
    p = draft.plan
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=f"Plan for {escape(spec.model.id)} at {p.rate:.4g} req/s",
        lead=_lead(spec, p),
        badges=_badges(p, draft.refusal),
        cards=_cards(spec, p),
        facts=_facts(spec, p),
        nodes=_nodes(p, inventory),
        nodes_caption=_nodes_caption(p),
        figures=_figures(p, report, min(spec.hardware.max_gpus, sum(n.gpus_free for n in inventory.nodes))),
        rejected=_rejected(p, report),
        refused=_refused(p),
        source=_source(p, report),
        footer=f"Digest of inputs and decisions: <code>{p.digest}</code>. Equal inputs give this page again, byte for byte.",
    )


# ---- words


def _lead(spec: Spec, p: Plan) -> str:
    ttft, tpot = duration(seconds(spec.slo.ttft)), duration(seconds(spec.slo.tpot))
    roles = " and ".join(f"{r.count} {r.role} instance{'s' * (r.count > 1)} of {_shape(r)}" for r in p.roles)
    return (
        f"{p.gpus} GPUs serve {p.rate:.4g} requests per second so that {spec.slo.attainment:.0%} of them get their first "
        f"token within {ttft} and each further one within {tpot}: {roles}."
    )


def _shape(r: RolePlan) -> str:
    gpus = r.tp * r.pp
    split = f"tp {r.tp}" + (f", pp {r.pp}" if r.pp > 1 else "")
    prompts = f", {r.prompts()}" + " tokens" * bool(r.chunk) if r.role == "mixed" else ""
    return f"{gpus} GPU{'s' * (gpus > 1)} each ({split}{prompts})"


def _badges(p: Plan, refusal: str | None) -> str:
    found = [("info", "predicted by simulation, not measured")]
    if p.emulated:
        found.append(("warn", "the nodes are simulated: what is served there is emulated"))
    if refusal:
        found.append(("bad", f"not startable by this release: {refusal}"))
    return "".join(f'<span class="badge {kind}">{escape(text)}</span>' for kind, text in found)


def _cards(spec: Spec, p: Plan) -> str:
    a = p.predicted
    found = [
        (str(p.gpus), "GPUs", ", ".join(f"{r.gpus} {r.role}" for r in p.roles)),
        (
            f"{a.attainment:.1%}",
            "predicted attainment",
            f"95 % interval {a.attainment_low:.1%} to {a.attainment_high:.1%}; target {spec.slo.attainment:.0%}",
        ),
        (
            f"{duration(a.ttft.p90)}",
            "predicted TTFT, p90",
            f"p50 {duration(a.ttft.p50)}, p99 {duration(a.ttft.p99)}; promised {duration(seconds(spec.slo.ttft))}",
        ),
        (
            f"{duration(a.tpot.p90)}",
            "predicted TPOT, p90",
            f"p50 {duration(a.tpot.p50)}, p99 {duration(a.tpot.p99)}; promised {duration(seconds(spec.slo.tpot))}",
        ),
    ]
    if p.goodput:
        share = f"; {p.bound_share:.0%} of the physical bound" if p.bound else ""
        found.insert(
            1,
            (f"{p.goodput:.1f} req/s", "predicted goodput", f"{p.goodput_per_gpu:.2f} req/s per GPU{share}"),
        )
    if p.cost is not None:
        found.insert(
            1,
            (
                f"{p.cost:,.2f}",
                "cost per hour",
                f"{p.cost / p.rate / 3.6:.3g} per 1,000 requests, by hardware.prices",
            ),
        )
    return "".join(
        f'<div class="card"><span>{escape(what)}</span><b>{escape(value)}</b><span>{escape(more)}</span></div>'
        for value, what, more in found
    )


def _facts(spec: Spec, p: Plan) -> str:
    w, a = p.workload, p.predicted
    setting = p.setting
    found = [
        (
            "Promise",
            f"TTFT {spec.slo.ttft} and TPOT {spec.slo.tpot} for {spec.slo.attainment:.0%} of the requests",
        ),
        (
            "Traffic",
            f"{w.rate:.4g} req/s; mean {w.input_mean:g} tokens in, {w.output_mean:g} out; gaps with a coefficient of "
            f"variation of {w.cv:g}{' (Poisson)' if w.cv == 1 else ''}; from {w.source}",
        ),
        ("Algorithm", f"{p.algorithm}; {p.affinity.lower()} affinity, because {p.affinity_reason}"),
    ]
    found += [(r.role.capitalize(), f"{r.count} × {_shape(r)}, on {_where(r)}") for r in p.roles]
    if setting:
        gpu = f"{setting.gpu}, decode on {setting.decode_gpu}" if setting.decode_gpu else setting.gpu
        apart = "; each prefill stands with its decode in one container" if p.paired else ""
        found.append(("Hardware", f"{gpu}; KV crosses {setting.link}{apart}; engine {setting.engine}"))
    found.append(
        (
            "Predicted",
            f"attainment {a.attainment:.1%} ({a.attainment_low:.1%} to {a.attainment_high:.1%}) of {a.requests:,} simulated "
            f"requests; TTFT p50 {duration(a.ttft.p50)}, p90 {duration(a.ttft.p90)}, p99 {duration(a.ttft.p99)}; "
            f"TPOT p50 {duration(a.tpot.p50)}, p90 {duration(a.tpot.p90)}, p99 {duration(a.tpot.p99)}",
        )
    )
    if p.bottleneck:
        found.append(("What binds", p.bottleneck))
    if p.bound:
        found.append(
            (
                "Physical bound",
                f"{p.bound:.2f} req/s per GPU by the datasheet alone, whatever the software; "
                f"{p.goodput_per_gpu:.2f} is predicted, {p.bound_share:.0%} of it",
            )
        )
    if p.cost is not None:
        found.append(
            ("Cost", f"{p.cost:,.2f} per hour for {p.gpus} GPUs, in the currency of hardware.prices")
        )
    found.append(("Step times", p.latency_source))
    if p.search and p.search.simulations:
        found.append(("Search", f"{p.search.simulations:,} simulations"))
    return "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in found)


def _where(r: RolePlan) -> str:
    return ", ".join(f"{n.name} ({n.count})" if n.count > 1 else n.name for n in r.nodes) or "nodes not named"


# ---- nodes


def _nodes(p: Plan, inventory: Inventory) -> str:
    known = {n.name: n for n in inventory.nodes}
    out = []
    for name in sorted({n.name for r in p.roles for n in r.nodes}):
        boxes = []
        for r in p.roles:
            count = sum(n.count for n in r.nodes if n.name == name)
            gpus = f'<span class="gpu">{r.role[0].upper()}</span>' * (r.tp * r.pp)
            boxes += [
                f'<div class="instance {r.role}" title="{r.role} {escape(_shape(r))}">{gpus}</div>'
            ] * count
        used = sum(n.count * r.tp * r.pp for r in p.roles for n in r.nodes if n.name == name)
        node = known.get(name)
        spare = node.gpus_free - used if node else 0
        if spare > 0:
            boxes.append(
                f'<div class="instance rest" title="free">{"".join(["<span class=gpu></span>"] * spare)}</div>'
            )
        what = f"{name}: {node.gpus_total} × {node.gpu.short}" if node else name
        out.append(
            f'<div class="node"><span>{escape(what)}</span><div class="row">{"".join(boxes)}</div></div>'
        )
    return "".join(out)


def _nodes_caption(p: Plan) -> str:
    letters = ", ".join(f"{role[0].upper()} = {role}" for role in dict.fromkeys(r.role for r in p.roles))
    many = len(p.refused_nodes)
    refused = f" {many} node{'s were' if many > 1 else ' was'} not counted (below)." if many else ""
    return f"One square is one GPU, one frame one instance; {letters}; dashed squares stay free.{refused}"


# ---- figures


def _figures(p: Plan, report: Report, limit: int) -> str:
    a = p.predicted
    chosen, others = report.curves[0], report.curves[1:]
    predicted = (p.rate, a.attainment, a.attainment_low, a.attainment_high)
    beside = f" against {', '.join(c.candidate.name for c in others)}" if others else ""
    one = _figure(
        "attainment",
        "Attainment against rate",
        figures.attainment(
            report, predicted, "Attainment against rate for the chosen plan and the runners-up"
        ),
        f"Share of requests that meet both limits as traffic grows, for the chosen plan{beside}. Where a line falls through "
        "the target is that plan's goodput. The band is the 95 % interval of the chance of arrivals; all lines share their "
        "arrivals. Predicted.",
        _table(
            ("plan", "GPUs", "goodput, req/s", "per GPU, req/s"),
            [
                (
                    f"{c.candidate.name}: {c.candidate.words}",
                    str(c.candidate.gpus),
                    f"{c.goodputs[SCALES.index(1.0)]:.2f}",
                    f"{c.goodputs[SCALES.index(1.0)] / c.candidate.gpus:.2f}",
                )
                for c in report.curves
            ],
        ),
    )
    two = _figure(
        "breakdown",
        "Where the time goes",
        figures.breakdown(report, "Latency breakdown of median and slow requests at the planned rate"),
        f"Mean parts of the requests around each percentile at {p.rate:.4g} req/s, by time to first token (left) and by the "
        f"whole request (right). {PARTS_MEANING[report.first_token_from]} Predicted.",
        _table(
            ("requests", *(f"{name}, ms" for name in figures.PARTS)),
            [
                (f"p{b.percentile} of TTFT, to the first token", *_milliseconds(b.to_first))
                for b in report.breakdown
            ]
            + [(f"p{b.percentile} of the whole request", *_milliseconds(b.whole)) for b in report.breakdown],
        ),
    )
    three = _figure(
        "growth",
        "GPUs against rate",
        figures.growth(report, p.rate, limit, "GPUs that the plan takes against rate"),
        "What the same search would plan if traffic were different, with the nodes, lengths and promise of this plan. "
        "A cross marks the first rate without a plan. Predicted.",
        _table(
            ("algorithm", "rate, req/s", "GPUs", "plan"),
            [
                (name, f"{s.rate:g}", str(s.gpus) if s.gpus is not None else "none", s.words)
                for name, steps in report.growth
                for s in steps
            ],
            numbers=(1, 2),
        ),
    )
    four = _figure(
        "promises",
        "Goodput against the promise",
        figures.promises(report, "Goodput per GPU against the scale of the promise, with the Pareto front"),
        "Both limits scaled together: what each plan yields per GPU under a tighter (left) or looser (right) promise, and what "
        f"a plan made anew for that promise at {p.rate:.4g} req/s yields. The shaded front is the best of all at each promise. "
        "Predicted.",
        _table(
            (
                "promise",
                *(f"{c.candidate.name}, req/s per GPU" for c in report.curves),
                "anew, req/s per GPU",
                "planned anew",
            ),
            [
                (
                    f"×{s:g}",
                    *(f"{c.goodputs[n] / c.candidate.gpus:.2f}" for c in report.curves),
                    f"{report.again[n].goodput_per_gpu:.2f}" if report.again[n].gpus is not None else "none",
                    report.again[n].words,
                )
                for n, s in enumerate(SCALES)
            ],
            numbers=range(1, len(report.curves) + 2),
        ),
    )
    return f"{one}{two}<div class='two'>{three}{four}</div>" if chosen else ""


def _figure(name: str, title: str, drawing: str, caption: str, table: str) -> str:
    return (
        f'<section id="{name}"><h2>{title}</h2><figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>'
        f"<details><summary>the figures</summary>{table}</details></section>"
    )


def _milliseconds(parts: Parts[float]) -> tuple[str, ...]:
    return tuple(f"{v * 1000:.1f}" for v in parts)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] | None = None) -> str:
    """A table; `numbers` are the columns set right, by default all but the first."""
    right = set(range(1, len(header)) if numbers is None else numbers)

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if k in right else ''}>{escape(c)}</{tag}>" for k, c in enumerate(cells)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{line("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'


# ---- what lost, what was left out, what it rests on


def _rejected(p: Plan, report: Report) -> str:
    rows = [(r.what, r.reason) for r in p.rejected]
    rows += [
        (f"{c.candidate.name}: {c.candidate.words}", c.candidate.why)
        for c in report.curves[1:]
        if c.candidate.why not in [r.reason for r in p.rejected]
    ]
    return (
        _table(("alternative", "why it is not the plan"), rows, ())
        if rows
        else "<p>No alternative was near.</p>"
    )


def _refused(p: Plan) -> str:
    if not p.refused_nodes:
        return ""
    table = _table(("node", "why"), [(n.name, n.reason) for n in p.refused_nodes], ())
    return f'<section id="refused"><h2>Nodes not counted</h2>{table}</section>'


def _source(p: Plan, report: Report) -> str:
    a = p.predicted
    half = 100 * max(a.attainment_high - a.attainment, a.attainment - a.attainment_low)
    out = [
        "Every figure on this page is <b>predicted</b> by a discrete-event simulation of the router, the instances, their "
        "memory and the link between them. Nothing on it was measured on this cluster.",
        f"Margin by chance: the attainment holds within ±{half:.1f} points at 95 %, from {a.requests:,} requests on fresh "
        "seeds. This interval holds the chance of arrivals and lengths, not an error of the step times.",
    ]
    out += [f"Step times, {escape(x.describe())}: {_margin(x)}." for x in report.provenance]
    if p.emulated:
        out.append(
            "<b>Emulated nodes</b>: their GPUs are simulated. Workers there compute with a tiny model and wait until the time "
            "above has passed; figures served there are emulated, and no evidence about real GPUs."
        )
    return "".join(f"<p>{text}</p>" for text in out)


def _margin(x: Provenance) -> str:
    borrowed = "; the efficiency curves are another product's" if x.borrowed else ""
    engine = "; the engine planned for has not been measured" if x.elsewhere else ""
    return escape(_MARGINS[x.source] + borrowed + engine)

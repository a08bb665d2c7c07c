"""`disaggserve plan`: the operator's own plan, without a cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from disaggserve import engines, latency, plan, workload
from disaggserve.api.errors import InvalidInput
from disaggserve.api.spec import Spec
from disaggserve.cli import show
from disaggserve.cli.files import objects, one
from disaggserve.cli.traffic import over_context
from disaggserve.cluster import searching
from disaggserve.workload import Workload

ALGORITHMS = {"joint": "Joint", "distserve": "DistServe", "high": "HighAffinity", "low": "LowAffinity"}


@dataclass(frozen=True)
class Replacing:
    """Options that replace what the resource says; None leaves it."""

    algorithm: str | None = None
    profile: Path | None = None
    trace: Path | None = None
    cache_blocks: int | None = None
    lengths: Path | None = None
    rate: str | None = None
    max_gpus: int | None = None
    engine: str | None = None
    as_published: bool = False
    resolution: float | None = None


def run(file: Path, nodes: Path, replacing: Replacing, output: str, page: Path | None = None) -> None:
    if replacing.resolution is not None and not replacing.as_published:
        raise InvalidInput("--resolution belongs to --as-published; add that or leave it out")
    if replacing.as_published and page is not None:
        raise InvalidInput(
            "--report draws with our own simulator, --as-published does not use it; give one of them"
        )
    given = one(file).spec
    if given.plan is not None:
        _check_by_hand(replacing)
    spec = replaced(given, replacing)
    expected = traffic(spec, replacing)
    options = plan.Options(
        profile=latency.Profile.load(replacing.profile) if replacing.profile else None,
        objective="goodput" if replacing.rate == "max" else "gpus",
        any_engine=replacing.engine == "any",
        as_published=replacing.as_published,
        resolution=plan.Options.resolution if replacing.resolution is None else replacing.resolution,
    )
    facts = read_facts(nodes)
    if page is not None:
        from disaggserve.cli import report  # takes a while to load, and few ask for it

        report.prepare(page)
    with show.busy("searching"):
        draft = searching.draft(spec, facts, expected, (), options)
    if output == "table":
        show.plan(spec, draft)
    else:
        show.dump(draft.plan.model_dump(mode="json", exclude_none=True), output)
    if page is not None:
        traffic_planned = replace(expected or plan.expected(spec), rate=draft.plan.rate)
        report.write(page, report.Asked(spec, facts, traffic_planned, options), draft)


def _check_by_hand(replacing: Replacing) -> None:
    """Raises InvalidInput for options of a search, which a plan by hand needs none of."""
    for option, asked in (
        ("--rate max", replacing.rate == "max"),
        ("--engine any", replacing.engine == "any"),
        ("--algorithm", replacing.algorithm is not None),
    ):
        if asked:
            raise InvalidInput(
                f"{option} asks for a search, and spec.plan has a plan by hand; take one of them out"
            )


def read_facts(path: Path) -> plan.Facts:
    """What `kubectl get nodes,pods -A -o yaml` prints. Raises InvalidInput where it holds no node."""
    found = objects(path)
    of_kind = {kind: tuple(o for o in found if o.get("kind") == kind) for kind in ("Node", "Pod")}
    if not of_kind["Node"]:
        raise InvalidInput(f"{path}: holds no Node; give what `kubectl get nodes,pods -A -o yaml` prints")
    return plan.Facts(nodes=of_kind["Node"], pods=of_kind["Pod"])


def replaced(spec: Spec, replacing: Replacing) -> Spec:
    """The spec with algorithm, rate, GPUs and engine of the options."""
    parts: dict[str, dict[str, object]] = {
        "planner": {"algorithm": replacing.algorithm and ALGORITHMS[replacing.algorithm]},
        "hardware": {"max_gpus": replacing.max_gpus},
        "engine": {"type": replacing.engine if replacing.engine != "any" else None},
        "workload": {"rate": _rate(replacing.rate)},
    }
    update = {
        part: getattr(spec, part).model_copy(update={k: v for k, v in given.items() if v is not None})
        for part, given in parts.items()
    }
    return spec.model_copy(update=update)


def _rate(text: str | None) -> float | None:
    if text is None or text == "max":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= 100_000:
        raise InvalidInput(f"--rate is {text!r}; give requests per second above 0, 100,000 at most, or max")
    return rate


def traffic(spec: Spec, replacing: Replacing) -> Workload | None:
    """Traffic of a trace or a table of lengths; None where neither is given. Requests over the model's context are left out,
    and how many is said on stderr and in the source.

    A trace is planned for as it is: its own arrivals in their order, at its mean rate or run faster or slower to --rate.
    """
    if replacing.trace and replacing.lengths:
        raise InvalidInput("--trace and --lengths both tell the lengths; give one of them")
    context = plan.context_length(spec)
    if replacing.lengths:
        table = workload.read_lengths(replacing.lengths)
        lengths, out = table.within(context)
        said = over_context(replacing.lengths, out, len(table), context)
        named = replace(lengths, name=f"{replacing.lengths.name}{said}")
        return Workload(spec.workload.rate, 1.0, named, "lengths of a file")
    if replacing.trace is None:
        return None
    engine = engines.engine(spec.engine.type)
    whole = workload.read_trace(
        replacing.trace,
        context_length=context,
        cache_blocks=replacing.cache_blocks if engine.prefix_cache else 0,
    )
    if not engine.prefix_cache:
        whole = replace(whole, cached=None)
    requests, out = whole.within(context)
    said = over_context(replacing.trace, out, len(whole), context)
    if share := requests.cached_share():
        said += f"; {share:.0%} of the prompt tokens found in a prefix cache"
    found = workload.from_trace(requests, f"{replacing.trace.name}, its own arrivals{said}")
    rate = _rate(replacing.rate)
    return replace(found, rate=rate) if rate else found

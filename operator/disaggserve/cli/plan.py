"""`disaggserve plan`: the operator's own plan, without a cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from disaggserve import latency, plan, workload
from disaggserve.api.errors import InvalidInput
from disaggserve.api.spec import PlannerSpec, Spec
from disaggserve.cli import show
from disaggserve.cli.files import objects, one
from disaggserve.cluster import searching

_ALGORITHMS = {"distserve": "DistServe", "high": "HighAffinity", "low": "LowAffinity"}


@dataclass(frozen=True)
class Changes:
    """The options as given: what they replace in the resource, and what is asked beside it."""

    algorithm: str | None
    as_published: bool
    resolution: float | None
    profile: Path | None
    lengths: Path | None
    rate: str | None
    max_gpus: int | None


def run(file: Path, nodes: Path, changes: Changes, output: str) -> None:
    spec = _changed(one(file).spec, changes)
    options = _options(changes)
    found = objects(nodes)
    of_kind = {kind: tuple(o for o in found if o.get("kind") == kind) for kind in ("Node", "Pod")}
    if not of_kind["Node"]:
        raise InvalidInput(f"{nodes}: holds no Node; give what `kubectl get nodes,pods -A -o yaml` prints")
    facts = plan.Facts(nodes=of_kind["Node"], pods=of_kind["Pod"])
    traffic = plan.expected(spec)
    if changes.lengths is not None:
        lengths = workload.read_lengths(changes.lengths).scaled(1.0, plan.context_length(spec))
        traffic = replace(traffic, lengths=lengths, source="--lengths")
    with show.busy("searching"):
        draft = searching.draft(spec, facts, traffic, (), options)
    if output == "table":
        show.plan(spec, draft)
    else:
        show.dump(draft.plan.model_dump(mode="json", exclude_none=True), output)


def _changed(spec: Spec, changes: Changes) -> Spec:
    if changes.algorithm:
        planner = PlannerSpec.model_validate({"algorithm": _ALGORITHMS[changes.algorithm]})
        spec = spec.model_copy(update={"planner": planner})
    if changes.max_gpus:
        hardware = spec.hardware.model_copy(update={"max_gpus": changes.max_gpus})
        spec = spec.model_copy(update={"hardware": hardware})
    if changes.rate and changes.rate != "max":
        try:
            rate = float(changes.rate)
        except ValueError:
            rate = 0.0
        if not 0 < rate <= 100_000:
            raise InvalidInput(f"--rate is {changes.rate!r}; write requests per second up to 100000, or max")
        spec = spec.model_copy(update={"workload": spec.workload.model_copy(update={"rate": rate})})
    return spec


def _options(changes: Changes) -> plan.Options:
    if changes.resolution is not None and not changes.as_published:
        raise InvalidInput("--resolution belongs to --as-published; add that or leave it out")
    return plan.Options(
        profile=latency.Profile.load(changes.profile) if changes.profile else None,
        objective="goodput" if changes.rate == "max" else "gpus",
        as_published=changes.as_published,
        resolution=changes.resolution or plan.Options.resolution,
    )

"""`disaggserve plan`: the operator's own plan, without a cluster."""

from __future__ import annotations

from pathlib import Path

from disaggserve import plan
from disaggserve.api.errors import InvalidInput
from disaggserve.api.spec import PlannerSpec
from disaggserve.cli import report, show
from disaggserve.cli.files import objects, one
from disaggserve.cluster import searching

_ALGORITHMS = {"distserve": "DistServe", "high": "HighAffinity", "low": "LowAffinity"}


def run(file: Path, nodes: Path, algorithm: str | None, output: str, page: Path | None = None) -> None:
    spec = one(file).spec
    if algorithm:
        planner = PlannerSpec.model_validate({"algorithm": _ALGORITHMS[algorithm]})
        spec = spec.model_copy(update={"planner": planner})
    found = objects(nodes)
    of_kind = {kind: tuple(o for o in found if o.get("kind") == kind) for kind in ("Node", "Pod")}
    if not of_kind["Node"]:
        raise InvalidInput(f"{nodes}: holds no Node; give what `kubectl get nodes,pods -A -o yaml` prints")
    facts = plan.Facts(nodes=of_kind["Node"], pods=of_kind["Pod"])
    with show.busy("searching"):
        draft = searching.draft(spec, facts, None, ())
    if output == "table":
        show.plan(spec, draft)
    else:
        show.dump(draft.plan.model_dump(mode="json", exclude_none=True), output)
    if page is not None:
        report.write(page, spec, facts, draft, plan.expected(spec))

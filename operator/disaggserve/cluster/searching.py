"""What runs in the search process: the pure functions, timed. The event loop never waits for a search or a compiler."""

from __future__ import annotations

from collections.abc import Sequence

from disaggserve import drift, hardware, plan
from disaggserve.api.plan import Commit, Search, Slot
from disaggserve.api.spec import Spec
from disaggserve.cluster.clock import WallClock
from disaggserve.hardware import Json
from disaggserve.workload import Workload


def draft(
    spec: Spec,
    facts: plan.Facts,
    workload: Workload | None,
    previous: Sequence[Slot],
    options: plan.Options = plan.DEFAULT,
) -> plan.Draft:
    """`plan.draft` with what it took. Raises Infeasible and other DisaggServeErrors."""
    plan.warm_up(options)
    clock = WallClock()
    began_s, cpu_s = clock.monotonic_s(), clock.cpu_s()
    found = plan.draft(spec, facts, workload, previous, options)
    return found.timed(clock.monotonic_s() - began_s, clock.cpu_s() - cpu_s)


def judge(
    spec: Spec, commit: Commit, traffic: drift.Traffic, history: drift.History, facts: plan.Facts
) -> drift.Verdict:
    return drift.judge(spec, commit, traffic, history, facts)


def gpus_of_others(pods: Sequence[Json], claims: Sequence[Json], own: set[str]) -> int:
    """GPUs that pods of others hold or claim."""
    total = 0
    for pod in (*pods, *claims):
        if pod["metadata"].get("uid") not in own and pod["spec"].get("nodeName"):
            total += int(hardware.requests(pod).get(hardware.GPU_RESOURCE, 0))
    return total


__all__ = ["Search", "draft", "gpus_of_others", "judge"]

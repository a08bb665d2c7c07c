"""Status as it should read, from what is known; written only when it differs from what is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from disaggserve.api.plan import Plan
from disaggserve.api.status import (
    Condition,
    ConditionType,
    Decision,
    Observed,
    Proposal,
    RolloutStatus,
    Status,
)
from disaggserve.cluster.client import Json
from disaggserve.cluster.clock import rfc3339

Truth = Literal["True", "False", "Unknown"]


@dataclass
class Report:
    """Collects one reconcile's findings; `status` turns them into the new status."""

    generation: int
    conditions: dict[ConditionType, tuple[Truth, str, str]] = field(default_factory=dict)
    plan: Plan | None = None
    proposal: Proposal | None = None
    rollout: RolloutStatus | None = None
    observed: Observed | None = None
    decision: Decision | None = None
    url: str = ""
    paused: bool = False

    def set(self, kind: ConditionType, truth: Truth, reason: str, message: str) -> None:
        self.conditions[kind] = (truth, reason, message[:4000])

    def _phase(self) -> str:
        def is_(kind: ConditionType, truth: Truth) -> bool:
            return self.conditions.get(kind, ("Unknown",))[0] == truth

        if self.paused:
            return "Paused"
        if is_("Progressing", "True"):
            return "Progressing" if is_("Ready", "True") else "Starting"
        if is_("Ready", "True"):
            return "Degraded" if is_("PlanFeasible", "False") or is_("MeetingSLO", "False") else "Ready"
        return "Infeasible" if is_("PlanFeasible", "False") else "NotReady"

    def status(self, old: Mapping[str, Any], now_s: float) -> Json:
        """The new status as JSON values. Transition times and an unchanged decision's time are kept."""
        before = {c["type"]: c for c in old.get("conditions", ())}
        conditions = []
        for kind, (truth, reason, message) in self.conditions.items():
            same = kind in before and before[kind]["status"] == truth
            since = before[kind]["lastTransitionTime"] if same else rfc3339(now_s)
            conditions.append(
                Condition(
                    type=kind,
                    status=truth,
                    reason=reason,
                    message=message,
                    last_transition_time=since,
                    observed_generation=self.generation,
                )
            )
        decision = self.decision
        last = old.get("lastDecision")
        if decision and last and (last["action"], last["reason"]) == (decision.action, decision.reason):
            decision = decision.model_copy(update={"time": last["time"]})
        status = Status(
            observed_generation=self.generation,
            phase=self._phase(),
            conditions=tuple(conditions),
            url=self.url,
            plan=self.plan,
            proposal=self.proposal,
            rollout=self.rollout,
            last_decision=decision,
        )
        value: Json = status.model_dump(mode="json", exclude_none=True)
        # What was observed changes all the time; it is written with a decision, and alone it is no reason to write.
        if "observed" in old:
            value["observed"] = old["observed"]
        if value != dict(old) and self.observed is not None:
            value["observed"] = self.observed.model_dump(mode="json", exclude_none=True)
        return value


def merge_diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> Json:
    """The merge patch that turns `old` into `new`; empty when they are equal."""
    patch: Json = {k: None for k in old if k not in new}
    for key, value in new.items():
        if key not in old:
            patch[key] = value
        elif isinstance(value, Mapping) and isinstance(old[key], Mapping):
            inner = merge_diff(old[key], value)
            if inner:
                patch[key] = inner
        elif value != old[key]:
            patch[key] = value
    return patch

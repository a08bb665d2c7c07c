"""A pod's status as a kubelet computes it. Pure: states in, status out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass
class ContainerState:
    """What is known of one container. `state` and `last` have the shape of the API's and are replaced, never
    changed in place."""

    name: str
    image: str
    state: Json = field(default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}})
    last: Json = field(default_factory=dict)
    restarts: int = 0
    ready: bool = False
    started: bool = False
    identity: str = ""

    @property
    def exit_code(self) -> int | None:
        """Of the present run; None unless it has ended."""
        terminated = self.state.get("terminated")
        return None if terminated is None else int(terminated["exitCode"])

    def to_json(self) -> Json:
        return {
            "name": self.name,
            "image": self.image,
            "imageID": self.image,
            "containerID": self.identity,
            "state": self.state,
            "lastState": self.last,
            "restartCount": self.restarts,
            "ready": self.ready,
            "started": self.started,
        }


def phase(restart_policy: str, init: Sequence[ContainerState], containers: Sequence[ContainerState]) -> str:
    """Pending, Running, Succeeded or Failed, by the kubelet's rules."""
    if any(state.exit_code != 0 for state in init):
        failed = any(state.exit_code not in (None, 0) for state in init)
        return "Failed" if failed and restart_policy == "Never" else "Pending"
    codes = [state.exit_code for state in containers]
    if any("waiting" in state.state and not state.last for state in containers):
        return "Pending"
    if None in codes or restart_policy == "Always":
        # Running, or waiting for its next start.
        return "Running"
    if all(code == 0 for code in codes):
        return "Succeeded"
    return "Failed" if restart_policy == "Never" else "Running"


def conditions(
    pod_phase: str,
    *,
    has_sandbox: bool,
    init: Sequence[ContainerState],
    containers: Sequence[ContainerState],
    gates: Iterable[str],
    present: Sequence[Json],
    now: str,
) -> list[Json]:
    """The kubelet's own conditions. `present` are those in the API: for readiness gates and transition times.

    A condition that is true has a null reason and message, which clears them in a strategic merge patch.
    """
    ready_in_api = {condition["type"]: condition["status"] == "True" for condition in present}
    initialized = all(state.exit_code == 0 for state in init) or pod_phase in ("Running", "Succeeded")
    missing_gates = sorted(gate for gate in gates if not ready_in_api.get(gate))
    unready = [state.name for state in containers if not state.ready]
    reason, message = "ContainersNotReady", f"containers with unready status: [{' '.join(unready)}]"
    if pod_phase in ("Succeeded", "Failed"):
        reason = "PodCompleted" if pod_phase == "Succeeded" else "PodFailed"
    wanted: list[tuple[str, bool, str, str]] = [
        ("PodReadyToStartContainers", has_sandbox, "", ""),
        (
            "Initialized",
            initialized,
            "ContainersNotInitialized",
            f"containers with incomplete status: [{' '.join(s.name for s in init if s.exit_code != 0)}]",
        ),
        ("ContainersReady", not unready, reason, message),
        (
            "Ready",
            not unready and not missing_gates,
            reason if unready else "ReadinessGatesNotReady",
            message if unready else f"the readiness gates {', '.join(missing_gates)} are not true",
        ),
    ]
    before = {condition["type"]: condition for condition in present}
    result: list[Json] = []
    for kind, is_true, why, words in wanted:
        status = "True" if is_true else "False"
        old = before.get(kind)
        same = old is not None and old["status"] == status and old.get("lastTransitionTime")
        result.append(
            {
                "type": kind,
                "status": status,
                "reason": None if is_true else why or None,
                "message": None if is_true else words or None,
                "lastProbeTime": None,
                "lastTransitionTime": old["lastTransitionTime"] if old and same else now,
            }
        )
    return result


def patch(status: Mapping[str, Any]) -> Json:
    """The strategic merge patch that makes `status` the truth: addresses replace, else they would add up."""
    body = dict(status)
    for key in ("podIPs", "hostIPs"):
        if key in body:
            body[key] = [{"$patch": "replace"}, *body[key]]
    return body

"""One pod bound to a simulated node, from its first sight to its deletion."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from e2e.nodes import status
from e2e.nodes.clock import now
from e2e.nodes.container import RETRY_S, Container
from e2e.nodes.ending import Ending
from e2e.nodes.errors import ApiError, NotYet, Refused
from e2e.nodes.host import Host, Place
from e2e.nodes.processes import Process
from e2e.nodes.quantities import pod_requests, quantity
from e2e.nodes.reporter import Reporter
from e2e.nodes.status import ContainerState
from e2e.nodes.surroundings import Surroundings

Json = dict[str, Any]

log = logging.getLogger(__name__)


class Pod:
    """Lives by itself once it is made; `container.Owner` of its containers."""

    def __init__(
        self, host: Host, place: Place, pod: Json, used: Callable[[], Mapping[str, Fraction]]
    ) -> None:
        """`used`: what the other pods on the node have of its resources."""
        self._host = host
        self._place = place
        self._used = used
        self.object = pod
        self.namespace: str = pod["metadata"]["namespace"]
        self.name: str = pod["metadata"]["name"]
        self.uid: str = pod["metadata"]["uid"]
        self.requests = pod_requests(pod["spec"])
        self.ending = Ending()
        self.address = ""
        self.init: list[Container] = []
        self.containers: list[Container] = []
        self._root = host.folder / "pods" / self.uid
        self._surroundings: Surroundings | None = None
        self._reporter = Reporter(host.api, pod, self._status)
        self._started_at: str = pod.get("status", {}).get("startTime") or now()
        self._rejection: tuple[str, str] | None = None
        self._finished = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
        self._silent = False
        """Nobody is to be told: it is gone from the API, or its node has failed."""
        self.update(pod)
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._report_fault)

    # What the agent asks and tells.

    @property
    def counts(self) -> bool:
        """Whether it takes up its requests on the node."""
        return not self._finished and self._rejection is None

    def on(self, node: str) -> bool:
        return self._place.node.name == node

    def update(self, pod: Json) -> None:
        """Its object has changed."""
        self.object = pod
        if self._surroundings is not None:
            self._surroundings.pod = pod
        if "deletionTimestamp" in pod["metadata"]:
            self.ending.order(float(pod["metadata"].get("deletionGracePeriodSeconds") or 0))
        self._reporter.compare(pod)

    def gone(self) -> None:
        """It is no longer in the API: end it now."""
        self._silent = True
        self._reporter.stop()
        self.ending.order(0)

    async def abandon(self) -> None:
        """The node has failed: the processes die, and nobody says so. On return they are dead."""
        self._silent = True
        self._reporter.stop()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*(each.process.wait() for each in self._all() if each.process is not None))

    def container(self, name: str) -> Container | None:
        return next((each for each in self._all() if each.spec["name"] == name), None)

    def crash(self, container: str | None) -> list[str]:
        """Kill the running processes, or that of one container; the names of those that were killed."""
        running = [each for each in self._all() if each.running and container in (None, each.spec["name"])]
        for each in running:
            each.kill()
        return [each.spec["name"] for each in running]

    def to_json(self) -> Json:
        """For tests: where it is and what runs."""
        return {
            "namespace": self.namespace,
            "name": self.name,
            "uid": self.uid,
            "node": self._place.node.name,
            "address": self.address,
            "processes": {
                each.spec["name"]: each.process.pid
                for each in self._all()
                if each.process is not None and each.running
            },
        }

    # What its containers ask and tell.

    async def start(self, container: Json) -> Process:
        assert self._surroundings is not None
        return await self._surroundings.start(container)

    async def execute(self, container: Json, command: Sequence[str], quiet: bool) -> Process:
        assert self._surroundings is not None
        return await self._surroundings.execute(container, command, quiet)

    def log(self, container: str) -> Path:
        return self._host.log(self.namespace, self.name, container)

    def publish(self) -> None:
        if not self._silent:
            self._reporter.changed()

    # Its life.

    def _all(self) -> list[Container]:
        return [*self.init, *self.containers]

    def _report_fault(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("pod %s/%s", self.namespace, self.name, exc_info=task.exception())
            self._host.failed(f"pod {self.namespace}/{self.name} met a fault of the agent's own")

    async def _run(self) -> None:
        try:
            if not self._finished:
                try:
                    await self._live()
                finally:
                    self._finished = True
                    self._let_go()
                self.publish()
            await self.ending.wait()
            if not self._silent:
                if self._reporter.written:
                    await self._reporter.flush()
                await self._delete()
        finally:
            self._reporter.stop()

    async def _live(self) -> None:
        """Until every container has ended for good."""
        self._rejection = self._does_not_fit()
        if self._rejection:
            return
        spec, earlier = self.object["spec"], self.object.get("status", {})
        self.address = self._host.addresses.take()
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._surroundings = Surroundings(self._host, self._place, self.object, self.address, self._root)
        self.init = self._make(spec.get("initContainers", []), earlier.get("initContainerStatuses", []), True)
        self.containers = self._make(spec["containers"], earlier.get("containerStatuses", []), False)
        self.publish()
        if not await self._mount(self._surroundings):
            return
        for container in self.init:
            if container.state.exit_code != 0:
                await container.run()
            if container.state.exit_code != 0:
                return
        async with asyncio.TaskGroup() as group:
            for container in self.containers:
                group.create_task(container.run())

    def _make(self, specs: Sequence[Json], earlier: Sequence[Json], init: bool) -> list[Container]:
        policy = self.object["spec"]["restartPolicy"]
        before = {entry["name"]: entry for entry in earlier}
        return [
            Container(
                self,
                spec,
                pod_uid=self.uid,
                address=self.address,
                restart_policy="OnFailure" if init and policy == "Always" else policy,
                grace_s=float(self.object["spec"].get("terminationGracePeriodSeconds", 30)),
                init=init,
                session=self._host.session,
                before=_earlier_life(spec, before.get(spec["name"]), policy),
            )
            for spec in specs
        ]

    def _does_not_fit(self) -> tuple[str, str] | None:
        """A kubelet's admission: reason and message if the node lacks what the pod asks for."""
        used = self._used()
        for name, amount in self.requests.items():
            capacity = quantity(self._place.node.resources().get(name, "0"))
            taken = used.get(name, Fraction(0))
            if amount and taken + amount > capacity:
                message = (
                    f"Pod was rejected: Node didn't have enough resource: {name}, "
                    f"requested: {float(amount):g}, used: {float(taken):g}, capacity: {float(capacity):g}"
                )
                return f"OutOf{name}", message
        return None

    async def _mount(self, surroundings: Surroundings) -> bool:
        """Volumes and tokens; False when the ending was ordered first."""
        while True:
            try:
                return await self.ending.unless_ordered(surroundings.mount)
            except Refused as refused:
                for container in self._all():
                    container.wait_for(refused)
                if await self.ending.wait(RETRY_S if isinstance(refused, NotYet) else None):
                    return False

    def _let_go(self) -> None:
        """Whatever runs is killed; address and files are given back."""
        for container in self._all():
            container.kill()
        if self.address:
            self._host.addresses.give_back(self.address)
            shutil.rmtree(self._root, ignore_errors=True)

    async def _delete(self) -> None:
        """The last word on a pod that was to be deleted: it has ended, so it may go."""
        api, path = self._host.api, f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": 0,
            "preconditions": {"uid": self.uid},
        }
        try:
            await api.insist(lambda: api.delete(path, body), f"deleting {path}")
        except ApiError as error:
            if error.status not in (404, 409):
                log.error("%s could not be deleted: %s", path, error)

    # Its status.

    def _status(self) -> Json:
        earlier = self.object.get("status", {})
        init = [container.state for container in self.init]
        containers = [container.state for container in self.containers]
        phase = "Failed" if self._rejection else self._phase(init, containers)
        # Our own last word is newer than what the watch has brought so far.
        present = {each["type"]: each for each in earlier.get("conditions", [])}
        present |= {each["type"]: each for each in self._reporter.written.get("conditions", [])}
        found: Json = {
            "phase": phase,
            "startTime": self._started_at,
            "hostIP": self._place.address,
            "hostIPs": [{"ip": self._place.address}],
            "conditions": status.conditions(
                phase,
                has_sandbox=bool(self.address) and not self._finished,
                init=init,
                containers=containers,
                gates=[gate["conditionType"] for gate in self.object["spec"].get("readinessGates", [])],
                present=list(present.values()),
                now=now(),
            ),
        }
        if self._rejection:
            return found | {"reason": self._rejection[0], "message": self._rejection[1]}
        if init:
            found["initContainerStatuses"] = [state.to_json() for state in init]
        return found | {
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "containerStatuses": [state.to_json() for state in containers],
        }

    def _phase(self, init: Sequence[ContainerState], containers: Sequence[ContainerState]) -> str:
        codes = [state.exit_code for state in containers]
        if self._finished and None not in codes:
            # A pod that was stopped has a final phase whatever its restart policy.
            return "Failed" if any(codes) else "Succeeded"
        return status.phase(self.object["spec"]["restartPolicy"], init, containers)


def _earlier_life(spec: Json, before: Json | None, restart_policy: str) -> ContainerState | None:
    """The state of a container from what a former agent, or this one before its node failed, said of it."""
    if before is None or not before.get("containerID"):
        return None
    state = ContainerState(
        spec["name"],
        spec["image"],
        last=before.get("lastState", {}),
        restarts=before["restartCount"],
        identity=before["containerID"],
    )
    if "terminated" in before["state"]:
        state.state = before["state"]
    elif "running" in before["state"]:
        lost = {
            "exitCode": 137,
            "reason": "ContainerStatusUnknown",
            "message": "the node went away while the container was running",
            "startedAt": before["state"]["running"]["startedAt"],
            "finishedAt": now(),
            "containerID": before["containerID"],
        }
        if restart_policy == "Never":
            state.state = {"terminated": lost}
        else:
            state.last, state.restarts = {"terminated": lost}, state.restarts + 1
    return state

"""One container of a pod: start, probe, restart with back-off, end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from e2e.nodes.clock import now
from e2e.nodes.ending import Ending
from e2e.nodes.errors import NotYet, Refused
from e2e.nodes.probes import Actions
from e2e.nodes.processes import Process
from e2e.nodes.status import ContainerState

Json = dict[str, Any]

RESTART_BACKOFF_S = 1.0
"""A kubelet's is 10 s: shortened, since tests wait for it. The first restart is immediate, as there."""
RESTART_BACKOFF_MAX_S = 30.0
RESTART_BACKOFF_RESET_S = 60.0
"""A container that ran for so long starts over with its back-off."""
RETRY_S = 1.0
"""How often something that may still come (a missing ConfigMap) is looked for."""
_MINIMUM_GRACE_S = 2.0
"""What SIGTERM is given when the preStop hook has used up the grace period, as a kubelet does."""
_LAST_WORDS_BYTES = 2048

log = logging.getLogger(__name__)


class Owner(Protocol):
    """What a container needs of its pod."""

    namespace: str
    name: str
    ending: Ending

    async def start(self, container: Json) -> Process:
        """Start the container's own command. Raises Refused, NotYet."""

    async def execute(self, container: Json, command: Sequence[str], quiet: bool) -> Process:
        """Start another command beside it, its output in the container's log or, if quiet, nowhere."""

    def log(self, container: str) -> Path: ...

    def publish(self) -> None:
        """Something has changed that the pod's status shows."""


class Container:
    """Runs one container as often as the restart policy says."""

    def __init__(
        self,
        pod: Owner,
        spec: Json,
        *,
        pod_uid: str,
        address: str,
        restart_policy: str,
        grace_s: float,
        init: bool,
        session: aiohttp.ClientSession,
        before: ContainerState | None,
    ) -> None:
        """`before`: its state from an earlier life of this node."""
        self._pod = pod
        self.spec = spec
        self._title = f"{pod.namespace}/{pod.name} {spec['name']}"
        self._policy = restart_policy
        self._grace_s = grace_s
        self._init = init
        self._uid = pod_uid
        self._actions = Actions(
            spec, address, session, lambda command: pod.execute(spec, command, quiet=True)
        )
        self._hooks = Actions(spec, address, session, lambda command: pod.execute(spec, command, quiet=False))
        self.state = before or ContainerState(spec["name"], spec["image"])
        self._generation = self.state.restarts
        self.process: Process | None = None
        self._log_starts: list[int] = []
        """Where in the log each run of this life begins, in bytes."""
        self._condemned: asyncio.Future[float] | None = None
        """Set to a grace period by a probe that has failed for good."""

    async def run(self) -> None:
        """Until the container has ended for good: it completed, or the pod's ending was ordered."""
        ending, backoff_s = self._pod.ending, 0.0
        if self._done(self.state.exit_code):
            return
        while not ending.ordered:
            if not await self._try_start():
                return
            started_s = asyncio.get_running_loop().time()
            code = await self._live()
            if ending.ordered or self._done(code):
                return
            if asyncio.get_running_loop().time() - started_s >= RESTART_BACKOFF_RESET_S:
                backoff_s = 0.0
            terminated = self.state.state
            if backoff_s:
                name = self.spec["name"]
                self._set(
                    state={
                        "waiting": {
                            "reason": "CrashLoopBackOff",
                            "message": f"back-off {backoff_s:g}s restarting failed container {name}",
                        }
                    },
                    last=terminated,
                )
                await ending.wait(backoff_s)
            backoff_s = min(RESTART_BACKOFF_MAX_S, 2 * backoff_s or RESTART_BACKOFF_S)
            if not ending.ordered:
                self._generation += 1
                self.state = replace(self.state, restarts=self._generation, last=terminated)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.running

    def log_span(self, previous: bool) -> tuple[int, int | None]:
        """Where in its log the present or the previous run lies, in bytes; no end: to the end of the file."""
        starts = self._log_starts
        if previous:
            return (starts[-2], starts[-1]) if len(starts) > 1 else (0, 0)
        return (starts[-1], None) if starts else (0, 0)

    def wait_for(self, refused: Refused) -> None:
        """It cannot start, for a reason that its state is to show."""
        self._set(state={"waiting": {"reason": refused.reason, "message": refused.message}})

    def kill(self) -> None:
        """At once and without a word in the status."""
        if self.process is not None:
            self.process.signal(signal.SIGKILL)

    def _done(self, exit_code: int | None) -> bool:
        """Whether, having ended so, it is not started again."""
        if exit_code is None or self._policy == "Always":
            return False
        return self._policy == "Never" or exit_code == 0

    def _set(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        self._pod.publish()

    async def _try_start(self) -> bool:
        """Start the process, as often as it takes; False when the ending was ordered before it ran."""
        ending = self._pod.ending
        while True:
            self._condemned = asyncio.get_running_loop().create_future()
            try:

                async def start() -> None:
                    log = self._pod.log(self.spec["name"])
                    begins = log.stat().st_size if log.exists() else 0
                    self.process = await self._pod.start(self.spec)
                    self._log_starts.append(begins)

                return await ending.unless_ordered(start)
            except Refused as refused:
                self.wait_for(refused)
                # What the pod's spec asks for cannot change, what is missing outside can.
                if await ending.wait(RETRY_S if isinstance(refused, NotYet) else None):
                    return False

    async def _live(self) -> int:
        """From the start of the process to its end; the exit code."""
        assert self.process is not None
        assert self._condemned is not None
        process, started_at = self.process, now()
        identity = f"disaggserve://{self._uid}/{self.spec['name']}/{self._generation}"
        unprobed = "startupProbe" not in self.spec
        self._set(
            state={"running": {"startedAt": started_at}},
            identity=identity,
            started=unprobed and not self._init,
            ready=unprobed and not self._init and "readinessProbe" not in self.spec,
        )
        probes: list[asyncio.Task[None]] = []
        exited = asyncio.create_task(process.wait())
        ordered = asyncio.create_task(self._pod.ending.wait())
        hook: asyncio.Task[None] | None = None
        try:
            if not self._init:
                hook = asyncio.create_task(self._post_start())
                probes = self._start_probes()
            awaited: set[asyncio.Future[Any]] = {exited, ordered, self._condemned}
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():
                # Readiness goes on being asked while the container winds down; nothing else does.
                for probe in probes:
                    if probe.get_name() != "readinessProbe":
                        probe.cancel()
                await self._end(process)
            code = await exited
        finally:
            for task in [*probes, exited, ordered, *([hook] if hook else [])]:
                task.cancel()
            process.signal(signal.SIGKILL)
        terminated = {
            "exitCode": code,
            "reason": "Completed" if code == 0 else "Error",
            "startedAt": started_at,
            "finishedAt": now(),
            "containerID": identity,
        }
        if code and self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            terminated["message"] = _last_words(self._pod.log(self.spec["name"]))
        self._set(state={"terminated": terminated}, ready=self._init and code == 0, started=False)
        return code

    async def _end(self, process: Process) -> None:
        """preStop, SIGTERM, and SIGKILL at the deadline: the pod's, or that of the probe that has failed."""
        ending = self._pod.ending
        if not ending.ordered:
            assert self._condemned is not None
            ending = Ending()
            ending.order(self._condemned.result())
            # An order to the pod counts as well from now on.
            follower = asyncio.create_task(_follow(self._pod.ending, ending))
        else:
            follower = None
        try:
            at_least_s = 0.0
            hook = self.spec.get("lifecycle", {}).get("preStop")
            if hook and ending.left_s > 0:
                gone = asyncio.create_task(process.wait())
                work = asyncio.create_task(self._run_hook("preStop", hook))
                await ending.until_deadline(asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED))
                for task in (gone, work):
                    task.cancel()
                at_least_s = _MINIMUM_GRACE_S
            if ending.left_s > 0 or at_least_s:
                process.signal(signal.SIGTERM)
                await ending.until_deadline(process.wait(), at_least_s)
            process.signal(signal.SIGKILL)
            await process.wait()
        finally:
            if follower is not None:
                follower.cancel()

    async def _post_start(self) -> None:
        hook = self.spec.get("lifecycle", {}).get("postStart")
        if hook and not await self._run_hook("postStart", hook):
            self._condemn(self._grace_s)

    async def _run_hook(self, kind: str, hook: Json) -> bool:
        fault = await self._hooks.succeeds(hook, None)
        if fault is not None:
            log.warning("%s: the %s hook failed: %s", self._title, kind, fault)
        return fault is None

    def _start_probes(self) -> list[asyncio.Task[None]]:
        passed = asyncio.Event()
        if "startupProbe" not in self.spec:
            passed.set()
        return [
            asyncio.create_task(self._probe(kind, self.spec[kind], passed), name=kind)
            for kind in ("startupProbe", "readinessProbe", "livenessProbe")
            if kind in self.spec
        ]

    async def _probe(self, kind: str, probe: Json, startup_passed: asyncio.Event) -> None:
        """Ask until the container ends, or, for the startup probe, until it has succeeded once."""
        ready_s = asyncio.get_running_loop().time() + probe.get("initialDelaySeconds", 0)
        if kind != "startupProbe":
            await startup_passed.wait()
        await asyncio.sleep(max(0.0, ready_s - asyncio.get_running_loop().time()))
        good = bad = 0
        while True:
            fault = await self._actions.succeeds(probe, probe.get("timeoutSeconds", 1))
            good, bad = (good + 1, 0) if fault is None else (0, bad + 1)
            if good >= probe.get("successThreshold", 1):
                if kind == "startupProbe":
                    self._set(started=True, ready="readinessProbe" not in self.spec)
                    startup_passed.set()
                    return
                if kind == "readinessProbe" and not self.state.ready:
                    self._set(ready=True)
            if bad >= probe.get("failureThreshold", 3):
                if kind == "readinessProbe":
                    if self.state.ready:
                        log.info("%s is no longer ready: %s", self._title, fault)
                        self._set(ready=False)
                else:
                    log.info("%s is ended by its %s: %s", self._title, kind, fault)
                    self._condemn(probe.get("terminationGracePeriodSeconds", self._grace_s))
                    return
            await asyncio.sleep(probe.get("periodSeconds", 10))

    def _condemn(self, grace_s: float) -> None:
        if self._condemned is not None and not self._condemned.done():
            self._condemned.set_result(grace_s)


async def _follow(order: Ending, follower: Ending) -> None:
    await order.wait()
    follower.order(order.left_s)


def _last_words(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LAST_WORDS_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""

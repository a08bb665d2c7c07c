"""Real workers and real routers on loopback addresses, without Kubernetes: what their pods would start, started here.

    async with DataPlane(forks, folder, "facebook/opt-13b", weights) as plane:
        await plane.worker("prefill")
        await plane.worker("decode")
        router = await plane.router()
        …  requests to router.url
        await plane.quiet()

Routers find their instances by listing and watching pods, as they do in a cluster; `Pods` stands in for the API server, and
can be away. For tests and benchmarks of the data plane: seconds, where a control plane takes a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp
from aiohttp import web

from disaggserve import metric_names as names
from e2e.nodes.addresses import Addresses
from e2e.nodes.processes import WORKER_MODULES, ForkServerClient, Process

Json = dict[str, Any]
Role = Literal["prefill", "decode", "mixed"]

PORT, KV_PORT = 8000, 5600
PATIENCE_S = 60.0
NAMESPACE, RESOURCE = "default", "chat"
_POLL_S = 0.02


class NotYet(AssertionError):
    """What was waited for did not come true in time."""


async def until(condition: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> None:
    """Asks `condition` (plain or awaitable) until it is true. It may say what is missing, as a string: that is false.

    Raises NotYet at the deadline, with what it said last.
    """
    clock = asyncio.get_running_loop().time
    deadline_s = clock() + within_s
    while True:
        said = condition()
        if asyncio.iscoroutine(said):
            said = await said
        if said and not isinstance(said, str):
            return
        if clock() > deadline_s:
            raise NotYet(f"not within {within_s:g} s: {what}; {said!r}")
        await asyncio.sleep(_POLL_S)


@contextlib.asynccontextmanager
async def fork_server(folder: Path) -> AsyncIterator[ForkServerClient]:
    """A process that has imported torch and the worker's modules: what it forks serves within a second."""
    forks = await ForkServerClient.start(folder / "forkserver.log", WORKER_MODULES)
    try:
        yield forks
    finally:
        await forks.close()


class Pods:
    """What an API server says of one resource's pods: a list and a watch. Nothing else, and nobody is refused."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._pods: dict[str, Json] = {}
        self._events: list[Json] = []  # event k has resourceVersion k + 1
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://{self._address}:{PORT}"

    def put(self, pod: Json) -> None:
        """Creates or changes a pod."""
        kind = "MODIFIED" if pod["metadata"]["uid"] in self._pods else "ADDED"
        self._record(kind, pod)
        self._pods[pod["metadata"]["uid"]] = self._events[-1]["object"]

    def remove(self, uid: str) -> None:
        """The pod is gone; harmless when it was."""
        if pod := self._pods.pop(uid, None):
            self._record("DELETED", pod)

    def _record(self, kind: str, pod: Json) -> None:
        version = str(len(self._events) + 1)
        metadata = {**pod["metadata"], "resourceVersion": version}
        self._events.append({"type": kind, "object": {**pod, "metadata": metadata}})
        self._changed.set()
        self._changed = asyncio.Event()

    async def up(self) -> None:
        """Listens from now on; what has changed meanwhile is told to who asks from where it was."""
        app = web.Application()
        app.router.add_get(f"/api/v1/namespaces/{NAMESPACE}/pods", self._answer)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._address, PORT).start()

    async def down(self) -> None:
        """Refuses connections and has ended those that were open."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        version = str(len(self._events))
        if "watch" not in http.query:
            return web.json_response(
                {"metadata": {"resourceVersion": version}, "items": list(self._pods.values())}
            )
        told = int(http.query["resourceVersion"])
        answer = web.StreamResponse()
        await answer.prepare(http)
        while True:
            if told == len(self._events):
                await self._changed.wait()
            await answer.write(json.dumps(self._events[told]).encode() + b"\n")
            told += 1


@dataclasses.dataclass(eq=False)
class Member:
    """One process and the pod that it would be in."""

    name: str
    role: str  # prefill, decode, router
    address: str
    process: Process
    argv: tuple[str, ...]
    ready: bool = False
    terminating: bool = False
    draining: bool = False
    epoch: int = 0

    @property
    def url(self) -> str:
        return f"http://{self.address}:{PORT}"

    @property
    def alive(self) -> bool:
        return self.process.running


class DataPlane:
    """Workers of one pairing key and the routers before them. All of them end with the block."""

    def __init__(
        self,
        forks: ForkServerClient,
        folder: Path,
        model: str,
        weights: Path,
        *flags: str,
        context_length: int = 2048,
    ) -> None:
        """`flags`: of every worker, beside the usual ones. Logs and the routers' kubeconfig go into `folder`."""
        self.model = model
        self._forks, self._folder, self._weights, self._flags = forks, folder, weights, flags
        self._context = context_length
        self._addresses = Addresses()
        self._numbers = itertools.count()
        self.members: list[Member] = []
        self.pods = Pods(self._addresses.take())
        self.session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        await self.pods.up()
        cluster = {"name": "c", "cluster": {"server": self.pods.url}}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [cluster],
            "users": [{"name": "u", "user": {"token": "t"}}],
        }
        (self._folder / "kubeconfig").write_text(json.dumps(config))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members:
            member.process.signal(signal.SIGKILL)
        for member in self.members:
            await member.process.wait()
        await self.pods.down()
        await self.session.close()

    # ---- who is there

    async def worker(self, role: Role, *flags: str, ready: bool = True) -> Member:
        """A new worker; ready, and known to the routers, on return (unless `ready` is false)."""
        argv = [role, "--model", self.model, "--weights", str(self._weights), "--pairing-key", "key"]
        argv += ["--context-length", str(self._context), "--port", str(PORT), "--kv-port", str(KV_PORT)]
        member = await self._start(role, [*argv, *self._flags, *flags])
        self.tell(member)
        if ready:
            await self.ready(member)
        return member

    async def router(self, *flags: str, address: str = "", wait: bool = True) -> Member:
        """A new router, which listens on return (unless `wait` is false)."""
        argv = ["router", "--namespace", NAMESPACE, "--resource", RESOURCE, "--model-name", self.model]
        argv += ["--context-length", str(self._context), "--ttft", "10", "--tpot", "10", "--port", str(PORT)]
        member = await self._start("router", [*argv, "--linger", "0.2", *flags], address)
        if wait:
            await until(lambda: self._answers(member, "/health"), f"{member.name} listens")
        return member

    def address(self) -> str:
        """A free address, for a router that does not run yet."""
        return self._addresses.take()

    async def ready(self, worker: Member) -> None:
        """When the worker serves; from then on the routers know."""
        await until(lambda: self._answers(worker, "/ready"), f"{worker.name} is ready")
        worker.ready = True
        self.tell(worker)

    async def restart(self, member: Member) -> None:
        """A killed one's process starts anew in the same pod, as by the kubelet. It is ready, or listens, on return."""
        member.process = await self._spawn(member.name, member.address, member.argv)
        if member.role == "router":
            await until(lambda: self._answers(member, "/health"), f"{member.name} listens")
        else:
            member.role, member.epoch = member.argv[0], 0  # it has forgotten that it was turned
            self.show(member, ready=False)
            await self.ready(member)

    async def _start(self, role: str, argv: Sequence[str], address: str = "") -> Member:
        name = f"{role}-{next(self._numbers)}"
        address = address or self._addresses.take()
        process = await self._spawn(name, address, argv)
        member = Member(name, role, address, process, tuple(argv))
        self.members.append(member)
        return member

    async def _spawn(self, name: str, address: str, argv: Sequence[str]) -> Process:
        environment = {
            **{key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ},
            "KUBECONFIG": str(self._folder / "kubeconfig"),
            "OMP_NUM_THREADS": "1",
            "POD_IP": address,
            "POD_NAME": name,
        }
        return await self._forks.spawn(
            ["disaggworker", *argv],
            env=environment,
            cwd=self._folder,
            log=self._folder / f"{name}.log",
            call="disaggworker.__main__:main",
        )

    def tell(self, worker: Member) -> None:
        """The pod's present state to whoever watches."""
        ready = "True" if worker.ready else "False"
        metadata: Json = {
            "uid": worker.name,
            "name": worker.name,
            "labels": {
                "disaggserve.dev/resource": RESOURCE,
                "disaggserve.dev/role": worker.role,
                "disaggserve.dev/pairing-key": "key",
            },
        }
        if worker.draining:
            metadata["labels"]["disaggserve.dev/drain"] = "true"
        if worker.terminating:
            metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        status = {
            "podIP": worker.address,
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": ready}],
        }
        container = {"name": "worker", "ports": [{"name": "http", "containerPort": PORT}]}
        self.pods.put({"metadata": metadata, "spec": {"containers": [container]}, "status": status})

    def show(self, worker: Member, *, ready: bool) -> None:
        """The routers hear that its readiness has changed; it goes on as it was."""
        worker.ready = ready
        self.tell(worker)

    async def kill(self, member: Member) -> None:
        """SIGKILL. The routers are told nothing: `forget` does."""
        member.process.signal(signal.SIGKILL)
        await member.process.wait()

    async def terminate(self, member: Member) -> int:
        """As the deletion of its pod: the routers hear of it, SIGTERM, and it is gone. The exit code."""
        member.terminating = True
        if member.role != "router":
            self.tell(member)
        member.process.signal(signal.SIGTERM)
        code = await member.process.wait()
        self.forget(member)
        return code

    async def turn(self, worker: Member, role: Role) -> None:
        """As the operator changes a role: no new requests, until nothing is held there; the worker's word; the label."""
        worker.draining = True
        self.tell(worker)
        worker.epoch += 1
        order = {"role": role, "epoch": worker.epoch}

        async def turned() -> bool | str:
            for router in self.alive("router"):
                said = (await self.json(router, "/drain"))["instances"].get(worker.name)
                if said is None or said["admitting"] or said["in_flight"] or said["leased"]:
                    return f"{router.name} says {said}"
            async with self.session.post(worker.url + "/role", json=order) as answer:
                return answer.status == 200 or await answer.text()

        await until(turned, f"{worker.name} is {role}")
        worker.role, worker.draining = role, False
        self.tell(worker)

    def forget(self, member: Member) -> None:
        """The pod is gone from the API server."""
        self.pods.remove(member.name)

    def alive(self, role: str) -> list[Member]:
        """Who runs, is ready (routers always are) and is not about to end."""
        return [
            m
            for m in self.members
            if m.role == role
            and m.alive
            and not m.terminating
            and not m.draining
            and (m.ready or role == "router")
        ]

    # ---- what they say

    async def sees(self, router: Member, ready: bool = True) -> bool:
        """Whether the router could serve (or, if not `ready`, could not)."""
        async with self.session.get(router.url + "/ready") as answer:
            return (answer.status == 200) is ready

    async def _answers(self, member: Member, path: str) -> bool:
        if not member.alive:
            log = self._folder / f"{member.name}.log"
            raise NotYet(f"{member.name} has ended: {log.read_text(errors='replace')[-2000:]}")
        with contextlib.suppress(aiohttp.ClientError):
            async with self.session.get(member.url + path) as answer:
                return answer.status == 200
        return False

    async def until_sees(self, router: Member, ready: bool = True) -> None:
        """When `sees` is true."""
        await until(lambda: self.sees(router, ready), f"{router.name} sees instances: {ready}")

    async def json(self, member: Member, path: str) -> Json:
        """A GET of JSON."""
        async with self.session.get(member.url + path) as answer:
            found: Json = await answer.json()
            return found

    async def metric(self, member: Member, name: str, **labels: str) -> float:
        """The sum of a counter's or gauge's series with these labels."""
        async with self.session.get(member.url + "/metrics") as answer:
            text = await answer.text()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [
            line
            for line in text.splitlines()
            if line.startswith(name + "{") and all(w in line for w in wanted)
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    async def outcomes(self) -> dict[str, int]:
        """Requests of all living routers by outcome, those with none left out."""
        found = {
            outcome: sum(
                [
                    await self.metric(router, names.ROUTER_REQUESTS, outcome=outcome)
                    for router in self.alive("router")
                ]
            )
            for outcome in names.OUTCOMES
        }
        return {outcome: int(count) for outcome, count in found.items() if count}

    async def quiet(self, within_s: float = PATIENCE_S) -> None:
        """When nothing is held any more: no request by a living router, no KV block on a living worker. Raises NotYet."""
        await until(self._quiet, "nothing is held", within_s)

    async def _quiet(self) -> bool | str:
        for router in self.alive("router"):
            instances = (await self.json(router, "/drain"))["instances"]
            if held := {i["name"]: i for i in instances.values() if i["in_flight"] or i["leased"]}:
                return f"{router.name} holds {held}"
            if queued := await self.metric(router, names.ROUTER_QUEUED):
                return f"{router.name} queues {queued:g}"
        for worker in [m for m in self.members if m.role != "router" and m.alive and m.ready]:
            state = await self.json(worker, "/state")
            if state["free_blocks"] != state["total_blocks"] or state["waiting"] or state["running"]:
                return f"{worker.name} is at {state}"
        return True

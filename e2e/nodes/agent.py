"""The agent: every simulated node of one topology, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from e2e.nodes.addresses import Addresses
from e2e.nodes.api import MERGE, Api
from e2e.nodes.errors import AgentError, ApiError, NodesError, OrderError
from e2e.nodes.host import Host, Place
from e2e.nodes.images import Image
from e2e.nodes.kubelet import PORT, serve_logs
from e2e.nodes.pod import Pod
from e2e.nodes.processes import ForkServerClient
from e2e.nodes.registration import is_ready, register, renew_lease, report_ready
from e2e.nodes.topology import SimulatedNode

Json = dict[str, Any]

_EVICTION_RETRY_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the agent is told when it starts."""

    kubeconfig: Path
    nodes: tuple[SimulatedNode, ...]
    folder: Path
    images: Mapping[str, Image]
    host_paths: Mapping[str, Path] = field(default_factory=dict)
    heartbeat_s: float = 2.0
    cold_start_s: float = 0.0
    preload: bool = False


@dataclass
class _Node:
    place: Place
    failed: bool = False

    @property
    def name(self) -> str:
        return self.place.node.name


class Agent:
    """Use as an async context manager: the nodes are registered on entry, everything has ended after exit."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._nodes: dict[str, _Node] = {}
        self._objects: dict[str, Json] = {}
        """Pods bound to our nodes as the API has them, by uid, on failed nodes too."""
        self._pods: dict[str, Pod] = {}
        self._version = ""
        self._fault: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._background: set[asyncio.Task[None]] = set()
        self._exits = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as exits:
            settings = self._settings
            exits.callback(os.close, _claim(settings.folder))
            # What an agent that was killed has left there.
            shutil.rmtree(settings.folder / "pods", ignore_errors=True)
            exits.callback(shutil.rmtree, settings.folder / "pods", ignore_errors=True)
            for folder in ("logs", "pods", "models"):
                (settings.folder / folder).mkdir(mode=0o700, exist_ok=True)
            self._api = await exits.enter_async_context(Api(settings.kubeconfig))
            self._session = await exits.enter_async_context(
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
            )
            addresses = Addresses()
            self._host = Host(
                api=self._api,
                folder=settings.folder,
                addresses=addresses,
                session=self._session,
                plain=await ForkServerClient.start(settings.folder / "forkserver.log"),
                images=settings.images,
                host_paths=settings.host_paths,
                cold_start_s=settings.cold_start_s,
                failed=self._fail,
            )
            exits.push_async_callback(self._host.close)
            exits.push_async_callback(self._abandon, lambda pod: True)
            self._host.plain.ended.add_done_callback(
                lambda _: self._fail("the fork server has ended: see forkserver.log")
            )
            if settings.preload:
                await self._host.workers()
            for index, node in enumerate(settings.nodes):
                self._nodes[node.name] = _Node(Place(node, addresses.node(index)))
            try:
                self._version = (await self._api.get("/version"))["gitVersion"]
                await asyncio.gather(*(self._register(node) for node in self._nodes.values()))
            except (ApiError, aiohttp.ClientError, OSError) as error:
                raise AgentError(f"the nodes cannot be registered at {self._api.server}: {error}") from error
            bound = {"fieldSelector": "spec.nodeName!="}
            for name, work in (
                ("heartbeats", self._beat()),
                (
                    "watch of pods",
                    self._api.follow("/api/v1/pods", bound, self._list_pods, self._pod_event),
                ),
                (
                    "watch of nodes",
                    self._api.follow("/api/v1/nodes", {}, self._list_nodes, self._node_event),
                ),
                ("log server", self._serve_logs()),
            ):
                task = asyncio.create_task(work, name=name)
                task.add_done_callback(self._report_fault)
                exits.callback(task.cancel)
            self._exits = exits.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # No status any more: the processes end with the fork servers, as those of a node that loses power.
        await self._exits.aclose()

    async def run(self) -> None:
        """Until cancelled. Raises AgentError when the agent cannot go on."""
        raise AgentError(await self._fault)

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self._nodes)

    # Orders.

    async def fail(self, node: str) -> None:
        """The node loses power: no heartbeats, its processes die, its pods' statuses stay as they were."""
        lost = self._node(node)
        lost.failed = True
        await self._abandon(lambda pod: pod.on(node))

    async def recover(self, node: str) -> None:
        """The node is back: it says so, and what is still bound to it starts anew."""
        found = self._node(node)
        if not found.failed:
            raise OrderError(f"node {node} has not failed")
        found.failed = False
        await self._register(found)
        for pod in list(self._objects.values()):
            if pod["spec"]["nodeName"] == node:
                self._take(pod)

    async def drain(self, node: str, timeout_s: float) -> None:
        """Cordon the node and evict its pods, as `kubectl drain`; on return they are gone.

        Raises OrderError with the last refusal (a PodDisruptionBudget's, say) at the deadline.
        """
        self._node(node)
        await self._cordon(node, True)
        refused = ""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    left = [pod for pod in self._objects.values() if pod["spec"]["nodeName"] == node]
                    if not left:
                        return
                    for pod in left:
                        if "deletionTimestamp" not in pod["metadata"]:
                            refused = await self._evict(pod["metadata"]) or refused
                    await asyncio.sleep(_EVICTION_RETRY_S)
        except TimeoutError:
            raise OrderError(
                f"node {node} was not drained within {timeout_s:g} s{': ' if refused else ''}{refused}"
            ) from None

    async def uncordon(self, node: str) -> None:
        """Pods may be scheduled there again."""
        self._node(node)
        await self._cordon(node, False)

    def crash(self, pod: str, namespace: str, container: str | None) -> list[str]:
        """SIGKILL to a pod's processes, or one container's; the containers that were hit."""
        found = self._find(namespace, pod)
        killed = found.crash(container) if found is not None else []
        if not killed:
            raise OrderError(f"no process of pod {namespace}/{pod} runs here")
        return killed

    def pods(self) -> list[Json]:
        """Every pod that lives here, with its address and processes."""
        return [pod.to_json() for pod in self._pods.values()]

    # Nodes.

    def _node(self, name: str) -> _Node:
        if name not in self._nodes:
            raise OrderError(f"there is no node {name}; there are {', '.join(self._nodes)}")
        return self._nodes[name]

    async def _register(self, node: _Node) -> None:
        await register(self._api, node.place.node, node.place.address, self._version, PORT)

    async def _beat(self) -> None:
        while True:
            for node in self._nodes.values():
                if not node.failed:
                    try:
                        await renew_lease(self._api, node.name)
                    except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as error:
                        log.warning("heartbeat of %s: %s", node.name, error or type(error).__name__)
            await asyncio.sleep(self._settings.heartbeat_s)

    def _list_nodes(self, nodes: list[Json]) -> None:
        for node in nodes:
            self._node_event("ADDED", node)

    def _node_event(self, kind: str, node: Json) -> None:
        ours = self._nodes.get(node["metadata"]["name"])
        if ours is None or ours.failed or kind == "DELETED" or is_ready(node):
            return
        # A heartbeat was late and the node controller gave the node up: it lives, so say so.
        task = asyncio.create_task(self._report_ready(ours), name=f"readiness of {ours.name}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _report_ready(self, node: _Node) -> None:
        try:
            await report_ready(self._api, node.place.node, node.place.address, self._version, PORT)
        except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as error:
            log.warning("readiness of %s: %s", node.name, error or type(error).__name__)

    async def _serve_logs(self) -> None:
        addresses = {node.name: node.place.address for node in self._nodes.values()}
        try:
            await serve_logs(self._api, addresses, self._find)
        except (NodesError, aiohttp.ClientError, OSError, TimeoutError) as error:
            # A convenience: the logs are in files, which is what tests and the demo read.
            log.warning("kubectl logs will not work: %s", error or type(error).__name__)

    async def _cordon(self, node: str, cordoned: bool) -> None:
        try:
            await self._api.patch(f"/api/v1/nodes/{node}", {"spec": {"unschedulable": cordoned}}, MERGE)
        except ApiError as error:
            raise OrderError(str(error)) from error

    async def _evict(self, metadata: Json) -> str:
        """The refusal, or "" when the eviction was granted."""
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
            "deleteOptions": {"preconditions": {"uid": metadata["uid"]}},
        }
        try:
            await self._api.post(f"{path}/eviction", body)
        except ApiError as error:
            return "" if error.status in (404, 409) else str(error)
        return ""

    # Pods.

    def _list_pods(self, pods: list[Json]) -> None:
        present = {pod["metadata"]["uid"] for pod in pods}
        for uid in [uid for uid in self._objects if uid not in present]:
            self._pod_event("DELETED", self._objects[uid])
        for pod in pods:
            self._pod_event("MODIFIED", pod)

    def _pod_event(self, kind: str, pod: Json) -> None:
        uid, node = pod["metadata"]["uid"], self._nodes.get(pod["spec"].get("nodeName", ""))
        if node is None:
            return
        if kind == "DELETED":
            self._objects.pop(uid, None)
            gone = self._pods.pop(uid, None)
            if gone is not None:
                gone.gone()
            return
        self._objects[uid] = pod
        if not node.failed:
            self._take(pod)

    async def _abandon(self, lost: Callable[[Pod], bool]) -> None:
        here = [pod for pod in self._pods.values() if lost(pod)]
        await asyncio.gather(*(pod.abandon() for pod in here))
        for pod in here:
            self._pods.pop(pod.uid, None)

    def _find(self, namespace: str, name: str) -> Pod | None:
        # The newest of that name: an older one may still be on its way out of here.
        here = [pod for pod in self._pods.values() if (pod.namespace, pod.name) == (namespace, name)]
        return here[-1] if here else None

    def _take(self, pod: Json) -> None:
        uid = pod["metadata"]["uid"]
        known = self._pods.get(uid)
        if known is not None:
            known.update(pod)
            return
        place = self._nodes[pod["spec"]["nodeName"]].place
        self._pods[uid] = Pod(self._host, place, pod, lambda: self._used(place.node.name, uid))

    def _used(self, node: str, but: str) -> dict[str, Fraction]:
        """What the pods on a node take of its resources, but for one of them."""
        used: dict[str, Fraction] = {}
        for pod in self._pods.values():
            if pod.on(node) and pod.uid != but and pod.counts:
                for name, amount in pod.requests.items():
                    used[name] = used.get(name, Fraction(0)) + amount
        return used

    # Faults.

    def _fail(self, sentence: str) -> None:
        log.error("%s", sentence)
        if not self._fault.done():
            self._fault.set_result(sentence)

    def _report_fault(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("%s", task.get_name(), exc_info=task.exception())
            self._fail(f"the {task.get_name()} met a fault of the agent's own")


def _claim(folder: Path) -> int:
    """Hold the folder against other agents, until the descriptor is closed. Raises AgentError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise AgentError(f"other simulated nodes run in {folder}") from None
    return lock

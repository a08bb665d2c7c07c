"""kopf's handlers only wake; the queue sees to it that each resource is reconciled by one task at a time.

`on.event` handlers add no finalizer and no annotation: kopf writes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import BrokenExecutor
from typing import Any

import kopf

from disaggserve.api import manifest
from disaggserve.api.plan import digest
from disaggserve.cluster import metrics, settings
from disaggserve.cluster.client import ApiError
from disaggserve.manifests import RESOURCE

log = logging.getLogger(__name__)
Key = tuple[str, str]
_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_GATHER_S = 0.1


class Queue:
    """Wakes per (namespace, name); a resource that nothing wakes is looked at again after what its last reconcile asked for."""

    def __init__(self, reconcile: Callable[[str, str], Awaitable[float | None]]) -> None:
        self._reconcile = reconcile
        self._wakes: dict[Key, asyncio.Event] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}

    def wake(self, key: Key) -> None:
        if key not in self._tasks:
            self._wakes[key] = asyncio.Event()
            self._tasks[key] = asyncio.create_task(self._serve(key), name="/".join(key))
        self._wakes[key].set()

    def wake_all(self) -> None:
        for wake in self._wakes.values():
            wake.set()

    async def close(self) -> None:
        """Ends every task where it stands: what it did is right, and the next leader goes on from there."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, key: Key) -> None:
        failures = 0
        while True:
            self._wakes[key].clear()
            try:
                again_s = await self._reconcile(*key)
                metrics.RECONCILES.labels("ok").inc()
                failures = 0
            except ApiError as error:
                metrics.RECONCILES.labels("api_error").inc()
                again_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                failures += 1
                log.warning("%s/%s: %s; again in %.0f s", *key, error, again_s)
            except BrokenExecutor:
                metrics.RECONCILES.labels("search_died").inc()
                again_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                failures += 1
                log.warning(
                    "%s/%s: the search process died (is its memory limit too low?); again in %.0f s",
                    *key,
                    again_s,
                )
            except (
                Exception
            ):  # a defect of ours with one resource must not stop the others: say it, count it, go on
                metrics.RECONCILES.labels("defect").inc()
                again_s = _BACKOFF_S[-1]
                log.exception("%s/%s: defect in reconcile; again in %.0f s", *key, again_s)
            if again_s is None:
                del self._tasks[key], self._wakes[key]
                return
            try:
                async with asyncio.timeout(again_s):
                    await self._wakes[key].wait()
                await asyncio.sleep(
                    _GATHER_S
                )  # a rollout's pods change together: one reconcile for all of them
            except TimeoutError:
                pass


def _shape_of(node: dict[str, Any]) -> str:
    """Digest of what placement reads of a node: heartbeats change nothing in it."""
    conditions = [
        (c["type"], c["status"]) for c in node.get("status", {}).get("conditions", ()) if c["type"] == "Ready"
    ]
    return digest(
        [
            node["metadata"].get("labels"),
            node.get("spec", {}).get("unschedulable"),
            [(t["key"], t.get("value"), t["effect"]) for t in node.get("spec", {}).get("taints", ())],
            node.get("status", {}).get("allocatable"),
            conditions,
        ]
    )


def registry(queue: Queue) -> kopf.OperatorRegistry:
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        if settings.kubeconfig():
            return kopf.login_with_kubeconfig(**kwargs)
        return kopf.login_with_service_account(**kwargs)

    nodes: dict[str, str] = {}

    @kopf.on.event(manifest.GROUP, manifest.VERSION, manifest.PLURAL, registry=handlers)
    async def resource(namespace: str | None, name: str | None, **_: Any) -> None:
        queue.wake((str(namespace), str(name)))

    @kopf.on.event("v1", "pods", labels={RESOURCE: kopf.PRESENT}, registry=handlers)
    async def pod(namespace: str | None, labels: kopf.Labels, **_: Any) -> None:
        queue.wake((str(namespace), labels[RESOURCE]))

    @kopf.on.event("v1", "nodes", registry=handlers)
    async def node(name: str | None, event: kopf.RawEvent, **_: Any) -> None:
        now = "" if event["type"] == "DELETED" else _shape_of(dict(event["object"]))
        if nodes.get(str(name)) != now:
            nodes[str(name)] = now
            queue.wake_all()

    return handlers

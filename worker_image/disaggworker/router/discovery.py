"""Who the instances are: pods of this resource, listed and watched. Level-triggered: every change gives the whole view.

When the API server is away, the last view stays: requests go on being served.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, cast, get_args

import aiohttp
from kubernetes.aio import client as k8s
from kubernetes.aio import config as k8s_config
from kubernetes.aio.client.rest import ApiException
from kubernetes.aio.config.config_exception import ConfigException
from kubernetes.aio.dynamic import DynamicClient
from kubernetes.aio.dynamic.exceptions import DynamicApiError

from disaggworker.router.fleet import Role, Seen

log = logging.getLogger(__name__)
Json = Mapping[str, Any]

RESOURCE = "disaggserve.dev/resource"
ROLE = "disaggserve.dev/role"
PAIRING_KEY = "disaggserve.dev/pairing-key"
DRAIN = "disaggserve.dev/drain"
ENGINE = "disaggserve.dev/engine"
PAIR = "pair"  # a role of pods: a prefill and a decode instance, each at the port of that name

_WATCH_S = 60  # the server ends a watch after so long; the client gives up on a silent one a little later
_BACKOFF_FIRST_S, _BACKOFF_MOST_S = 0.2, 5.0
_UNREACHABLE = (aiohttp.ClientError, ApiException, DynamicApiError, ConfigException, OSError, TimeoutError)


class Expired(Exception):
    """The API server no longer knows the version to watch from: list again."""


def seen(pod: Json) -> tuple[Seen, ...]:
    """The instance that a pod is, or both of a pair; none of a pod that is something else or has no address yet."""
    meta, status = pod["metadata"], pod.get("status") or {}
    labels = meta.get("labels") or {}
    role, address = labels.get(ROLE), status.get("podIP")
    if role not in (*get_args(Role), PAIR) or not address or status.get("phase") in ("Succeeded", "Failed"):
        return ()
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or ())
    host = f"[{address}]" if ":" in address else address
    ports = _ports(pod)

    def instance(role: Role, port: int, pair: str = "") -> Seen:
        return Seen(
            uid=f"{pair}/{role}" if pair else meta["uid"],
            name=meta["name"],
            role=role,
            pairing_key=labels.get(PAIRING_KEY, ""),
            url=f"http://{host}:{port}",
            ready=ready and not meta.get("deletionTimestamp"),
            draining=labels.get(DRAIN) == "true",
            engine=labels.get(ENGINE, "torch"),
            pair=pair,
        )

    if role != PAIR:
        return (instance(cast(Role, role), ports.get("http", 8000)),)
    halves: tuple[Role, Role] = ("prefill", "decode")
    if not ports.keys() >= set(halves):
        return ()
    return tuple(instance(half, ports[half], meta["uid"]) for half in halves)


def _ports(pod: Json) -> dict[str, int]:
    """By name."""
    containers = (pod.get("spec") or {}).get("containers") or ()
    ports = [port for container in containers for port in container.get("ports") or ()]
    return {port["name"]: int(port["containerPort"]) for port in ports if port.get("name")}


async def connect() -> k8s.ApiClient:
    """KUBECONFIG, else the pod's service account. Raises ConfigException."""
    configuration = k8s.Configuration()
    if file := os.environ.get("KUBECONFIG"):
        await k8s_config.load_kube_config(file, client_configuration=configuration)
    else:
        k8s_config.load_incluster_config(client_configuration=configuration)
    return k8s.ApiClient(configuration)


class Discovery:
    """Calls `changed` with the whole view whenever it may have changed."""

    def __init__(self, namespace: str, resource: str, changed: Callable[[Iterable[Seen]], None]) -> None:
        self._path = f"/api/v1/namespaces/{namespace}/pods"
        self._selector = f"{RESOURCE}={resource},{ROLE} in ({','.join((*get_args(Role), PAIR))})"
        self._changed = changed
        self._pods: dict[str, Json] = {}

    async def run(self) -> None:
        """Until cancelled."""
        backoff_s = _BACKOFF_FIRST_S
        while True:
            try:
                # A new client after each failure: a service account's token on disk may be a new one.
                async with await connect() as api:
                    dynamic = DynamicClient(api)
                    while True:
                        version = await self._list(dynamic)
                        backoff_s = _BACKOFF_FIRST_S
                        try:
                            while True:
                                version = await self._watch(dynamic, version)
                        except Expired:
                            continue
            except (*_UNREACHABLE, ValueError, KeyError) as error:
                said = " ".join(str(error).split())[:200] or type(error).__name__
                log.warning("the view of %d pods stays as it is: %s", len(self._pods), said)
                await asyncio.sleep(backoff_s)
                backoff_s = min(_BACKOFF_MOST_S, backoff_s * 2)

    async def _list(self, dynamic: DynamicClient) -> str:
        response = await dynamic.request(
            "get", self._path, label_selector=self._selector, serialize=False, _request_timeout=30
        )
        answer: Any = await response.json()
        self._pods = {pod["metadata"]["uid"]: pod for pod in answer["items"]}
        self._tell()
        return str(answer["metadata"]["resourceVersion"])

    async def _watch(self, dynamic: DynamicClient, version: str) -> str:
        """One watch to its end; the version to go on from."""
        response = await dynamic.request(
            "get",
            self._path,
            label_selector=self._selector,
            resource_version=version,
            watch=True,
            timeout_seconds=_WATCH_S,
            serialize=False,
            _request_timeout=_WATCH_S + 15,
        )
        try:
            async for line in _lines(response):
                event = json.loads(line)
                kind, pod = event["type"], event["object"]
                if kind == "ERROR":
                    if pod.get("code") == 410:
                        raise Expired
                    raise ValueError(f"the watch ended with {pod.get('message')}")
                version = str(pod["metadata"]["resourceVersion"])
                self.take(kind, pod)
        except ApiException as error:
            if error.status == 410:
                raise Expired from error
            raise
        finally:
            response.close()
        return version

    def take(self, kind: str, pod: Json) -> None:
        """One event of a watch."""
        uid = pod["metadata"]["uid"]
        if kind == "DELETED":
            self._pods.pop(uid, None)
        elif kind in ("ADDED", "MODIFIED"):
            self._pods[uid] = pod
        self._tell()

    def _tell(self) -> None:
        self._changed([s for pod in self._pods.values() for s in seen(pod)])


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Lines of any length; the reader's own `readline` refuses long ones."""
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line

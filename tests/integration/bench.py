"""A bench for the operator: a real API server and scheduler, nodes that are objects only, and a stand-in for the kubelet that
marks pods Ready, with small servers for what they say of themselves where a test asks for `doors`. What the data plane does is
tested elsewhere; here every write of the operator counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from kubernetes.aio.client import ApiClient
from kubernetes.aio.dynamic import DynamicClient
from kubernetes.aio.dynamic.exceptions import NotFoundError

from disaggserve import drift
from disaggserve.cluster.client import PODS, RESOURCES, Cluster, Kind, condition, connect
from disaggserve.cluster.clock import WallClock
from disaggserve.cluster.reconcile import Reconciler
from disaggserve.cluster.settings import Settings
from disaggserve.manifests import Images
from e2e.controlplane import ControlPlane
from e2e.controlplane.polling import wait_until
from tests.integration.doors import Doors

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]

CHAT: Json = {
    "apiVersion": "disaggserve.dev/v1alpha1",
    "kind": "DisaggServe",
    "metadata": {"name": "chat", "namespace": "default"},
    "spec": {
        "model": {"id": "facebook/opt-13b"},
        "slo": {"ttft": "250ms", "tpot": "100ms"},
        "workload": {"rate": 5, "lengths": {"preset": "sharegpt", "inputScale": 0.333}},
        "hardware": {"maxGPUs": 16},
        "engine": {"type": "torch"},
        "replan": {"mode": "Off"},
    },
}


def by_hand(prefill: int, decode: int, **more: Any) -> Json:
    """The resource with a plan by hand of so many tp 1 instances."""
    roles = [
        {"role": "prefill", "tp": 1, "pp": 1, "count": prefill},
        {"role": "decode", "tp": 1, "pp": 1, "count": decode},
    ]
    return {**CHAT, "spec": {**CHAT["spec"], "plan": {"roles": roles}, **more}}


def node(name: str, gpus: int) -> Json:
    resources = {"cpu": "64", "memory": "512Gi", "pods": "110", "nvidia.com/gpu": str(gpus), "rdma/hca": "8"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {
                "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB",
                "nvidia.com/gpu.memory": "81920",
                "feature.node.kubernetes.io/rdma.capable": "true",
                "feature.node.kubernetes.io/rdma.available": "true",
                "disaggserve.dev/simulated": "true",
            },
        },
        "status": {
            "capacity": resources,
            "allocatable": resources,
            "conditions": [{"type": "Ready", "status": "True", "reason": "Bench", "message": ""}],
        },
    }


def install_crd(plane: ControlPlane) -> None:
    plane.kubectl("apply", "-f", str(ROOT / "crds/disaggserves.yaml"))

    def established() -> bool:  # `kubectl wait` fails on an object that has no conditions yet
        found = json.loads(plane.kubectl("get", "crd/disaggserves.disaggserve.dev", "-o", "json"))
        return (
            condition(found.get("status", {}).get("conditions") or [], "Established").get("status") == "True"
        )

    wait_until(established, "the CRD to be established", timeout_s=60)


def prepare(plane: ControlPlane, nodes: dict[str, int]) -> None:
    """The CRD, the router's ClusterRole and the nodes."""
    install_crd(plane)
    plane.kubectl("create", "clusterrole", "disaggserve-router", "--verb=get,list,watch", "--resource=pods")
    add_nodes(plane, nodes)


def add_nodes(plane: ControlPlane, nodes: dict[str, int]) -> None:
    """Nodes that are objects only, by name and GPUs; returns when pods may be bound to them."""
    for name, gpus in nodes.items():
        body = node(name, gpus)
        plane.kubectl("create", "-f", "-", input=json.dumps({k: v for k, v in body.items() if k != "status"}))
        plane.kubectl(
            "patch",
            "node",
            name,
            "--subresource=status",
            "--type=merge",
            "-p",
            json.dumps({"status": body["status"]}),
        )

    def usable() -> bool:
        listed = json.loads(plane.kubectl("get", "nodes", "-o", "json"))["items"]
        return not any(n["spec"].get("taints") for n in listed)

    wait_until(usable, "the nodes without taints", timeout_s=30)


class Killed(BaseException):
    """The operator's process ends here."""


class Operator:
    """One operator process: its own memory, and a fence that can end it before its n-th write from now."""

    def __init__(
        self,
        api: ApiClient,
        dies_before_write: int | None = None,
        warm: Callable[[], bool] = lambda: True,
        pool: Executor | None = None,
    ) -> None:
        self._left = dies_before_write
        self.writes = 0
        settings = Settings(
            namespace="default",
            identity="test",
            prometheus_url="",
            images=Images("disaggserve-worker", "disaggserve-router"),
        )
        pool = pool or ThreadPoolExecutor(1)
        self._reconciler = Reconciler(Cluster(api, self._fence), settings, WallClock(), pool, warm)

    def _fence(self) -> None:
        if self._left is not None and self.writes >= self._left:
            raise Killed
        self.writes += 1

    def sees(self, traffic: drift.Traffic) -> None:
        """From now on Prometheus tells this."""

        class Told:
            async def read(self, *_: object) -> drift.Traffic:
                return traffic

        self._reconciler._traffic = Told()  # type: ignore[assignment]

    def before_patch(self, act: Callable[[str, Json], Awaitable[None]]) -> None:
        """From now on `act(pod's name, patch)` comes between the look at a pod and each patch of it."""
        cluster = self._reconciler._cluster
        merge = cluster.merge

        async def late(
            kind: Kind, namespace: str, name: str, body: Json, subresource: str | None = None
        ) -> None:
            if kind is PODS:
                await act(name, body)
            await merge(kind, namespace, name, body, subresource)

        cluster.merge = late  # type: ignore[method-assign]

    async def reconcile(self, name: str = "chat") -> float | None:
        return await self._reconciler.reconcile("default", name)


class Bench:
    """What a test does and sees. Every wait is for a condition, with a deadline."""

    def __init__(self, api: ApiClient) -> None:
        self.api = api
        self.cluster = Cluster(api)
        self._kubelet = DynamicClient(api)
        self.doors: Doors | None = None

    @classmethod
    async def open(cls, plane: ControlPlane) -> Bench:
        return cls(await connect(str(plane.kubeconfig)))

    def open_doors(self) -> Doors:
        """From now on pods have addresses of their own, and answer there."""
        self.doors = Doors(self.workers)
        return self.doors

    async def close(self) -> None:
        if self.doors is not None:
            await self.doors.close()
        await self.api.close()

    def operator(
        self,
        dies_before_write: int | None = None,
        warm: Callable[[], bool] = lambda: True,
        pool: Executor | None = None,
    ) -> Operator:
        return Operator(self.api, dies_before_write, warm, pool)

    async def apply(self, body: Json) -> None:
        await self.cluster.apply(RESOURCES, body)

    async def delete(self, name: str = "chat") -> None:
        found = await self.cluster.get(RESOURCES, "default", name)
        assert found is not None
        await self.cluster.delete(RESOURCES, "default", name, found["metadata"]["uid"])

    async def resource(self, name: str = "chat") -> Json:
        found = await self.cluster.get(RESOURCES, "default", name)
        assert found is not None
        return found

    async def workers(self, name: str = "chat") -> list[Json]:
        labels = f"disaggserve.dev/resource={name},app.kubernetes.io/component=worker"
        return sorted(
            await self.cluster.list(PODS, "default", labels=labels), key=lambda p: str(p["metadata"]["name"])
        )

    async def vanish(self, pod: str) -> None:
        """The pod is gone at once, as with its node."""
        await self._kubelet.request(
            "delete", PODS.path("default", pod), {"gracePeriodSeconds": 0}, serialize=False
        )

    async def kubelet(self) -> None:
        """One round: what is bound runs and is Ready; what terminates goes."""
        for pod in await self.cluster.list(PODS):
            metadata, path = pod["metadata"], PODS.path(pod["metadata"]["namespace"], pod["metadata"]["name"])
            if "deletionTimestamp" in metadata:
                with suppress(NotFoundError):  # the garbage collector was first
                    await self._kubelet.request("delete", path, {"gracePeriodSeconds": 0}, serialize=False)
            elif pod["spec"].get("nodeName") and not any(
                c["type"] == "Ready" for c in pod["status"].get("conditions", ())
            ):
                status = {
                    "phase": "Running",
                    "podIP": await self.doors.open(pod) if self.doors else "127.0.0.1",
                    "conditions": [*pod["status"].get("conditions", ()), {"type": "Ready", "status": "True"}],
                }
                await self._kubelet.request(
                    "patch",
                    path + "/status",
                    {"status": status},
                    content_type="application/merge-patch+json",
                    serialize=False,
                )

    async def settle(
        self,
        operator: Operator,
        name: str = "chat",
        *,
        until: Callable[[Json], bool] | None = None,
        rounds: int = 200,
    ) -> Json:
        """Reconciles and lets the kubelet work until the plan is carried out, or `until` holds."""
        for _ in range(rounds):
            await operator.reconcile(name)
            await self.kubelet()
            resource = await self.resource(name)
            if (until or carried_out)(resource):
                return resource
            await asyncio.sleep(0.02)
        raise AssertionError(f"not settled: {json.dumps(resource.get('status', {}), indent=1)[:3000]}")


def carried_out(resource: Json) -> bool:
    conditions = {c["type"]: c for c in resource.get("status", {}).get("conditions", ())}
    progressing = conditions.get("Progressing", {})
    return bool(
        progressing.get("reason") == "Complete"
        and progressing.get("observedGeneration") == resource["metadata"]["generation"]
    )

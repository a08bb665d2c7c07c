"""The Node object of a simulated node, and the signs of life that keep it Ready."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from e2e.nodes.api import MERGE, STRATEGIC, Api
from e2e.nodes.clock import now, now_micro
from e2e.nodes.errors import ApiError
from e2e.nodes.topology import SimulatedNode

Json = dict[str, Any]

_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
LEASE_S = 40


async def register(api: Api, node: SimulatedNode, address: str, version: str, kubelet_port: int) -> None:
    """Create the Node, or bring the status of the one that is there up to date, and its lease.

    Labels and taints of a node that exists are left as they are: they may have been changed by hand or by the
    node controller.
    """
    body = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name, "labels": node.all_labels()},
        "spec": {"taints": [dict(taint) for taint in node.taints]},
        "status": _status(node, address, version, kubelet_port),
    }
    try:
        await api.post("/api/v1/nodes", body)
    except ApiError as error:
        if error.status != 409:
            raise
        await report_ready(api, node, address, version, kubelet_port)
    await renew_lease(api, node.name)


async def report_ready(api: Api, node: SimulatedNode, address: str, version: str, kubelet_port: int) -> None:
    """Say in the status that the node is Ready. Its spec is not touched: taints belong to the controllers."""
    status = _status(node, address, version, kubelet_port)
    status["addresses"] = [{"$patch": "replace"}, *status["addresses"]]
    await api.patch(f"/api/v1/nodes/{node.name}/status", {"status": status}, STRATEGIC)


async def renew_lease(api: Api, name: str) -> None:
    """A heartbeat."""
    try:
        await api.patch(f"{_LEASES}/{name}", {"spec": {"renewTime": now_micro()}}, MERGE)
    except ApiError as error:
        if error.status != 404:
            raise
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": name},
            "spec": {"holderIdentity": name, "leaseDurationSeconds": LEASE_S, "renewTime": now_micro()},
        }
        await api.post(_LEASES, body)


def is_ready(node: Mapping[str, Any]) -> bool:
    """Whether the API server's Node object says so."""
    conditions = node.get("status", {}).get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


_PRESSURES = {
    "MemoryPressure": ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
    "DiskPressure": ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
    "PIDPressure": ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
}


def _status(node: SimulatedNode, address: str, version: str, kubelet_port: int) -> Json:
    time = now()

    def condition(kind: str, status: str, reason: str, message: str) -> Json:
        return {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": time,
            "lastTransitionTime": time,
        }

    pressures = [condition(kind, "False", *words) for kind, words in _PRESSURES.items()]
    return {
        "capacity": node.resources(),
        "allocatable": node.resources(),
        "conditions": [*pressures, condition("Ready", "True", "KubeletReady", "the simulated node is ready")],
        "addresses": [
            {"type": "InternalIP", "address": address},
            {"type": "Hostname", "address": node.name},
        ],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet_port}},
        "nodeInfo": {
            "machineID": node.name,
            "systemUUID": node.name,
            "bootID": node.name,
            "kernelVersion": "simulated",
            "osImage": "DisaggServe simulated node",
            "containerRuntimeVersion": "disaggserve://1",
            "kubeletVersion": version,
            "kubeProxyVersion": "",
            "operatingSystem": "linux",
            "architecture": "amd64",
        },
    }

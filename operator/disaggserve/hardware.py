"""The node inventory: which nodes an instance may stand on, what they have, and why the others are left out.

Reads Node and Pod objects as plain JSON values, as the API server gives them or `kubectl get nodes,pods -A -o
json` prints them. The rules and label names are REFERENCE § 6's. A fact that no label tells is unknown, and
unknown is taken as not there (no RDMA, no NVLink), never guessed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from disaggserve import catalogue
from disaggserve.api.errors import InvalidInput
from disaggserve.catalogue import GPU, Link, UnknownGPU

Json = Mapping[str, Any]

SIMULATED_LABEL = "disaggserve.dev/simulated"  # on nodes whose workers keep a real GPU's time without one
GPU_RESOURCE = "nvidia.com/gpu"
_PRODUCT_LABELS = (
    "nvidia.com/gpu.product",
    "cloud.google.com/gke-accelerator",
    "node.kubernetes.io/instance-type",
)
_RDMA_LABELS = tuple(
    f"feature.node.kubernetes.io/{name}"
    for name in (
        "rdma.capable",
        "rdma.available",
        "custom-rdma.capable",
        "custom-rdma.available",
        "pci-15b3.present",
        "pci-0207_15b3.present",
    )
)
_RDMA_RESOURCES = ("vpc.amazonaws.com/efa", "nvidia.com/hostdev")
# Levels of the fabric, outermost first, of each source in the order of REFERENCE § 6; the first source with
# any label on the node is used. Topograph's tier 0 is the closest to the node, EKS' layer 1 the farthest.
_FABRIC_LABELS: tuple[tuple[str, ...], ...] = (
    tuple(f"fabric.topograph.run/tier-{n}" for n in reversed(range(8))),
    tuple(f"network.topology.nvidia.com/{level}" for level in ("core", "spine", "leaf", "accelerator")),
    tuple(f"cloud.google.com/gce-topology-{level}" for level in ("block", "subblock", "host")),
    tuple(f"topology.k8s.aws/network-node-layer-{n}" for n in range(1, 5)),
    tuple(f"oci.oraclecloud.com/host.{level}" for level in ("network_block_id", "rack_id")),
    tuple(f"backend.coreweave.cloud/{level}" for level in ("fabric", "leafgroup")),
    tuple(f"ib.coreweave.cloud/{level}" for level in ("fabric", "leafgroup")),
)
_ZONE_LABEL = "topology.kubernetes.io/zone"


class BadQuantity(InvalidInput, ValueError):
    """A Kubernetes quantity that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A node that an instance may stand on."""

    name: str
    gpu: GPU
    gpus_total: int  # allocatable
    gpus_free: int  # less what pods on it ask for; at least 1
    pods_free: int  # instance pods that fit beside one another by everything but GPUs
    nvlink: bool  # between the GPUs of one container
    rdma: bool
    fabric: tuple[str, ...]  # values of the fabric's levels, outermost … innermost; empty = nothing known
    zone: str  # empty = unknown
    simulated: bool


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A node that is left out, and why, in a clause that reads well after the node's name and a colon."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Inventory:
    """Every node given, in order of name: those that may be used and those that may not."""

    nodes: tuple[Node, ...]
    refused: tuple[Refusal, ...]

    @property
    def gpus_free(self) -> int:
        """Free GPUs on all usable nodes."""
        return sum(n.gpus_free for n in self.nodes)

    @property
    def simulated(self) -> bool:
        """Whether every usable node is simulated (and there is one)."""
        return bool(self.nodes) and all(n.simulated for n in self.nodes)


@dataclasses.dataclass(frozen=True)
class PodRequest:
    """What one instance pod asks for beside its GPUs, as Kubernetes quantities."""

    cpu: str = "0"
    memory: str = "0"
    ephemeral_storage: str = "0"
    devices: Mapping[str, int] = dataclasses.field(
        default_factory=dict
    )  # rdma/* and the like, by resource name
    gpu_resource: str = GPU_RESOURCE

    def quantities(self) -> dict[str, Fraction]:
        """By resource name, without GPUs and without zeros. Raises `BadQuantity`."""
        asked = {
            "cpu": quantity(self.cpu),
            "memory": quantity(self.memory),
            "ephemeral-storage": quantity(self.ephemeral_storage),
            **{name: Fraction(n) for name, n in self.devices.items()},
        }
        return {name: n for name, n in asked.items() if n > 0}


_SUFFIX = {"": Fraction(1), "n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000)}
_SUFFIX |= {s: Fraction(1000 ** (i + 1)) for i, s in enumerate("kMGTPE")}
_SUFFIX |= {s + "i": Fraction(1024 ** (i + 1)) for i, s in enumerate("KMGTPE")}
_QUANTITY = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+))(?:[eE]([+-]?\d{1,2})|(n|u|m|k|M|G|T|P|E|[KMGTPE]i)?)", re.ASCII
)


def quantity(value: str | int | float) -> Fraction:
    """A Kubernetes quantity (`100m`, `16Gi`, `1e3`, `2`), exactly. Raises `BadQuantity`."""
    found = None if isinstance(value, bool) else _QUANTITY.fullmatch(str(value).strip())
    if found is None:
        raise BadQuantity(f"{value!r} is not a Kubernetes quantity, such as 100m, 2 or 16Gi")
    number, exponent, suffix = found.groups()
    return Fraction(number) * (Fraction(10) ** int(exponent) if exponent else _SUFFIX[suffix or ""])


# ------------------------------------------------------------------------------------------------------- pods


def requests(pod: Json) -> dict[str, Fraction]:
    """What a pod takes from its node, by resource name, as the scheduler counts it.

    The sum of its containers and sidecars (init containers that restart always), or what its most demanding
    init container takes beside the sidecars started before it, whichever is more; cpu and memory given for
    the whole pod stand instead; then the overhead. An extended resource that has only a limit asks for that.
    Raises `BadQuantity`.
    """
    spec = pod.get("spec") or {}
    running: dict[str, Fraction] = {}
    for container in spec.get("containers") or ():
        _add(running, _asked(container.get("resources")))
    sidecars: dict[str, Fraction] = {}
    starting: dict[str, Fraction] = {}
    for container in spec.get("initContainers") or ():
        asked = _asked(container.get("resources"))
        if container.get("restartPolicy") == "Always":
            _add(running, asked)
            _add(sidecars, asked)
            peak = dict(sidecars)
        else:
            peak = dict(sidecars)
            _add(peak, asked)
        starting = {
            name: max(starting.get(name, Fraction(0)), peak.get(name, Fraction(0)))
            for name in starting | peak
        }
    total = {
        name: max(running.get(name, Fraction(0)), starting.get(name, Fraction(0)))
        for name in running | starting
    }
    total |= _asked(spec.get("resources"))
    _add(total, {name: quantity(q) for name, q in (spec.get("overhead") or {}).items()})
    return total


def _asked(resources: Json | None) -> dict[str, Fraction]:
    given = {**((resources or {}).get("limits") or {}), **((resources or {}).get("requests") or {})}
    return {name: quantity(q) for name, q in given.items()}


def _add(total: dict[str, Fraction], more: Mapping[str, Fraction]) -> None:
    for name, n in more.items():
        total[name] = total.get(name, Fraction(0)) + n


def _taken(pods: Iterable[Json], ignore: Callable[[Json], bool] | None) -> dict[str, dict[str, Fraction]]:
    """By node name: what pods on it (or nominated to it) take, `pods` counting them."""
    taken: dict[str, dict[str, Fraction]] = {}
    for pod in pods:
        status = pod.get("status") or {}
        node = (pod.get("spec") or {}).get("nodeName") or status.get("nominatedNodeName")
        if not node or status.get("phase") in ("Succeeded", "Failed") or (ignore is not None and ignore(pod)):
            continue
        on_node = taken.setdefault(str(node), {})
        _add(on_node, requests(pod))
        _add(on_node, {"pods": Fraction(1)})
    return taken


# ------------------------------------------------------------------------------------------------------ nodes


def tolerated(taint: Json, tolerations: Iterable[Json]) -> bool:
    """Whether one of the tolerations matches the taint, as the scheduler matches them."""
    for t in tolerations:
        if t.get("effect") and t["effect"] != taint.get("effect"):
            continue
        if t.get("key") and t["key"] != taint.get("key"):
            continue
        operator = t.get("operator") or "Equal"
        if operator == "Exists":
            return True
        if operator == "Equal" and t.get("key") and (t.get("value") or "") == (taint.get("value") or ""):
            return True
    return False


def read(
    nodes: Sequence[Json],
    pods: Sequence[Json],
    *,
    tolerations: Sequence[Json] = (),
    node_selector: Mapping[str, str] | None = None,
    pod_request: PodRequest | None = None,
    excluded: Mapping[str, str] | None = None,
    ignore_pods: Callable[[Json], bool] | None = None,
) -> Inventory:
    """The inventory from Node and Pod objects; their order does not matter.

    `excluded`: node name → reason of nodes not to use for now. `ignore_pods`: pods whose share counts as free
    (the resource's own). A pod takes from its node unless it has Succeeded or Failed; one that is nominated
    to a node takes from it already. Volume topology is not looked at. Raises `BadQuantity` for a quantity
    that cannot be read.
    """
    pod_request = pod_request or PodRequest()
    taken = _taken(pods, ignore_pods)
    usable: list[Node] = []
    refused: list[Refusal] = []
    for node in sorted(nodes, key=lambda n: str(n["metadata"]["name"])):
        name = str(node["metadata"]["name"])
        found = _read_node(
            name, node, taken.get(name, {}), tolerations, node_selector or {}, pod_request, excluded or {}
        )
        if isinstance(found, Node):
            usable.append(found)
        else:
            refused.append(Refusal(name, found))
    return Inventory(tuple(usable), tuple(refused))


def _read_node(
    name: str,
    node: Json,
    taken: Mapping[str, Fraction],
    tolerations: Sequence[Json],
    node_selector: Mapping[str, str],
    pod_request: PodRequest,
    excluded: Mapping[str, str],
) -> Node | str:
    """The node, or why it is not used."""
    labels: Mapping[str, str] = node["metadata"].get("labels") or {}
    spec, status = node.get("spec") or {}, node.get("status") or {}
    if reason := next(_unfit(name, node, labels, spec, status, tolerations, node_selector, excluded), None):
        return reason
    allocatable = {r: quantity(q) for r, q in (status.get("allocatable") or {}).items()}
    resource = pod_request.gpu_resource
    if reason := _shared(labels):
        return reason
    total = int(allocatable.get(resource, 0))
    if total <= 0:
        return f"no {resource} is allocatable"
    product = next((labels[key] for key in _PRODUCT_LABELS if labels.get(key)), None)
    if product is None:
        return f"no label tells its GPU product ({_PRODUCT_LABELS[0]})"
    try:
        gpu = catalogue.gpu(product)
    except UnknownGPU as e:
        return str(e)
    pods_free = int(max(Fraction(0), allocatable.get("pods", Fraction(110)) - taken.get("pods", Fraction(0))))
    if not pods_free:
        return "its pods are as many as it allows"
    for what, asked in sorted(pod_request.quantities().items()):
        # A node that does not tell a resource at all is not known to lack it, except for devices: those are
        # there only when something offers them.
        if what not in allocatable and what not in pod_request.devices:
            continue
        free = max(Fraction(0), allocatable.get(what, Fraction(0)) - taken.get(what, Fraction(0)))
        if free < asked:
            return f"{what} is short: an instance asks for {_show(asked)}, {_show(free)} is free"
        pods_free = min(pods_free, int(free // asked))
    free_gpus = total - int(taken.get(resource, Fraction(0)))
    if free_gpus <= 0:
        return f"all its {total} GPUs are taken by other pods"
    zone = labels.get(_ZONE_LABEL, "")
    return Node(
        name=name,
        gpu=gpu,
        gpus_total=total,
        gpus_free=free_gpus,
        pods_free=pods_free,
        nvlink=gpu.nvlink_bytes_s > 0 or bool(labels.get("nvidia.com/gpu.clique")),
        rdma=_rdma(labels, allocatable),
        fabric=_fabric(labels) or ((zone,) if zone else ()),
        zone=zone,
        simulated=labels.get(SIMULATED_LABEL) == "true",
    )


def _unfit(
    name: str,
    node: Json,
    labels: Mapping[str, str],
    spec: Json,
    status: Json,
    tolerations: Sequence[Json],
    node_selector: Mapping[str, str],
    excluded: Mapping[str, str],
) -> Iterator[str]:
    """Reasons that do not depend on what the node has."""
    if name in excluded:
        yield excluded[name]
    if node["metadata"].get("deletionTimestamp"):
        yield "it is being deleted"
    ready: Json = next((c for c in status.get("conditions") or () if c.get("type") == "Ready"), {})
    if ready.get("status") != "True":
        yield "it is not Ready" if ready else "its kubelet has not said that it is Ready"
    if spec.get("unschedulable"):
        yield "it is cordoned"
    for key, value in sorted(node_selector.items()):
        if labels.get(key) != value:
            has = f"it has {labels[key]!r}" if key in labels else "it has no such label"
            yield f"nodeSelector asks for {key}={value}, {has}"
    for taint in sorted(spec.get("taints") or (), key=lambda t: (t.get("key", ""), t.get("effect", ""))):
        if taint.get("effect") in ("NoSchedule", "NoExecute") and not tolerated(taint, tolerations):
            value = f"={taint['value']}" if taint.get("value") else ""
            yield f"its taint {taint.get('key')}{value}:{taint['effect']} is not tolerated"


def _shared(labels: Mapping[str, str]) -> str | None:
    """Why its GPUs are not whole ones, or None.

    GPU feature discovery writes the configured MIG strategy on every node, so a strategy counts only where
    the MIG manager does not say that all GPUs have MIG disabled.
    """
    product = labels.get("nvidia.com/gpu.product", "")
    strategy = labels.get("nvidia.com/mig.strategy") or "none"
    if "-MIG-" in product or (strategy != "none" and labels.get("nvidia.com/mig.config") != "all-disabled"):
        return f"its GPUs are split by MIG (nvidia.com/mig.strategy {strategy})"
    if product.endswith("-SHARED") or (labels.get("nvidia.com/gpu.sharing-strategy") or "none") != "none":
        return "its GPUs are shared between pods (time slicing or MPS)"
    return None


def _rdma(labels: Mapping[str, str], allocatable: Mapping[str, Fraction]) -> bool:
    return any(labels.get(key) == "true" for key in _RDMA_LABELS) or any(
        n > 0 for r, n in allocatable.items() if r.startswith("rdma/") or r in _RDMA_RESOURCES
    )


def _fabric(labels: Mapping[str, str]) -> tuple[str, ...]:
    for source in _FABRIC_LABELS:
        if levels := tuple(labels[key] for key in source if labels.get(key)):
            return levels
    return ()


def _show(q: Fraction) -> str:
    for suffix, size in (("Gi", 2**30), ("Mi", 2**20)):
        if q >= size:
            return f"{float(q / size):.4g}{suffix}"
    return f"{float(q):.4g}"


# ----------------------------------------------------------------------------------------------------- fabric


def affinity(
    inventory: Inventory, override: Literal["Auto", "High", "Low"] = "Auto"
) -> tuple[Literal["High", "Low"], str]:
    """High where KV can cross nodes at RDMA speed, Low where it must stay inside a node; and why, in words.

    High if every usable node has RDMA: instances may then stand anywhere. One node alone is judged alike,
    since two pods on it do not share NVLink either.
    """
    if override != "Auto":
        return override, f"hardware.affinity says {override}"
    without = [n.name for n in inventory.nodes if not n.rdma]
    if not inventory.nodes:
        return "Low", "no node is usable, so nothing shows RDMA"
    if not without:
        return (
            "High",
            f"{_nodes(len(inventory.nodes), 'shows', 'show')} RDMA, by labels or allocatable devices",
        )
    named = ", ".join(without[:3]) + (", …" if len(without) > 3 else "")
    return "Low", f"{len(without)} of {_nodes(len(inventory.nodes), 'shows', 'show')} no RDMA ({named})"


def _nodes(n: int, one: str, many: str) -> str:
    return f"1 usable node {one}" if n == 1 else f"{n} usable nodes {many}"


def kv_link(a: Node, b: Node, same_container: bool) -> Link:
    """The link that KV takes from an instance on `a` to one on `b`.

    In one container (a low-affinity pair) NVLink or PCIe; between pods, on one node or on two, RDMA if both
    nodes have it, else TCP (REFERENCE § 6).
    """
    if same_container:
        return catalogue.container_link(a.gpu, a.nvlink)
    return catalogue.pod_link(a.gpu, a.rdma, b.gpu, b.rdma)

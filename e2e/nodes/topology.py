"""A topology file: which nodes a simulated cluster has, and the Node object of each.

    nodes:
      - name: dgx                        # with count: dgx-0, dgx-1, …
        count: 2
        gpus: 8                          # 0 (the default): a node without GPUs
        product: NVIDIA-A100-SXM4-80GB   # label nvidia.com/gpu.product
        memoryMiB: 81920                 # label nvidia.com/gpu.memory; known for common products
        nvlink: true                     # by product unless said; no label says it on real nodes either
        rdma: true                       # InfiniBand labels and allocatable rdma/hca_shared_devices_a
        fabric: {leaf: leaf-0}           # labels network.topology.nvidia.com/{accelerator,leaf,spine,core}
        zone: zone-a                     # label topology.kubernetes.io/zone
        cpu: 128
        memory: 1024Gi
        labels: {}                       # more labels, as they are
        taints: []                       # a GPU node has nvidia.com/gpu:NoSchedule unless said

The labels are those that NVIDIA's stock charts put on nodes (GPU feature discovery, node feature discovery,
network operator, topograph).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from e2e.nodes.errors import TopologyError
from e2e.nodes.quantities import quantity

MEMORY_MIB = {
    "NVIDIA-A100-SXM4-80GB": 81920,
    "NVIDIA-A100-PCIE-80GB": 81920,
    "NVIDIA-A100-SXM4-40GB": 40960,
    "NVIDIA-H100-80GB-HBM3": 81559,
    "NVIDIA-H100-PCIe": 81559,
    "NVIDIA-H200": 143771,
    "NVIDIA-L40S": 46068,
}
"""What GPU feature discovery says of a product's memory."""

_NVLINK = re.compile(r"SXM|HBM3|H200|B200|GB200|-NVL")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
FABRIC_LEVELS = ("accelerator", "leaf", "spine", "core")
RDMA_RESOURCE = "rdma/hca_shared_devices_a"
GPU_RESOURCE = "nvidia.com/gpu"
_RDMA_SHARES = 64
_PODS = 110


@dataclass(frozen=True)
class SimulatedNode:
    """One node as the topology describes it."""

    name: str
    gpus: int = 0
    product: str = ""
    memory_mib: int = 0
    nvlink: bool = False
    rdma: bool = False
    fabric: tuple[tuple[str, str], ...] = ()
    zone: str = ""
    cpu: str = "16"
    memory: str = "64Gi"
    labels: tuple[tuple[str, str], ...] = ()
    taints: tuple[Mapping[str, str], ...] = ()

    def resources(self) -> dict[str, str]:
        """Capacity, which is allocatable as well."""
        found = {
            "cpu": self.cpu,
            "memory": self.memory,
            "ephemeral-storage": "1Ti",
            "pods": str(_PODS),
        }
        if self.gpus:
            found[GPU_RESOURCE] = str(self.gpus)
        if self.rdma:
            found[RDMA_RESOURCE] = str(_RDMA_SHARES)
        return found

    def all_labels(self) -> dict[str, str]:
        """Every label of the Node object."""
        labels = {
            "kubernetes.io/hostname": self.name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
            "disaggserve.dev/simulated": "true",
        }
        if self.zone:
            labels["topology.kubernetes.io/zone"] = self.zone
        if self.gpus:
            labels |= {
                "nvidia.com/gpu.present": "true",
                "nvidia.com/gpu.product": self.product,
                "nvidia.com/gpu.memory": str(self.memory_mib),
                "nvidia.com/gpu.count": str(self.gpus),
                "nvidia.com/mig.strategy": "none",
            }
        if self.rdma:
            labels |= {
                "feature.node.kubernetes.io/rdma.capable": "true",
                "feature.node.kubernetes.io/rdma.available": "true",
                "feature.node.kubernetes.io/pci-15b3.present": "true",
                "feature.node.kubernetes.io/pci-0207_15b3.present": "true",
            }
        labels |= {f"network.topology.nvidia.com/{level}": value for level, value in self.fabric}
        return labels | dict(self.labels)


def load(path: Path) -> tuple[SimulatedNode, ...]:
    """The nodes of a topology file, in its order. Raises TopologyError."""
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise TopologyError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise TopologyError(f"{path} is not YAML: {error}") from error
    if (
        not isinstance(document, dict)
        or set(document) != {"nodes"}
        or not isinstance(document["nodes"], list)
    ):
        raise TopologyError(f"{path} must hold one key, `nodes`, with a list of nodes")
    nodes: list[SimulatedNode] = []
    for index, entry in enumerate(document["nodes"]):
        where = f"{path}: nodes[{index}]"
        if not isinstance(entry, dict):
            raise TopologyError(f"{where} is not a mapping of fields")
        nodes += _nodes(where, dict(entry))
    names = [node.name for node in nodes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TopologyError(f"{path} names node {twice[0]} twice")
    return tuple(nodes)


_KEYS = {"memoryMiB" if field.name == "memory_mib" else field.name for field in fields(SimulatedNode)} | {
    "count"
}


def _nodes(where: str, entry: dict[str, Any]) -> list[SimulatedNode]:
    unknown = sorted(set(entry) - _KEYS)
    if unknown:
        raise TopologyError(f"{where}.{unknown[0]} is unknown; the fields are {', '.join(sorted(_KEYS))}")
    count = entry.pop("count", None)
    name = str(entry.pop("name", ""))
    if not _NAME.fullmatch(name):
        raise TopologyError(f"{where}.name {name!r} is not a DNS label such as `dgx`")
    gpus = _whole(where, "gpus", entry.pop("gpus", 0))
    product = str(entry.pop("product", ""))
    if bool(gpus) != bool(product):
        raise TopologyError(f"{where} must give gpus and product together or neither")
    memory_mib = _whole(where, "memoryMiB", entry.pop("memoryMiB", MEMORY_MIB.get(product, 0)))
    if gpus and not memory_mib:
        raise TopologyError(f"{where}.memoryMiB is needed, as the memory of {product} is not known")
    fabric = {str(level): str(value) for level, value in entry.pop("fabric", {}).items()}
    strange = sorted(set(fabric) - set(FABRIC_LEVELS))
    if strange:
        raise TopologyError(
            f"{where}.fabric.{strange[0]} is unknown; the levels are {', '.join(FABRIC_LEVELS)}"
        )
    default_taints = [{"key": GPU_RESOURCE, "value": "present", "effect": "NoSchedule"}] if gpus else []
    resources = {"cpu": str(entry.pop("cpu", "16")), "memory": str(entry.pop("memory", "64Gi"))}
    for key, amount in resources.items():
        try:
            quantity(amount)
        except ValueError as error:
            raise TopologyError(f"{where}.{key} {amount!r} is not a quantity such as 64 or 512Gi") from error
    common: dict[str, Any] = {
        "gpus": gpus,
        "product": product,
        "memory_mib": memory_mib,
        "nvlink": _flag(where, "nvlink", entry.pop("nvlink", bool(gpus and _NVLINK.search(product)))),
        "rdma": _flag(where, "rdma", entry.pop("rdma", False)),
        "fabric": tuple(fabric.items()),
        "zone": str(entry.pop("zone", "")),
        "labels": tuple((str(key), str(value)) for key, value in entry.pop("labels", {}).items()),
        "taints": tuple(entry.pop("taints", default_taints)),
        **resources,
    }
    if count is None:
        return [SimulatedNode(name=name, **common)]
    return [
        SimulatedNode(name=f"{name}-{number}", **common) for number in range(_whole(where, "count", count))
    ]


def _whole(where: str, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TopologyError(f"{where}.{key} {value!r} is not a whole number of 0 or more")
    return value


def _flag(where: str, key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TopologyError(f"{where}.{key} {value!r} is neither true nor false")
    return value

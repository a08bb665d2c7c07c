"""A real Kubernetes control plane for a laptop and for CI, and a real Prometheus.

    binaries = ensure()
    with ControlPlane(folder, binaries) as cluster:
        cluster.kubectl("get", "namespaces")

Everything listens on loopback, keeps all its files in ``folder`` and dies with the process that started it.
"""

from e2e.controlplane.audit import Write, writes
from e2e.controlplane.binaries import Binaries, ensure
from e2e.controlplane.controlplane import ControlPlane
from e2e.controlplane.errors import (
    BuildError,
    CommandFailed,
    ComponentDied,
    ControlPlaneError,
    FolderInUse,
    NotReady,
    ToolchainError,
)
from e2e.controlplane.prometheus import Prometheus
from e2e.controlplane.supervised import Supervised, supervised_popen

__all__ = [
    "Binaries",
    "BuildError",
    "CommandFailed",
    "ComponentDied",
    "ControlPlane",
    "ControlPlaneError",
    "FolderInUse",
    "NotReady",
    "Prometheus",
    "Supervised",
    "ToolchainError",
    "Write",
    "ensure",
    "supervised_popen",
    "writes",
]

"""The operator's one frozen config value; flags and environment are views of it, and nothing else reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from disaggserve import __version__
from disaggserve.manifests import Images

_SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Settings:
    """`namespace`: where the lease lives. `watch`: namespaces to serve; empty is all of them."""

    namespace: str
    identity: str
    prometheus_url: str
    images: Images
    watch: tuple[str, ...] = ()
    lease: str = "disaggserve-operator"
    lease_duration_s: int = 15
    renew_deadline_s: int = 10
    retry_period_s: int = 2
    health_port: int = 8080
    health_host: str = "0.0.0.0"
    search_processes: int = 1


def own_namespace() -> str:
    """The namespace that this process runs in, `default` outside a cluster."""
    named = os.environ.get("POD_NAMESPACE")
    if named:
        return named
    return (
        _SERVICE_ACCOUNT_NAMESPACE.read_text().strip() if _SERVICE_ACCOUNT_NAMESPACE.exists() else "default"
    )


def default_identity() -> str:
    return os.environ.get("POD_NAME") or f"local-{os.getpid()}"


def default_health_host() -> str:
    """Pods bind their own address: on a shared loopback 0.0.0.0 would collide with every other pod."""
    return os.environ.get("POD_IP") or "0.0.0.0"


def default_images() -> Images:
    return Images(worker=f"disaggserve-worker:{__version__}", router=f"disaggserve-router:{__version__}")


def kubeconfig() -> str | None:
    """The kubeconfig to use; None inside a cluster, where the pod's service account is."""
    return os.environ.get("KUBECONFIG") or None

"""The time, as Kubernetes writes it."""

from datetime import UTC, datetime


def now() -> str:
    """A `metav1.Time`: whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def now_micro() -> str:
    """A `metav1.MicroTime`, as leases have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

"""Server-side apply, but only of what differs: steady state writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from disaggserve.api.plan import digest
from disaggserve.cluster.client import KINDS, Cluster, Json
from disaggserve.manifests import LABEL

APPLIED = LABEL + "applied"


def _covers(live: Any, wanted: Any) -> bool:
    """Does the live value hold everything that is wanted? The server adds defaults, and may spell quantities another way."""
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(
            key == "resources" or (key in live and _covers(live[key], value))
            for key, value in wanted.items()
            if value not in ({}, [])
        )
    if isinstance(wanted, list):
        return isinstance(live, list) and len(live) == len(wanted) and all(map(_covers, live, wanted))
    return bool(live == wanted)


async def apply_all(cluster: Cluster, objects: Sequence[Json]) -> int:
    """Applies what is missing or differs; returns how many writes that took."""
    writes = 0
    for wanted in objects:
        kind = KINDS[wanted["kind"]]
        metadata = wanted["metadata"]
        body = wanted | {
            "metadata": metadata
            | {"annotations": metadata.get("annotations", {}) | {APPLIED: digest(wanted)[:16]}}
        }
        live = await cluster.get(kind, metadata["namespace"], metadata["name"])
        if live is None or not _covers(live, body):
            await cluster.apply(kind, body)
            writes += 1
    return writes

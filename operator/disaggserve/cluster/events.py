"""Events on decisions only. The name is a function of what is said, so saying it twice writes it once."""

from __future__ import annotations

from typing import Literal

from disaggserve.api import manifest
from disaggserve.api.plan import digest
from disaggserve.cluster.client import EVENTS, MANAGER, Cluster
from disaggserve.cluster.clock import rfc3339
from disaggserve.manifests import Owner


async def say(
    cluster: Cluster,
    owner: Owner,
    kind: Literal["Normal", "Warning"],
    reason: str,
    note: str,
    now_s: float,
    key: str = "",
) -> None:
    """One event about the resource; `key` tells apart equal words about different things."""
    name = f"{owner.name}.{digest([owner.uid, reason, note, key])[:16]}"
    await cluster.create(
        EVENTS,
        {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": owner.namespace},
            "eventTime": rfc3339(now_s).replace("Z", ".000000Z"),
            "reportingController": "disaggserve.dev/operator",
            "reportingInstance": MANAGER,
            "action": reason,
            "reason": reason,
            "type": kind,
            "note": note[:1000],
            "regarding": {
                "apiVersion": manifest.API_VERSION,
                "kind": manifest.KIND,
                "name": owner.name,
                "namespace": owner.namespace,
                "uid": owner.uid,
            },
        },
    )

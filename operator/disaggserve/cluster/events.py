"""Events on decisions only. The name is a function of what is said, so saying it twice writes it once.

What this process has said it does not send again: a decision that stands is looked at every few seconds.
"""

from __future__ import annotations

from typing import Literal

from disaggserve.api import manifest
from disaggserve.api.plan import digest
from disaggserve.cluster.client import EVENTS, MANAGER, Cluster, Json
from disaggserve.cluster.clock import rfc3339
from disaggserve.manifests import Owner


class Events:
    """The events of one operator process."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._said: dict[str, set[str]] = {}

    async def say(
        self,
        owner: Owner,
        kind: Literal["Normal", "Warning"],
        reason: str,
        note: str,
        now_s: float,
        key: str = "",
    ) -> None:
        """One event about the resource; `key` tells apart equal words about different things."""
        name = f"{owner.name}.{digest([owner.uid, reason, note, key])[:16]}"
        said = self._said.setdefault(owner.uid, set())
        if name not in said:
            await self._cluster.create(EVENTS, _body(owner, name, kind, reason, note, now_s))
            said.add(name)

    def forget(self, uid: str) -> None:
        """The resource is gone."""
        self._said.pop(uid, None)


def _body(owner: Owner, name: str, kind: str, reason: str, note: str, now_s: float) -> Json:
    return {
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
    }

"""Committed plans: immutable `ControllerRevision`s owned by the resource, the only memory there is.

A revision is created before the first pod of its plan, named (resource, revision): of two writers only one can win it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from disaggserve.api.plan import Commit
from disaggserve.cluster.client import REVISIONS, Cluster, Json
from disaggserve.cluster.clock import parse_rfc3339
from disaggserve.manifests import Owner, plan_labels

KEPT = 10


@dataclass(frozen=True)
class Stored:
    """One committed plan and when it was committed (seconds since the epoch)."""

    revision: int
    commit: Commit
    created_s: float
    uid: str
    name: str


def _name(resource: str, revision: int) -> str:
    return f"{resource}-plan-{revision}"


def owned_by(obj: Json, uid: str) -> bool:
    return any(r["uid"] == uid for r in obj["metadata"].get("ownerReferences", ()))


def parse(obj: Json) -> Stored:
    metadata = obj["metadata"]
    commit = Commit.model_validate_json(json.dumps(obj["data"]), strict=True)
    created_s = parse_rfc3339(metadata["creationTimestamp"])
    return Stored(int(obj["revision"]), commit, created_s, metadata["uid"], metadata["name"])


def of_owner(objects: Sequence[Json], uid: str) -> list[Stored]:
    """The resource's commits, oldest first."""
    return sorted((parse(o) for o in objects if owned_by(o, uid)), key=lambda s: s.revision)


def body(owner: Owner, commit: Commit) -> dict[str, Any]:
    revision = commit.plan.revision
    assert revision is not None, "a commit has a number"
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": _name(owner.name, revision),
            "namespace": owner.namespace,
            "labels": plan_labels(owner),
            "ownerReferences": [owner.reference()],
        },
        "revision": revision,
        "data": commit.model_dump(mode="json", exclude_none=True),
    }


async def write(cluster: Cluster, owner: Owner, commit: Commit) -> bool:
    """True when this plan is now the committed one; False when another writer was first."""
    return await cluster.create(REVISIONS, body(owner, commit))


async def prune(cluster: Cluster, owner: Owner, stored: Sequence[Stored]) -> None:
    """Keeps the last ten."""
    for old in stored[:-KEPT]:
        await cluster.delete(REVISIONS, owner.namespace, old.name, old.uid)

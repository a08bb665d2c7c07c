"""The API server's audit log: who wrote what. Tests count writes here, where all are known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITE_VERBS = ("create", "update", "patch", "delete", "deletecollection")

POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    # One line per request, written before the answer is sent (the log's mode is `blocking`).
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [{"level": "Metadata", "verbs": list(WRITE_VERBS)}, {"level": "None"}],
}


@dataclass(frozen=True)
class Write:
    """One write request that the API server answered."""

    verb: str
    user: str
    user_agent: str
    resource: str
    """With the subresource, if any: ``pods/status``."""
    namespace: str
    name: str
    code: int
    """HTTP status; a refused write is in the log as well."""
    time: str
    """When the request came, RFC 3339 with microseconds, UTC."""
    dry_run: bool


def writes(log: Path) -> Iterator[Write]:
    """The writes so far, in the order of their answers. A line still being written is left for next time."""
    if not log.exists():
        return
    with log.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield _write(json.loads(line))


def _write(event: dict[str, Any]) -> Write:
    target = event.get("objectRef") or {}
    resource = str(target.get("resource", ""))
    if target.get("subresource"):
        resource += "/" + str(target["subresource"])
    return Write(
        verb=event["verb"],
        user=event["user"].get("username", ""),
        user_agent=event.get("userAgent", ""),
        resource=resource,
        namespace=target.get("namespace", ""),
        name=target.get("name", ""),
        code=int(event.get("responseStatus", {}).get("code", 0)),
        time=event["requestReceivedTimestamp"],
        dry_run="dryRun=" in event.get("requestURI", ""),
    )

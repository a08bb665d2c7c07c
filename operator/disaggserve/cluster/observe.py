"""Reads the cluster at the moment of acting: nodes, pods, commits."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from disaggserve import engines, hardware, manifests
from disaggserve.api.plan import Slot
from disaggserve.cluster.client import NODES, PODS, REVISIONS, Cluster, Json, condition
from disaggserve.cluster.clock import parse_rfc3339
from disaggserve.cluster.commit import Stored, of_owner, owned_by, parse
from disaggserve.manifests import Owner
from disaggserve.rollout import Instance

NODE_LOST_S = 60.0


@dataclass(frozen=True)
class Snapshot:
    """What stood when it was read. `claims`: GPUs that others' commits have taken and not yet filled, as pods that are not."""

    nodes: Sequence[Json]
    pods: Sequence[Json]
    claims: Sequence[Json]
    commits: Sequence[Stored]
    instances: Sequence[Instance]
    routers: Sequence[Json]
    own_pods: Sequence[Json]

    def lost_nodes(self, now_s: float) -> set[str]:
        return lost_nodes(self.nodes, now_s)


def lost_nodes(nodes: Sequence[Json], now_s: float) -> set[str]:
    """Nodes that have not been Ready for a minute."""
    lost = set()
    for node in nodes:
        ready = condition(node.get("status", {}).get("conditions", []), "Ready")
        since = ready.get("lastTransitionTime")
        if ready and ready["status"] != "True" and (not since or now_s - parse_rfc3339(since) >= NODE_LOST_S):
            lost.add(node["metadata"]["name"])
    return lost


def planned_node(pod: Json) -> str:
    """The node that a pod is pinned to."""
    terms = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    return str(terms[0]["matchFields"][0]["values"][0])


def trouble(pod: Json) -> str:
    """Why a pod does not run, in the words of its node or of the scheduler; empty when nothing is known to be wrong."""
    statuses = [*pod["status"].get("initContainerStatuses", ()), *pod["status"].get("containerStatuses", ())]
    for status in statuses:
        waiting = status.get("state", {}).get("waiting", {})
        ended = (
            status.get("state", {}).get("terminated") or status.get("lastState", {}).get("terminated") or {}
        )
        if ended and ended.get("exitCode"):
            words = (ended.get("message") or "").strip().splitlines()
            return f"exit {ended['exitCode']}: {words[-1][:300]}" if words else f"exit {ended['exitCode']}"
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"{waiting['reason']}: {waiting.get('message', '')}"[:300]
    scheduled = condition(pod["status"].get("conditions", []), "PodScheduled")
    return str(scheduled.get("message", ""))[:300] if scheduled.get("status") == "False" else ""


def instance(pod: Json, nodes: set[str], lost: set[str], now_s: float) -> Instance:
    """One worker pod as the rollout sees it."""
    metadata, status = pod["metadata"], pod.get("status", {})
    labels = metadata["labels"]
    tp, pp, *decode = map(int, re.findall(r"\d+", labels[manifests.SHAPE]))
    node = planned_node(pod)
    slot = Slot(
        slot=int(labels[manifests.SLOT]),
        role=labels[manifests.ROLE],
        chunk=int(labels[manifests.CHUNK]) if manifests.CHUNK in labels else None,
        tp=tp,
        pp=pp,
        decode_tp=decode[0] if decode else None,
        node=node,
        pairing_key=labels[manifests.KEY],
        template=labels[manifests.TEMPLATE],
    )
    conditions = status.get("conditions", [])
    scheduled = condition(conditions, "PodScheduled")
    since = metadata.get("annotations", {}).get(manifests.DRAIN_SINCE)
    draining = labels.get(manifests.DRAIN) == "true"
    return Instance(
        name=metadata["name"],
        uid=metadata["uid"],
        slot=slot,
        attempt=int(labels[manifests.ATTEMPT]),
        ready=condition(conditions, "Ready").get("status") == "True",
        failed=status.get("phase") in ("Failed", "Succeeded"),
        terminating="deletionTimestamp" in metadata,
        lost=node in lost or node not in nodes,
        drain_age_s=max(0.0, now_s - parse_rfc3339(since))
        if draining and since
        else 0.0
        if draining
        else None,
        age_s=max(0.0, now_s - parse_rfc3339(metadata["creationTimestamp"])),
        scheduled=bool(pod["spec"].get("nodeName")),
        unscheduled_reason=str(scheduled.get("message", "")),
        # The two of a pair were made for each other.
        role_change=None
        if slot.role == "pair"
        else engines.engine(labels.get(manifests.ENGINE, "torch")).role_change,
    )


def _claims(revisions: Sequence[Json], pods: Sequence[Json], uid: str) -> list[Json]:
    """Planned instances of other resources that have no pod yet."""
    latest: dict[str, Stored] = {}
    owners: dict[str, Json] = {}
    for revision in revisions:
        owner = next(iter(revision["metadata"].get("ownerReferences", ())), None)
        if owner is None or owner["uid"] == uid:
            continue
        stored = parse(revision)
        if owner["uid"] not in latest or latest[owner["uid"]].revision < stored.revision:
            latest[owner["uid"]], owners[owner["uid"]] = stored, owner
    out = []
    for key, stored in latest.items():
        standing = {
            (
                p["metadata"]["labels"][manifests.KEY],
                p["metadata"]["labels"][manifests.SHAPE],
                p["metadata"]["labels"][manifests.SLOT],
            )
            for p in pods
            if owned_by(p, key) and manifests.SLOT in p["metadata"].get("labels", {})
        }
        for slot in stored.commit.instances:
            if (slot.pairing_key, slot.shape, str(slot.slot)) not in standing:
                requests = {hardware.GPU_RESOURCE: str(slot.gpus)}
                out.append(
                    {
                        "metadata": {
                            "name": f"claim-{owners[key]['name']}-{slot.slot}",
                            "namespace": "",
                            "uid": "",
                        },
                        "spec": {
                            "nodeName": slot.node,
                            "containers": [{"name": "claim", "resources": {"requests": requests}}],
                        },
                        "status": {"phase": "Pending"},
                    }
                )
    return out


async def snapshot(cluster: Cluster, owner: Owner, now_s: float) -> Snapshot:
    """Everything at once; raises ApiError when the API server cannot be asked: unknown is not empty."""
    nodes, pods, revisions = await asyncio.gather(
        cluster.list(NODES),
        cluster.list(PODS, fields="status.phase!=Succeeded,status.phase!=Failed"),
        cluster.list(REVISIONS, labels=manifests.PLAN_SELECTOR),
    )
    own = await cluster.list(PODS, owner.namespace, labels=f"{manifests.RESOURCE}={owner.name}")
    workers = [p for p in own if manifests.SLOT in p["metadata"]["labels"] and owned_by(p, owner.uid)]
    names = {n["metadata"]["name"] for n in nodes}
    lost = lost_nodes(nodes, now_s)
    return Snapshot(
        nodes=nodes,
        pods=pods,
        claims=_claims(revisions, pods, owner.uid),
        commits=of_owner(revisions, owner.uid),
        instances=[
            instance(p, names, lost, now_s) for p in sorted(workers, key=lambda p: p["metadata"]["name"])
        ],
        routers=[p for p in own if p["metadata"]["labels"].get(manifests.ROLE) == "router"],
        own_pods=workers,
    )

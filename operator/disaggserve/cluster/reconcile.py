"""`reconcile()` does everything: read, decide, commit, act, say. Handlers only call it.

Level-triggered: it branches on what stands, never on what happened. Whatever it was doing when it was killed, the next call
finds out from the cluster and goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from disaggserve import drift, manifests, plan, rollout
from disaggserve.api.errors import DisaggServeError, Infeasible, InvalidManifest
from disaggserve.api.manifest import parse_spec
from disaggserve.api.model import seconds
from disaggserve.api.plan import Commit, ExcludedNode, Plan, Setting, Slot, digest
from disaggserve.api.spec import Spec
from disaggserve.api.status import Decision, Observed, Proposal, RolloutStatus
from disaggserve.cluster import asking, metrics, observe, searching
from disaggserve.cluster import commit as commits
from disaggserve.cluster.apply import apply_all
from disaggserve.cluster.client import PODS, RESOURCES, ApiError, Cluster, Json, condition
from disaggserve.cluster.clock import Clock, parse_rfc3339, rfc3339
from disaggserve.cluster.commit import Stored
from disaggserve.cluster.conditions import Report, merge_diff
from disaggserve.cluster.events import Events
from disaggserve.cluster.prometheus import Traffic
from disaggserve.cluster.settings import Settings
from disaggserve.manifests import Owner
from disaggserve.workload import Workload

log = logging.getLogger(__name__)

T = TypeVar("T")
Change = dict[str, dict[str, str | None]]

_EXCLUDED_S = 600.0
_DRAIN_POLL_S = 0.5
_WAIT_POLL_S = 2.0
_RETRY_S = 10.0
_REST_S = 300.0
_SEARCHES = 3
"""As often a plan is searched for in one reconcile where others take its GPUs meanwhile."""
_INSIDE = frozenset({"shm", "cuda_ipc"})
"""Transports that a low-affinity plan means: no byte of KV is sent."""
_GONE = (404, 409)
"""The pod is there no longer, or is another by now."""
_REFUSALS = (400, 403, 404, 422)
"""What asking again does not help: quota, Pod Security, an admission webhook, a missing service account or namespace."""


@dataclass(frozen=True)
class Why:
    """A reason to look for another plan."""

    cause: str
    reason: str
    excluded: tuple[ExcludedNode, ...] = ()


@dataclass
class Memory:
    """What saves work and is nowhere needed: losing it costs a search or a query, never a decision."""

    failed: tuple[str, DisaggServeError] | None = None
    looked_s: float = float("-inf")
    traffic: drift.Traffic | None = None
    verdict: drift.Verdict | None = None


def why_replan(spec: Spec, snap: observe.Snapshot, now_s: float) -> Why | None:
    """The first thing that makes the committed plan the wrong one, apart from traffic."""
    if not snap.commits:
        return Why("Spec", "first plan")
    latest = snap.commits[-1]
    if latest.commit.inputs != plan.inputs(spec):
        return Why("Spec", "the spec, or by what the operator pairs workers, changed")
    lost = snap.lost_nodes(now_s)
    standing = {n["metadata"]["name"]: n for n in snap.nodes}
    for slot in latest.commit.instances:
        node = standing.get(slot.node)
        if node is None:
            return Why("Nodes", f"node {slot.node} is gone")
        if slot.node in lost:
            return Why("Nodes", f"node {slot.node} has not been Ready for a minute")
        if node.get("spec", {}).get("unschedulable"):
            return Why("Nodes", f"node {slot.node} is cordoned")
    wanted = {s.identity: s for s in latest.commit.instances}
    mine = [i for i in snap.instances if i.alive and wanted.get(i.slot.identity) == i.slot]
    for i in mine:
        if not i.scheduled and i.age_s > seconds(spec.rollout.schedule_timeout):
            until = rfc3339(now_s + _EXCLUDED_S)
            words = i.unscheduled_reason or "no word from the scheduler"
            reason = (
                f"{i.name} was not scheduled to {i.slot.node} within {spec.rollout.schedule_timeout}: {words}"
            )
            return Why("Nodes", reason, (ExcludedNode(name=i.slot.node, until=until, reason=words[:1000]),))
    if len(snap.commits) > 1 and latest.commit.cause != "RollBack":
        before = {s.identity for s in snap.commits[-2].commit.instances}
        for i in mine:
            new = i.slot.identity not in before
            if new and i.scheduled and not i.ready and i.age_s > seconds(spec.rollout.ready_timeout):
                return Why("RollBack", f"{i.name} was not ready within {spec.rollout.ready_timeout}")
    return None


class Reconciler:
    """One per process. `pool` runs searches, `warm` says whether one would begin at once; what must last is in the cluster."""

    def __init__(
        self,
        cluster: Cluster,
        settings: Settings,
        clock: Clock,
        pool: Executor,
        warm: Callable[[], bool] = lambda: True,
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._clock = clock
        self._pool = pool
        self._warm = warm
        self._traffic = Traffic(settings.prometheus_url)
        self._committing = asyncio.Lock()
        self._memory: dict[str, Memory] = {}
        self._events = Events(cluster)
        self._uids: dict[tuple[str, str], str] = {}

    async def reconcile(self, namespace: str, name: str) -> float | None:
        """Seconds after which to look again at the latest; None when the resource is gone."""
        resource = await self._cluster.get(RESOURCES, namespace, name)
        if resource is None or "deletionTimestamp" in resource["metadata"]:
            self._forget(namespace, name)
            return None
        owner = Owner(name, namespace, resource["metadata"]["uid"])
        if self._uids.setdefault((namespace, name), owner.uid) != owner.uid:
            self._forget(namespace, name)  # another of the same name by now
        report = Report(int(resource["metadata"]["generation"]))
        again_s = _REST_S
        try:
            spec = parse_spec(resource["spec"])
        except InvalidManifest as error:
            report.set("PlanFeasible", "False", "InvalidSpec", str(error))
        else:
            again_s = await self._carry_out(owner, spec, report, resource.get("status", {}))
        await self._write_status(owner, resource, report)
        return again_s

    def _forget(self, namespace: str, name: str) -> None:
        """What was kept of a resource that is gone; its series would stand still for ever."""
        uid = self._uids.pop((namespace, name), "")
        self._memory.pop(uid, None)
        self._events.forget(uid)
        with suppress(KeyError):
            metrics.GPUS.remove(namespace, name)

    async def _carry_out(self, owner: Owner, spec: Spec, report: Report, old: Json) -> float:
        now_s = self._clock.now_s()
        memory = self._memory.setdefault(owner.uid, Memory())
        snap = await observe.snapshot(self._cluster, owner, now_s)
        report.paused = spec.paused
        looked = await self._look(owner, spec, snap, memory, now_s)
        if spec.paused:
            report.set("PlanFeasible", "Unknown", "Paused", "paused: nothing is planned or changed")
        else:
            snap = await self._decide(owner, spec, snap, memory, report, now_s, looked)
            _keep_advice(report, old)
            if not self._warm():
                _keep_judgement(report, old)
        again_s = seconds(spec.replan.interval) if spec.replan.mode != "Off" else _REST_S
        if snap.commits:
            latest = snap.commits[-1]
            if "PlanFeasible" not in report.conditions:
                _say_feasible(report, spec, latest.commit.plan)
            report.plan = report.plan or latest.commit.plan
            report.decision = report.decision or _decision(latest)
            report.url = manifests.url(owner)
            metrics.GPUS.labels(owner.namespace, owner.name).set(latest.commit.plan.gpus)
            again_s = min(again_s, await self._act(owner, spec, snap, report, now_s))
        else:
            report.set("Ready", "False", "NoPlan", "no plan is committed")
            report.set("Progressing", "False", "NoPlan", "nothing to carry out")
            again_s = min(again_s, _RETRY_S)
        self._say_traffic(spec, memory, report, old)
        return again_s if self._warm() else min(again_s, _WAIT_POLL_S)

    # ---- decide

    async def _look(
        self, owner: Owner, spec: Spec, snap: observe.Snapshot, memory: Memory, now_s: float
    ) -> bool:
        """Reads traffic once an interval; True when there is a new look to judge."""
        if spec.replan.mode == "Off":
            memory.traffic = memory.verdict = None
            return False
        if self._clock.monotonic_s() - memory.looked_s < seconds(spec.replan.interval):
            return False
        memory.looked_s = self._clock.monotonic_s()
        window_s = seconds(spec.replan.window)
        memory.traffic = await self._traffic.read(owner, now_s, window_s, spec.replan.breaches)
        if memory.traffic.unknown or not self._warm():
            memory.verdict = None  # held: what was seen before says nothing of now
            return False
        return bool(snap.commits)

    async def _decide(
        self,
        owner: Owner,
        spec: Spec,
        snap: observe.Snapshot,
        memory: Memory,
        report: Report,
        now_s: float,
        looked: bool,
    ) -> observe.Snapshot:
        """Commits another plan where one is due; returns the snapshot that the rest acts on."""
        why = why_replan(spec, snap, now_s)
        if why is None and looked and memory.traffic is not None:
            memory.verdict = await self._judge(spec, snap, memory.traffic, now_s)
        if why is not None:
            return await self._replan(owner, spec, snap, memory, report, why, now_s)
        verdict = memory.verdict
        if verdict is None or spec.replan.mode == "Off" or verdict.for_revision != snap.commits[-1].revision:
            return snap
        if verdict.limit:
            # Without figures: they change with every look, and a look alone is no reason to write.
            message = "no plan keeps the promise on the traffic that was seen; the committed plan goes on"
            report.set("PlanFeasible", "False", verdict.limit, message)
        if verdict.plan is None:
            return snap
        if spec.replan.mode == "Advise":
            report.proposal = Proposal(
                prefill=verdict.plan.plan.prefill,
                decode=verdict.plan.plan.decode,
                mixed=verdict.plan.plan.mixed,
                gpus=verdict.plan.plan.gpus,
                attainment=verdict.plan.plan.predicted.attainment,
                reason=verdict.reason,
            )
            report.decision = Decision(time=rfc3339(now_s), action="Advise", reason=verdict.reason)
            return snap
        return await self._replan(owner, spec, snap, memory, report, Why("Drift", verdict.reason), now_s)

    async def _judge(
        self, spec: Spec, snap: observe.Snapshot, traffic: drift.Traffic, now_s: float
    ) -> drift.Verdict:
        latest = snap.commits[-1]
        hour_ago = now_s - 3600
        history = drift.History(
            since_last_s=now_s - latest.created_s,
            in_last_hour=sum(c.commit.cause == "Drift" and c.created_s > hour_ago for c in snap.commits),
            revision=latest.revision,
        )
        facts = self._facts(snap, latest.commit.excluded_nodes, now_s)
        return await self._run(searching.judge, spec, latest.commit, traffic, history, facts)

    def _facts(self, snap: observe.Snapshot, excluded: Sequence[ExcludedNode], now_s: float) -> plan.Facts:
        """What placement reads, with exclusions that have not run out."""
        return plan.Facts(
            nodes=tuple(snap.nodes),
            pods=(*snap.pods, *snap.claims),
            own={i.uid: i.slot for i in snap.instances if i.alive},
            excluded={e.name: e.reason for e in excluded if parse_rfc3339(e.until) > now_s},
            not_ready=tuple(sorted(snap.lost_nodes(now_s))),
        )

    async def _replan(
        self,
        owner: Owner,
        spec: Spec,
        snap: observe.Snapshot,
        memory: Memory,
        report: Report,
        why: Why,
        now_s: float,
    ) -> observe.Snapshot:
        """Searches, checks the path, commits. Whatever fails leaves the committed plan in force and says why.

        Searches run side by side, commits one after another; who finds its GPUs taken meanwhile searches again.
        """
        if why.cause != "RollBack" and not self._warm():
            # Minutes at worst: the plan in force is carried out meanwhile, and status is kept.
            words = f"{why.reason}; planning begins when the search process has loaded the simulator"
            report.set("PlanFeasible", "Unknown", "WarmingUp", words)
            return snap
        latest = snap.commits[-1].commit if snap.commits else None
        excluded = (*(latest.excluded_nodes if latest else ()), *why.excluded)
        workload = (
            memory.traffic.latest(spec) if memory.traffic and plan.learned(spec, latest, why.cause) else None
        )
        try:
            for tries_left in reversed(range(_SEARCHES)):
                facts = self._facts(snap, excluded, now_s)
                if why.cause == "RollBack":
                    draft = plan.Draft(snap.commits[-2].commit.plan, snap.commits[-2].commit.instances, None)
                else:
                    draft = await self._search(spec, facts, workload, latest, memory)
                if draft.refusal:
                    report.plan = draft.plan  # explained, not committed
                    report.set("PlanFeasible", "False", "NotStartable", draft.refusal)
                    return snap
                if latest and why.cause == "Drift" and draft.instances == latest.instances:
                    return snap
                async with self._committing:
                    # Of several that want the same GPUs the first to commit has them: the others see its claim here.
                    snap = await observe.snapshot(self._cluster, owner, now_s)
                    now = self._facts(snap, excluded, now_s)
                    blocked = self._blocked(spec, snap, now, draft, latest)
                    if not blocked:
                        return await self._commit(owner, spec, snap, draft, why, excluded, now_s)
                if not tries_left or now.key() == facts.key():
                    break  # searched on what stands now, and it cannot be reached
            reason = f"{why.cause}: a new plan waits: {blocked}"
            report.decision = Decision(time=rfc3339(now_s), action="Hold", reason=reason[:4000])
            report.set("Progressing", "False", "HeldForGPUs", reason)
            await self._events.say(owner, "Warning", "Hold", reason, now_s, why.cause)
            return snap
        except Infeasible as error:
            await self._infeasible(owner, snap, report, error, why, now_s)
        except DisaggServeError as error:
            report.set("PlanFeasible", "False", type(error).__name__, str(error))
            await self._events.say(owner, "Warning", "NoPlan", str(error), now_s, why.cause)
        return snap

    async def _search(
        self,
        spec: Spec,
        facts: plan.Facts,
        workload: Workload | None,
        latest: Commit | None,
        memory: Memory,
    ) -> plan.Draft:
        """A plan from the search process. A search that failed is not repeated on the same inputs."""
        previous = latest.instances if latest else ()
        key = digest(
            [
                plan.inputs(spec),
                facts.key(),
                workload.source if workload else "",
                workload.rate if workload else 0,
            ]
        )
        if memory.failed and memory.failed[0] == key:
            raise memory.failed[1]
        try:
            draft = await self._run(searching.draft, spec, facts, workload, previous)
        except DisaggServeError as error:
            memory.failed = (key, error)
            raise
        memory.failed = None
        if draft.plan.search:
            metrics.SEARCH_SECONDS.observe(draft.plan.search.seconds)
        return draft

    def _blocked(
        self, spec: Spec, snap: observe.Snapshot, facts: plan.Facts, draft: plan.Draft, latest: Commit | None
    ) -> str:
        """Why the new plan cannot be reached with the GPUs that are free; empty when it can."""
        current = latest.instances if latest else ()
        limits = self._limits(spec, facts)
        return rollout.play(snap.instances, current, draft.instances, limits).blocked_by

    def _limits(self, spec: Spec, facts: plan.Facts) -> rollout.Limits:
        return rollout.Limits(
            free=plan.free_gpus(spec, facts),
            max_surge_gpus=spec.rollout.max_surge_gpus,
            drain_timeout_s=seconds(spec.rollout.drain_timeout),
        )

    async def _commit(
        self,
        owner: Owner,
        spec: Spec,
        snap: observe.Snapshot,
        draft: plan.Draft,
        why: Why,
        excluded: tuple[ExcludedNode, ...],
        now_s: float,
    ) -> observe.Snapshot:
        number = snap.commits[-1].revision + 1 if snap.commits else 1
        commit = Commit.model_validate(
            {
                "plan": draft.plan.model_copy(update={"revision": number}),
                "instances": draft.instances,
                "inputs": plan.inputs(spec),
                "workload_inputs": plan.workload_inputs(spec),
                "cause": why.cause,
                "reason": why.reason[:4000],
                "excluded_nodes": tuple(e for e in excluded if parse_rfc3339(e.until) > now_s),
            }
        )
        if not await commits.write(self._cluster, owner, commit):
            log.warning("%s/%s: revision %d was committed by another", owner.namespace, owner.name, number)
        else:
            metrics.COMMITS.labels(why.cause).inc()
            note = f"revision {number}: {plan.in_words(commit.plan)} ({why.reason})"
            reason = "Replan" if why.cause == "Drift" else "RollBack" if why.cause == "RollBack" else "Plan"
            await self._events.say(owner, "Normal", reason, note, now_s, str(number))
            log.info("%s/%s: %s", owner.namespace, owner.name, note)
        return await observe.snapshot(self._cluster, owner, now_s)

    async def _infeasible(
        self, owner: Owner, snap: observe.Snapshot, report: Report, error: Infeasible, why: Why, now_s: float
    ) -> None:
        reason, message = error.limit, str(error)
        if error.limit == "GPUs":
            others = searching.gpus_of_others(snap.pods, snap.claims, {i.uid for i in snap.instances})
            reason = "GPUsClaimed" if others else "InsufficientGPUs"
            if others:
                message += f"; {others} GPUs are held or claimed by others"
        report.set("PlanFeasible", "False", reason, message)
        await self._events.say(owner, "Warning", "Infeasible", message, now_s, why.cause)

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    # ---- act

    async def _act(
        self, owner: Owner, spec: Spec, snap: observe.Snapshot, report: Report, now_s: float
    ) -> float:
        """One step of the rollout; seconds after which to look again."""
        latest = snap.commits[-1]
        target = latest.commit.instances
        current = snap.commits[-2].commit.instances if len(snap.commits) > 1 else ()
        facts = self._facts(snap, latest.commit.excluded_nodes, now_s)
        instances = await asking.with_words(snap.instances, snap.routers, snap.own_pods)
        step = rollout.next_step(instances, current, target, self._limits(spec, facts))
        refused = ""
        if not spec.paused:
            try:
                step = await self._write(owner, spec, snap, step, now_s)
                await self._note_transports(owner, snap)
            except ApiError as error:
                if error.status not in _REFUSALS:
                    raise
                refused = str(error)
        self._say_progress(report, snap, instances, target, step, latest)
        if refused:
            message = f"the API server refuses what revision {latest.revision} needs: {refused}"
            report.set("Progressing", "False", "Refused", message)
            await self._events.say(owner, "Warning", "Refused", message, now_s)
            return _RETRY_S
        if any(i.drain_age_s is not None for i in instances) or step.acts:
            return _DRAIN_POLL_S
        return _WAIT_POLL_S if not step.done else _REST_S

    async def _write(
        self, owner: Owner, spec: Spec, snap: observe.Snapshot, step: rollout.Step, now_s: float
    ) -> rollout.Step:
        """Everything around the instances, then the step; returned with what turned out to hold it up. Raises ApiError."""
        latest = snap.commits[-1]
        context = plan.context_length(spec)
        await apply_all(self._cluster, manifests.around(owner, spec, context, self._settings.images))
        refused = await self._take(owner, spec, step, snap, context, now_s)
        budget = manifests.disruption_budget(owner, len(latest.commit.instances))
        await apply_all(self._cluster, [budget])
        await commits.prune(self._cluster, owner, snap.commits)
        return replace(step, waiting="; ".join([*refused, step.waiting] if step.waiting else refused))

    async def _take(
        self, owner: Owner, spec: Spec, step: rollout.Step, snap: observe.Snapshot, context: int, now_s: float
    ) -> list[str]:
        """Every write of a step is right on its own: killed between any two, the next reconcile takes the rest.

        Returns the words of workers that did not take their role.
        """
        latest = snap.commits[-1]
        for c in step.create:
            pod = manifests.worker_pod(
                owner, spec, c.slot, c.attempt, latest.revision, context, self._settings.images
            )
            await self._cluster.create(PODS, pod)
        refused = []
        for t in step.turn:
            why = await self._turn(owner, t, snap, latest.revision)
            if why:
                refused.append(why)
        for i in step.admit:
            change: Change = {"labels": {manifests.DRAIN: None}, "annotations": {manifests.DRAIN_SINCE: None}}
            await self._relabel(owner, i, change)
        for i in step.drain:
            change = {
                "labels": {manifests.DRAIN: "true"},
                "annotations": {manifests.DRAIN_SINCE: rfc3339(now_s)},
            }
            await self._relabel(owner, i, change)
        for i in step.delete:
            await self._cluster.delete(PODS, owner.namespace, i.name, i.uid)
        return refused

    async def _turn(self, owner: Owner, turn: rollout.Turn, snap: observe.Snapshot, revision: int) -> str:
        """The worker first, then its labels: whatever is cut off, the label never says more than the worker. Why not, in words."""
        if turn.instance.role_change == "door":
            pod = next(p for p in snap.own_pods if p["metadata"]["uid"] == turn.instance.uid)
            self._cluster.may_write()
            why = await asking.take_role(pod, turn.slot, revision)
            if why:
                return why
        chunk = None if turn.slot.chunk is None else str(turn.slot.chunk)
        labels = {manifests.ROLE: turn.slot.role, manifests.CHUNK: chunk, manifests.REVISION: str(revision)}
        if not await self._relabel(owner, turn.instance, {"labels": labels}):
            return f"{turn.instance.name} is gone, and did not become {turn.slot.role}"
        return ""

    async def _note_transports(self, owner: Owner, snap: observe.Snapshot) -> None:
        """On each pair by which transport its KV goes: that is known only from where it runs. Written where it differs."""
        pods = {p["metadata"]["uid"]: p for p in snap.own_pods}
        pairs = {i.uid: i for i in snap.instances if i.slot.role == "pair" and i.alive and i.ready}
        if not pairs:
            return
        for uid, way in (await asking.transports([pods[uid] for uid in pairs])).items():
            if _transport(pods[uid]) != way:
                await self._relabel(owner, pairs[uid], {"annotations": {manifests.TRANSPORT: way}})

    async def _relabel(self, owner: Owner, instance: rollout.Instance, change: Change) -> bool:
        """Whether the pod was still there; where not there is nothing to change, and the next look sees that."""
        body = {"metadata": {"uid": instance.uid, **change}}
        try:
            await self._cluster.merge(PODS, owner.namespace, instance.name, body)
        except ApiError as error:
            if error.status not in _GONE:
                raise
            return False
        return True

    # ---- say

    def _say_progress(
        self,
        report: Report,
        snap: observe.Snapshot,
        instances: Sequence[rollout.Instance],
        target: Sequence[Slot],
        step: rollout.Step,
        latest: Stored,
    ) -> None:
        serving = [i for i in instances if i.serves]
        router = any(
            condition(r["status"].get("conditions", []), "Ready").get("status") == "True"
            for r in snap.routers
        )
        ready = {i.slot.identity for i in serving}
        count = sum(s.identity in ready for s in target)
        what = "pairs" if latest.commit.plan.paired else "instances"
        words = f"{count} of {len(target)} planned {what} and {'a' if router else 'no'} router ready"
        words += _transports_in_words([_transport(p) for p in snap.own_pods], latest.commit.plan.setting)
        troubles = [
            f"{p['metadata']['name']}: {t}"
            for p in (*snap.own_pods, *snap.routers)
            if (t := observe.trouble(p))
        ]
        if troubles:
            words += "; " + "; ".join(troubles[:3])
        if rollout.readable(serving) and router:
            report.set("Ready", "True", "Serving", words)
        else:
            report.set("Ready", "False", "InstanceFailing" if troubles else "NotReady", words)
        if report.paused:
            report.set("Progressing", "False", "Paused", "paused: nothing is changed")
        elif step.done:
            if "Progressing" not in report.conditions:
                report.set("Progressing", "False", "Complete", f"revision {latest.revision} is carried out")
        else:
            doing = [
                f"{verb} {len(things)}"
                for verb, things in (
                    ("creating", step.create),
                    ("changing the role of", step.turn),
                    ("admitting", step.admit),
                    ("draining", step.drain),
                    ("deleting", step.delete),
                )
                if things
            ]
            text = "; ".join(filter(None, (", ".join(doing), step.waiting))) or step.blocked_by
            report.set(
                "Progressing", "True", "RollingOut", f"revision {latest.revision} is being carried out"
            )
            report.rollout = RolloutStatus(
                revision=latest.revision, step=text[:1000], blocked_by=step.blocked_by[:1000]
            )

    def _say_traffic(self, spec: Spec, memory: Memory, report: Report, old: Json) -> None:
        """MeetingSLO keeps its word while the interval holds the target: noise alone writes nothing."""
        traffic = memory.traffic
        if traffic is None:
            reason = "Off" if spec.replan.mode == "Off" else "NotLookedYet"
            report.set("MetricsFresh", "Unknown", reason, "traffic has not been looked at")
            report.set("MeetingSLO", "Unknown", reason, "traffic has not been looked at")
            return
        if traffic.unknown:
            report.set("MetricsFresh", "False", "Unknown", f"{traffic.unknown}; the plan is held")
            report.set("MeetingSLO", "Unknown", "MetricsUnknown", "traffic is unknown")
            return
        report.set("MetricsFresh", "True", "Fresh", "traffic is read from Prometheus")
        window = traffic.windows[0]
        before = condition(old.get("conditions", []), "MeetingSLO").get("status", "Unknown")
        truth = drift.meeting(window, spec.slo.attainment, before)
        words = {
            "True": f"at least {spec.slo.attainment:.0%} of requests meet the promise",
            "False": f"fewer than {spec.slo.attainment:.0%} of requests meet the promise",
            "Unknown": "too few requests to say",
        }
        report.set(
            "MeetingSLO", truth, {"True": "Met", "False": "Missed", "Unknown": "TooFew"}[truth], words[truth]
        )
        if window.lengths is not None:
            report.observed = Observed(
                rate=round(window.rate, 3),
                input_mean=round(float(window.lengths.input.mean()), 1),
                output_mean=round(float(window.lengths.output.mean()), 1),
                cv=round(window.cv, 2),
                attainment=window.attainment,
                requests=window.requests,
                window=spec.replan.window,
                emulated=bool(report.plan and report.plan.emulated),
            )

    async def _write_status(self, owner: Owner, resource: Json, report: Report) -> None:
        old = resource.get("status", {})
        new = report.status(old, self._clock.now_s())
        patch = merge_diff(old, new)
        if patch:
            body = {"metadata": {"uid": owner.uid}, "status": patch}
            await self._cluster.merge(RESOURCES, owner.namespace, owner.name, body, subresource="status")


def _transport(pod: Json) -> str:
    """By which a pair said that its KV goes; empty where it is none, or has not said."""
    return str(pod["metadata"].get("annotations", {}).get(manifests.TRANSPORT, ""))


def _transports_in_words(ways: Sequence[str], setting: Setting | None) -> str:
    used = sorted({way for way in ways if way})
    if not used:
        return ""
    planned = _INSIDE | {setting.link if setting else ""}
    slow = [way for way in used if way not in planned]
    fault = ", which is slower than the link inside a node that the plan reckons with" if slow else ""
    return f"; inside pairs KV goes by {' and '.join(used)}{fault}"


def _say_feasible(report: Report, spec: Spec, committed: Plan) -> None:
    """A plan by hand is carried out as given, whatever the simulator says of it; that is said."""
    attains, target = committed.predicted.attainment, spec.slo.attainment
    if committed.algorithm == "ByHand" and attains < target:
        message = f"the plan by hand is carried out, and misses the promise in simulation: {attains:.1%} of {target:.1%}"
        report.set("PlanFeasible", "False", "PlanByHandMisses", message)
    else:
        report.set("PlanFeasible", "True", "Planned", "the committed plan keeps the promise in simulation")


def _keep_advice(report: Report, old: Json) -> None:
    """The same advice with other figures is the same advice: it is not written again."""
    said, last = old.get("proposal"), old.get("lastDecision")
    if report.proposal is None or not said or not last or last["action"] != "Advise":
        return
    new = report.proposal
    if (said["prefill"], said["decode"], said.get("mixed", "")) == (new.prefill, new.decode, new.mixed):
        report.proposal = Proposal.model_validate(said)
        report.decision = Decision.model_validate(last)


def _keep_judgement(report: Report, old: Json) -> None:
    """What a look at the traffic had said stands until the next one can be judged: a restart alone writes nothing."""
    before = condition(old.get("conditions", []), "PlanFeasible")
    if before and "PlanFeasible" not in report.conditions:
        report.set("PlanFeasible", before["status"], before["reason"], before["message"])
    if "proposal" in old:
        report.proposal = Proposal.model_validate(old["proposal"])
        report.decision = Decision.model_validate(old["lastDecision"])


def _decision(stored: Stored) -> Decision:
    action = {"Spec": "Plan", "Nodes": "Plan", "Drift": "Replan", "RollBack": "RollBack"}[stored.commit.cause]
    return Decision.model_validate(
        {"time": rfc3339(stored.created_s), "action": action, "reason": stored.commit.reason}
    )

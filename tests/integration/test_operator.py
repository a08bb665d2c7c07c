"""The operator against a real API server: every write it makes, and what is left when it is killed between any two."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from disaggserve import drift, manifests
from disaggserve.cluster.client import KINDS, PODS, RESOURCES, REVISIONS
from e2e.controlplane import ControlPlane, ensure
from tests.integration.bench import CHAT, Bench, Killed, by_hand, carried_out, prepare
from tests.unit.test_drift import windows

T = TypeVar("T")


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    folder = tmp_path_factory.mktemp("operator")
    with ControlPlane(
        folder, ensure(), node_monitor_grace_period="1h"
    ) as plane:  # nobody renews these nodes' leases
        prepare(plane, {"gpu-0": 8, "gpu-1": 8})
        yield plane


@pytest.fixture
def bench(plane: ControlPlane) -> Callable[[Callable[[Bench], Awaitable[T]]], T]:
    """Runs a test's coroutine on a clean namespace."""

    def run(test: Callable[[Bench], Awaitable[T]]) -> T:
        async def whole() -> T:
            bench = await Bench.open(plane)
            try:
                return await test(bench)
            finally:
                await _clean(bench)
                await bench.close()

        return asyncio.run(whole())

    return run


async def _clean(bench: Bench) -> None:
    for name in [r["metadata"]["name"] for r in await bench.cluster.list(RESOURCES, "default")]:
        await bench.delete(name)
    await nothing_left(bench)


async def nothing_left(bench: Bench) -> None:
    """Waits until the garbage collector has taken everything of ours."""
    ours = "app.kubernetes.io/managed-by=disaggserve"
    left: list[str] = []
    for _ in range(600):
        await bench.kubelet()
        left = [
            o["metadata"]["name"]
            for kind in (PODS, REVISIONS, *KINDS.values())
            for o in await bench.cluster.list(kind, "default", labels=ours)
        ]
        routers = await bench.cluster.list(PODS, "default", labels="disaggserve.dev/role=router")
        if not left and not routers:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"left behind: {left}")


async def fingerprint(bench: Bench, name: str = "chat") -> Any:
    """What must be equal however often the operator was killed: names, nodes, labels, plan; no uids, no times."""
    workers = [
        (p["metadata"]["name"], p["spec"]["nodeName"], sorted(p["metadata"]["labels"].items()))
        for p in await bench.workers(name)
    ]
    revisions = [
        (r["metadata"]["name"], r["revision"]) for r in await bench.cluster.list(REVISIONS, "default")
    ]
    ours = "app.kubernetes.io/managed-by=disaggserve"
    around = [
        (k, o["metadata"]["name"])
        for k, kind in KINDS.items()
        for o in await bench.cluster.list(kind, "default", labels=ours)
    ]
    resource = await bench.resource(name)
    plan = {k: v for k, v in resource["status"]["plan"].items() if k != "search"}
    conditions = [(c["type"], c["status"], c["reason"]) for c in resource["status"]["conditions"]]
    return json.dumps([workers, sorted(revisions), sorted(around), plan, conditions], sort_keys=True)


def test_a_manifest_becomes_a_plan_and_pods(bench: Any) -> None:
    async def test(b: Bench) -> None:
        await b.apply(CHAT)
        resource = await b.settle(b.operator())
        plan = resource["status"]["plan"]
        assert plan["algorithm"] == "Joint"
        assert plan["gpus"] == 2
        assert plan["predicted"]["attainment"] >= 0.9
        assert resource["status"]["phase"] == "Ready"
        workers = await b.workers()
        assert (
            sum(int(p["spec"]["containers"][0]["resources"]["requests"]["nvidia.com/gpu"]) for p in workers)
            == 2
        )
        planned = {n["name"] for r in plan["roles"] for n in r["nodes"]}
        assert {p["spec"]["nodeName"] for p in workers} == planned
        assert all(p["metadata"]["ownerReferences"][0]["uid"] == resource["metadata"]["uid"] for p in workers)

    bench(test)


def test_a_low_affinity_plan_becomes_pairs_that_say_how_their_kv_goes(bench: Any) -> None:
    low = {**CHAT, "spec": {**CHAT["spec"], "planner": {"algorithm": "LowAffinity"}}}

    def says(*words: str) -> Callable[[Any], bool]:
        def holds(resource: Any) -> bool:
            said = next(c for c in resource["status"]["conditions"] if c["type"] == "Ready")["message"]
            return carried_out(resource) and all(w in said for w in words)

        return holds

    async def test(b: Bench) -> None:
        doors = b.open_doors()
        await b.apply(low)
        operator = b.operator()
        resource = await b.settle(operator, until=says("planned pairs and a router ready"))
        plan = resource["status"]["plan"]
        assert (plan["algorithm"], plan["paired"]) == ("LowAffinity", True)
        pods = await b.workers()
        assert len(pods) == plan["roles"][0]["count"] == plan["roles"][1]["count"]
        assert {p["metadata"]["labels"]["disaggserve.dev/role"] for p in pods} == {"pair"}
        assert (
            sum(int(p["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) for p in pods)
            == (plan["gpus"])
        )
        for door in doors.workers.values():
            door.transport = "shm"
        resource = await b.settle(operator, until=says("; inside pairs KV goes by shm"))
        before = operator.writes
        for _ in range(3):
            await operator.reconcile()
        assert operator.writes == before
        # One that cannot be asked has not changed; one that says something else is believed.
        for door in doors.workers.values():
            door.transport = None
        await operator.reconcile()
        assert operator.writes == before
        for door in doors.workers.values():
            door.transport = "zmq"
        await b.settle(operator, until=says("by zmq, which is slower than the link inside a node"))
        # To instances that stand apart and back: pairs are made and go, none is turned.
        for algorithm, expected in (("HighAffinity", {"prefill", "decode"}), ("LowAffinity", {"pair"})):
            await b.apply({**CHAT, "spec": {**CHAT["spec"], "planner": {"algorithm": algorithm}}})
            await b.settle(operator)
            labels = [p["metadata"]["labels"] for p in await b.workers()]
            assert {found["disaggserve.dev/role"] for found in labels} == expected
        assert not [turn for door in doors.workers.values() for turn in door.turns]

    bench(test)


def test_ten_idle_reconciles_write_nothing(bench: Any, plane: ControlPlane) -> None:
    async def test(b: Bench) -> None:
        await b.apply(CHAT)
        operator = b.operator()
        await b.settle(operator)
        await operator.reconcile()
        before = operator.writes
        version = (await b.resource())["metadata"]["resourceVersion"]
        for _ in range(10):
            await operator.reconcile()
        assert operator.writes == before
        assert (await b.resource())["metadata"]["resourceVersion"] == version

    bench(test)


def test_status_deleted_by_hand_comes_back_and_nothing_else_moves(bench: Any, plane: ControlPlane) -> None:
    async def test(b: Bench) -> None:
        await b.apply(CHAT)
        operator = b.operator()
        await b.settle(operator)
        before = await fingerprint(b)
        plane.kubectl(
            "patch",
            "dsv",
            "chat",
            "--subresource=status",
            "--type=json",
            "-p",
            '[{"op":"remove","path":"/status"}]',
        )
        assert "status" not in await b.resource()
        writes = operator.writes
        await operator.reconcile()
        assert await fingerprint(b) == before
        assert operator.writes == writes + 1

    bench(test)


def test_an_edited_promise_changes_the_plan(bench: Any) -> None:
    async def test(b: Bench) -> None:
        await b.apply(CHAT)
        operator = b.operator()
        first = await b.settle(operator)
        slo = {"ttft": "80ms", "tpot": "30ms"}
        await b.apply({**CHAT, "spec": {**CHAT["spec"], "slo": slo, "rollout": {"drainTimeout": "1ms"}}})
        second = await b.settle(operator)
        assert second["status"]["plan"]["revision"] == 2
        assert second["status"]["plan"]["roles"] != first["status"]["plan"]["roles"]
        assert second["status"]["plan"]["setting"]["ttft"] == 0.08

    bench(test)


@pytest.mark.parametrize(("prefill", "decode"), [(1, 3), (2, 2), (1, 1)])
def test_a_plan_that_differs_by_one_instance_touches_exactly_one(
    bench: Any, prefill: int, decode: int
) -> None:
    async def test(b: Bench) -> None:
        await b.apply(by_hand(1, 2))
        operator = b.operator()
        await b.settle(operator)
        before = {p["metadata"]["uid"] for p in await b.workers()}
        # without a router that answers, drain ends by its timeout
        await b.apply(by_hand(prefill, decode, rollout={"drainTimeout": "1ms"}))
        await b.settle(operator)
        after = {p["metadata"]["uid"] for p in await b.workers()}
        assert (len(after - before), len(before - after)) == ((1, 0) if prefill + decode > 3 else (0, 1))

    bench(test)


async def roles(b: Bench) -> dict[str, str]:
    return {p["metadata"]["uid"]: p["metadata"]["labels"]["disaggserve.dev/role"] for p in await b.workers()}


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_a_plan_that_differs_by_one_role_turns_one_pod(bench: Any, engine: str) -> None:
    async def test(b: Bench) -> None:
        doors = b.open_doors()
        await b.apply(by_hand(2, 1, engine={"type": engine}))
        operator = b.operator()
        await b.settle(operator)
        before = await roles(b)
        await b.apply(by_hand(1, 2, engine={"type": engine}))
        resource = await b.settle(operator)
        after = await roles(b)
        assert before.keys() == after.keys(), "no pod is created or deleted"
        (turned,) = (uid for uid in before if before[uid] != after[uid])
        assert (before[turned], after[turned]) == ("prefill", "decode")
        assert (resource["status"]["plan"]["prefill"], resource["status"]["plan"]["decode"]) == (
            "1×tp1",
            "2×tp1",
        )
        told = {uid: door.turns for uid, door in doors.workers.items() if door.turns}
        assert told == ({turned: [("decode", 2)]} if engine == "torch" else {})
        pods = {p["metadata"]["uid"]: p["metadata"]["labels"] for p in await b.workers()}
        assert "disaggserve.dev/drain" not in pods[turned]
        revisions = {labels["disaggserve.dev/revision"] for uid, labels in pods.items() if uid != turned}
        assert (pods[turned]["disaggserve.dev/revision"], revisions) == ("2", {"1"})
        writes = operator.writes
        await operator.reconcile()
        assert operator.writes == writes

    bench(test)


def test_a_worker_that_still_holds_something_is_not_turned_and_says_so(bench: Any) -> None:
    async def test(b: Bench) -> None:
        doors = b.open_doors()
        await b.apply(by_hand(2, 1))
        operator = b.operator()
        await b.settle(operator)
        before = await roles(b)
        for door in doors.workers.values():
            door.held = 3
        await b.apply(by_hand(1, 2))

        def said(resource: Any) -> bool:
            return "HTTP 409" in resource["status"].get("rollout", {}).get("step", "")

        resource = await b.settle(operator, until=said)
        assert '"running": 3' in resource["status"]["rollout"]["step"]
        assert await roles(b) == before, "the label never says more than the worker"
        # A worker that began anew in its old role, or one that another writer told, is found out before it is admitted.
        for door in doors.workers.values():
            door.held = 0
        draining = ("disaggserve.dev/drain", "true")
        await b.settle(operator, until=lambda r: any(d.turns for d in doors.workers.values()))
        turned = next(d for d in doors.workers.values() if d.turns)
        assert [draining in p["metadata"]["labels"].items() for p in await b.workers()].count(True) == 1
        turned.role, turned.epoch = "prefill", 0
        await b.settle(operator)
        assert turned.turns == [("decode", 2)] * 2
        assert sorted((await roles(b)).values()) == ["decode", "decode", "prefill"]

    bench(test)


@pytest.mark.parametrize("change", ["drain", "turn", "admit"])
def test_a_pod_that_goes_before_its_patch_is_replaced_and_nothing_is_refused(bench: Any, change: str) -> None:
    labels: dict[str, Callable[[Any], bool]] = {
        "drain": lambda labels: labels.get(manifests.DRAIN) == "true",
        "turn": lambda labels: manifests.ROLE in labels,
        "admit": lambda labels: manifests.DRAIN in labels and labels[manifests.DRAIN] is None,
    }
    lost: list[str] = []
    said: list[str] = []

    async def test(b: Bench) -> None:
        async def goes(pod: str, patch: Any) -> None:
            if not lost and labels[change](patch["metadata"].get("labels", {})):
                lost.append(pod)
                await b.vanish(pod)

        def ends(resource: Any) -> bool:
            conditions = {c["type"]: c for c in resource["status"]["conditions"]}
            assert conditions["Progressing"]["reason"] != "Refused"
            said.append(resource["status"].get("rollout", {}).get("step", ""))
            return carried_out(resource)

        b.open_doors()
        await b.apply(by_hand(2, 1))
        operator = b.operator()
        await b.settle(operator)
        operator.before_patch(goes)
        await b.apply(by_hand(1, 2))
        await b.settle(operator, until=ends)
        assert sorted((await roles(b)).values()) == ["decode", "decode", "prefill"]

    bench(test)
    (pod,) = lost
    noticed = any(f"{pod} is gone, and did not become decode" in words for words in said)
    assert noticed == (change == "turn")


def test_deleted_in_mid_rollout_leaves_nothing(bench: Any) -> None:
    async def test(b: Bench) -> None:
        await b.apply(CHAT)
        operator = b.operator()
        await operator.reconcile()
        assert await b.workers()
        await b.delete()
        assert await operator.reconcile() is None
        await nothing_left(b)

    bench(test)


@pytest.mark.timeout(240)
def test_killed_before_every_write_the_end_is_the_same(bench: Any) -> None:
    async def test(b: Bench) -> None:
        await _killed_before_every_write(b, lambda: b.apply(CHAT), b.settle, at_least=8)

    bench(test)


def _second_revision(b: Bench) -> Callable[[Any], Awaitable[None]]:
    """Until an operator has carried out the second plan."""

    async def changed(operator: Any) -> None:
        await b.settle(operator, until=lambda r: carried_out(r) and r["status"]["plan"]["revision"] == 2)

    return changed


async def _killed_before_every_write(
    b: Bench,
    begin: Callable[[], Awaitable[Any]],
    carry_out: Callable[[Any], Awaitable[Any]],
    *,
    at_least: int,
    check: Callable[[Any], Awaitable[None]] | None = None,
) -> None:
    """Whichever write an operator dies before, another ends as one that was left alone. `check`: of what `begin` gave."""
    await begin()
    undisturbed = b.operator()
    await carry_out(undisturbed)
    wanted, writes = await fingerprint(b), undisturbed.writes
    await _clean(b)
    assert writes >= at_least
    for n in range(writes):
        begun = await begin()
        with pytest.raises(Killed):
            await carry_out(b.operator(dies_before_write=n))
        await carry_out(b.operator())
        assert await fingerprint(b) == wanted, f"killed before write {n}"
        if check:
            await check(begun)
        await _clean(b)


@pytest.mark.timeout(240)
def test_killed_before_every_write_of_a_change_the_end_is_the_same(bench: Any) -> None:
    """One instance less and other ones in place of the rest: drain, create, delete, commit and status are all cut."""

    async def test(b: Bench) -> None:
        rollout = {"drainTimeout": "1ms"}
        first = by_hand(1, 2, rollout=rollout)
        second = by_hand(1, 1, rollout=rollout, engine={"type": "torch", "args": ["--kv-blocks=64"]})

        async def begin() -> None:
            await b.apply(first)
            await b.settle(b.operator())
            await b.apply(second)

        await _killed_before_every_write(b, begin, _second_revision(b), at_least=10)

    bench(test)


@pytest.mark.timeout(240)
def test_killed_before_every_write_of_a_role_change_the_end_is_the_same(bench: Any) -> None:
    """The worker's door is one of the writes: killed before it, and between it and the label."""

    async def test(b: Bench) -> None:
        doors = b.open_doors()

        async def begin() -> set[str]:
            doors.workers.clear()
            await b.apply(by_hand(2, 1))
            await b.settle(b.operator())
            await b.apply(by_hand(1, 2))
            return {p["metadata"]["uid"] for p in await b.workers()}

        async def check(pods: set[str]) -> None:
            assert {p["metadata"]["uid"] for p in await b.workers()} == pods
            assert sorted((d.role, d.epoch) for d in doors.workers.values()) == [
                ("decode", 0),
                ("decode", 2),
                ("prefill", 0),
            ]

        await _killed_before_every_write(b, begin, _second_revision(b), at_least=8, check=check)

    bench(test)


class TwoAtOnce(ThreadPoolExecutor):
    """The first two searches end only when both have begun."""

    def __init__(self) -> None:
        super().__init__(2)
        self.begun, self._both = 0, threading.Barrier(2, timeout=60)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        self.begun += 1
        together = self.begun <= 2

        def search() -> T:
            if together:
                self._both.wait()
            return fn(*args, **kwargs)

        return super().submit(search)


def test_two_resources_that_want_the_same_gpus(bench: Any) -> None:
    async def test(b: Bench) -> None:
        first, second = by_hand(5, 5), by_hand(5, 5)
        second = {**second, "metadata": {"name": "late", "namespace": "default"}}
        await b.apply(first)
        await b.apply(second)
        searches = TwoAtOnce()
        operator = b.operator(pool=searches)
        await asyncio.gather(operator.reconcile("chat"), operator.reconcile("late"))
        assert searches.begun == 3, "both searched at once on what was free, and who lost searched again"
        await b.settle(operator, "chat" if (await b.workers("chat")) else "late")
        names = [n for n in ("chat", "late") if await b.workers(n)]
        assert len(names) == 1, "one got them"
        loser = "late" if names == ["chat"] else "chat"
        await operator.reconcile(loser)
        conditions = {c["type"]: c for c in (await b.resource(loser))["status"]["conditions"]}
        assert (conditions["PlanFeasible"]["status"], conditions["PlanFeasible"]["reason"]) == (
            "False",
            "GPUsClaimed",
        )
        assert names[0] not in conditions["PlanFeasible"]["message"], "no other tenant is named"
        pods = await b.cluster.list(PODS, "default", labels="app.kubernetes.io/component=worker")
        assert all(p["spec"].get("nodeName") for p in pods), "no pod is left pending"
        # when the winner goes, the loser gets them
        await b.delete(names[0])
        for _ in range(100):
            await b.kubelet()
            if not await b.workers(names[0]):
                break
            await asyncio.sleep(0.1)
        await b.settle(operator, loser)

    bench(test)


def test_no_spare_gpus_holds_the_old_plan_and_says_how_many(bench: Any) -> None:
    async def test(b: Bench) -> None:
        await b.apply(by_hand(6, 6))
        operator = b.operator()
        await b.settle(operator)
        # other arguments mean other pods: twelve more GPUs, four are free, and a surge of none
        changed = by_hand(
            6, 6, rollout={"maxSurgeGPUs": 0}, engine={"type": "torch", "args": ["--max-batch=8"]}
        )
        await b.apply(changed)
        await operator.reconcile()
        resource = await b.resource()
        conditions = {c["type"]: c for c in resource["status"]["conditions"]}
        assert conditions["Progressing"]["reason"] == "HeldForGPUs", conditions
        assert "GPUs" in conditions["Progressing"]["message"]
        assert resource["status"]["lastDecision"]["action"] == "Hold"
        assert resource["status"]["plan"]["revision"] == 1
        assert len(await b.workers()) == 12

    bench(test)


def test_traffic_that_the_plan_cannot_carry_changes_it_once_or_is_advised(bench: Any) -> None:
    """Three windows of prompts three times longer, as Prometheus would tell them."""

    async def test(b: Bench) -> None:
        replan = {"interval": "1ms", "window": "60s", "minDwell": "0s", "mode": "Advise"}
        advised = {**CHAT, "spec": {**CHAT["spec"], "replan": replan, "rollout": {"drainTimeout": "1ms"}}}
        await b.apply(advised)
        operator = b.operator()
        operator.sees(drift.Traffic((), "no Prometheus is configured"))
        first = await b.settle(operator)
        said = {c["type"]: c for c in first["status"]["conditions"]}["MetricsFresh"]
        assert (said["status"], said["message"]) == ("False", "no Prometheus is configured; the plan is held")

        operator.sees(windows(1.0))
        await operator.reconcile()
        status = (await b.resource())["status"]
        assert status["plan"]["revision"] == 1
        assert status["proposal"]["gpus"] > status["plan"]["gpus"]
        assert status["lastDecision"]["action"] == "Advise"
        writes = operator.writes
        await operator.reconcile()
        assert operator.writes == writes, "the same advice is not written again"

        await b.apply({**advised, "spec": {**advised["spec"], "replan": {**replan, "mode": "Auto"}}})
        changed = await b.settle(
            operator, until=lambda r: carried_out(r) and r["status"]["plan"]["revision"] == 2
        )
        assert changed["status"]["lastDecision"]["action"] == "Replan"
        assert changed["status"]["plan"]["gpus"] == status["proposal"]["gpus"]
        assert changed["status"]["plan"]["workload"]["source"].startswith("observed")
        assert "proposal" not in changed["status"]
        for _ in range(3):
            await operator.reconcile()
        assert (await b.resource())["status"]["plan"]["revision"] == 2, "the new plan carries what is seen"

    bench(test)


def test_before_the_simulator_is_loaded_all_but_planning_goes_on(bench: Any) -> None:
    async def test(b: Bench) -> None:
        cold = b.operator(warm=lambda: False)
        await b.apply(CHAT)
        await cold.reconcile()
        said = {c["type"]: c for c in (await b.resource())["status"]["conditions"]}["PlanFeasible"]
        assert (said["status"], said["reason"]) == ("Unknown", "WarmingUp")
        await b.settle(b.operator())
        before = await fingerprint(b)
        writes = cold.writes
        await cold.reconcile()
        assert cold.writes == writes, "a restart alone writes nothing"
        victim = (await b.workers())[0]
        await b.cluster.delete(PODS, "default", victim["metadata"]["name"], victim["metadata"]["uid"])
        await b.settle(
            cold, until=lambda r: carried_out(r) and r["status"]["conditions"][0]["status"] == "True"
        )
        after = await fingerprint(b)
        assert json.loads(after)[3:] == json.loads(before)[3:], (
            "the pod is replaced, the plan and its state are kept"
        )
        assert len(await b.workers()) == 2

    bench(test)


def test_a_plan_that_does_not_get_ready_in_time_is_rolled_back(bench: Any) -> None:
    async def test(b: Bench) -> None:
        await b.apply(by_hand(1, 1))
        operator = b.operator()
        await b.settle(operator)
        before = {p["metadata"]["uid"] for p in await b.workers()}
        engine = {"type": "torch", "args": ["--kv-blocks=64"]}
        await b.apply(by_hand(1, 1, engine=engine, rollout={"readyTimeout": "1ms"}))
        for _ in range(100):  # and no kubelet makes the new ones ready
            await operator.reconcile()
            if (await b.resource())["status"]["plan"]["revision"] == 3:
                break
            await asyncio.sleep(0.05)
        resource = await b.settle(operator)
        assert resource["status"]["plan"]["revision"] == 3
        assert resource["status"]["lastDecision"]["action"] == "RollBack"
        assert "not ready within 1ms" in resource["status"]["lastDecision"]["reason"]
        assert {p["metadata"]["uid"] for p in await b.workers()} == before, "the old ones were never touched"

    bench(test)


def test_a_node_that_takes_no_pod_is_left_out_for_a_while(bench: Any) -> None:
    async def test(b: Bench) -> None:
        engine = {"type": "torch", "pod": {"schedulerName": "nobody"}}
        spec = {**CHAT["spec"], "engine": engine, "rollout": {"scheduleTimeout": "1ms"}}
        await b.apply({**CHAT, "spec": spec})
        operator = b.operator()
        tried: list[set[str]] = []
        for _ in range(100):
            await operator.reconcile()
            status = (await b.resource())["status"]
            nodes = {n["name"] for r in status["plan"]["roles"] for n in r["nodes"]}
            if nodes not in tried:
                tried.append(nodes)
            said = {c["type"]: c for c in status["conditions"]}["PlanFeasible"]
            if said["status"] == "False":
                break
            await asyncio.sleep(0.05)
        assert tried == [{"gpu-0"}, {"gpu-1"}]
        assert "no word from the scheduler" in said["message"]
        assert status["plan"]["revision"] == 2, "what is committed stays until there is something better"

    bench(test)


def test_what_the_api_server_refuses_is_a_condition(bench: Any, plane: ControlPlane) -> None:
    async def test(b: Bench) -> None:
        label = "pod-security.kubernetes.io/enforce"
        plane.kubectl("label", "namespace", "default", f"{label}=restricted")
        try:
            weights = {"hostPath": {"path": "/mnt/opt"}}
            on_host = by_hand(1, 1, model={"id": "facebook/opt-13b", "weights": weights})
            await b.apply(on_host)
            operator = b.operator()
            await operator.reconcile()
            said = {c["type"]: c for c in (await b.resource())["status"]["conditions"]}["Progressing"]
            assert (said["status"], said["reason"]) == ("False", "Refused")
            assert "hostPath" in said["message"]
            before = operator.writes
            await operator.reconcile()
            assert operator.writes == before + 1, "the pod is tried again, and nothing is said twice"
        finally:
            plane.kubectl("label", "namespace", "default", f"{label}-")
        await b.settle(operator)

    bench(test)


def test_a_plan_by_hand_that_misses_the_promise_is_carried_out_and_said(bench: Any) -> None:
    async def test(b: Bench) -> None:
        await b.apply(by_hand(1, 1, workload={"rate": 50, "lengths": {"preset": "sharegpt"}}))
        resource = await b.settle(b.operator())
        said = {c["type"]: c for c in resource["status"]["conditions"]}["PlanFeasible"]
        assert (said["status"], said["reason"]) == ("False", "PlanByHandMisses")
        assert resource["status"]["phase"] == "Degraded"
        assert len(await b.workers()) == 2

    bench(test)


def test_paused_writes_nothing_but_status(bench: Any) -> None:
    async def test(b: Bench) -> None:
        await b.apply({**CHAT, "spec": {**CHAT["spec"], "paused": True}})
        operator = b.operator()
        for _ in range(3):
            await operator.reconcile()
        assert operator.writes == 1
        assert not await b.workers()
        assert (await b.resource())["status"]["phase"] == "Paused"
        await b.apply(CHAT)
        await b.settle(operator)

    bench(test)


def test_a_cordoned_node_is_left(bench: Any, plane: ControlPlane) -> None:
    async def test(b: Bench) -> None:
        await b.apply({**CHAT, "spec": {**CHAT["spec"], "rollout": {"drainTimeout": "1ms"}}})
        operator = b.operator()
        resource = await b.settle(operator)
        used = resource["status"]["plan"]["roles"][0]["nodes"][0]["name"]
        plane.kubectl("cordon", used)
        try:
            after = await b.settle(
                operator, until=lambda r: carried_out(r) and r["status"]["plan"]["revision"] == 2
            )
            assert all(n["name"] != used for r in after["status"]["plan"]["roles"] for n in r["nodes"])
            assert any(
                n["name"] == used and "cordoned" in n["reason"]
                for n in after["status"]["plan"]["refusedNodes"]
            )
        finally:
            plane.kubectl("uncordon", used)

    bench(test)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"model": {"id": "nobody/knows"}}, "InvalidManifest", "nobody/knows"),
        ({"hardware": {"nodeSelector": {"pool": "none"}}}, "Nodes", "pool"),
        ({"slo": {"ttft": "1ms", "tpot": "100ms"}}, "TTFT", "TTFT"),
        (
            {
                "model": {"id": "facebook/opt-175b"},
                "slo": {"ttft": "4s", "tpot": "200ms"},
                "hardware": {"maxGPUs": 2},
            },
            "InsufficientGPUs",
            "maxGPUs is 2",
        ),
    ],
)
def test_what_cannot_be_planned_is_a_condition_and_leaves_nothing(
    bench: Any, change: Any, kind: str, words: str
) -> None:
    async def test(b: Bench) -> None:
        await b.apply({**CHAT, "spec": {**CHAT["spec"], **change}})
        operator = b.operator()
        await operator.reconcile()
        await operator.reconcile()
        conditions = {c["type"]: c for c in (await b.resource())["status"]["conditions"]}
        assert conditions["PlanFeasible"]["status"] == "False", conditions
        assert conditions["PlanFeasible"]["reason"].startswith(kind)
        assert words in conditions["PlanFeasible"]["message"]
        assert not await b.workers()
        assert not await b.cluster.list(REVISIONS, "default")

    bench(test)

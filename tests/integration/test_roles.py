"""A plan by hand that differs by one role, on real parts under traffic: no pod comes or goes, no request fails."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from e2e import load
from e2e.stack import Stack, carried_out
from tests.integration.traffic import during

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MODEL = "facebook/opt-13b"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("roles")) as made:
        yield made


def resource(engine: str, prefill: int, decode: int) -> Json:
    shape = {"tp": 1, "pp": 1}
    spec = {
        "model": {"id": MODEL},
        "slo": {"ttft": "2s", "tpot": "500ms"},
        "workload": {"rate": 1, "lengths": {"preset": "humaneval"}},
        "engine": {"type": engine},
        "replan": {"mode": "Off"},
        "plan": {
            "roles": [
                {"role": "prefill", "count": prefill, **shape},
                {"role": "decode", "count": decode, **shape},
            ]
        },
    }
    return {
        "apiVersion": "disaggserve.dev/v1alpha1",
        "kind": "DisaggServe",
        "metadata": {"name": engine},
        "spec": spec,
    }


def roles(stack: Stack, name: str) -> dict[str, str]:
    workers = [p for p in stack.pods(name) if "disaggserve.dev/slot" in p["metadata"]["labels"]]
    return {p["metadata"]["uid"]: p["metadata"]["labels"]["disaggserve.dev/role"] for p in workers}


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_roles_follow_a_plan_by_hand_under_traffic(stack: Stack, engine: str) -> None:
    stack.apply(resource(engine, 2, 1))
    stack.wait(engine, "two prefill and one decode to serve", carried_out(1), timeout_s=180)
    before = roles(stack, engine)
    assert sorted(before.values()) == ["decode", "prefill", "prefill"]

    def change() -> None:
        for revision, plan in ((2, (1, 2)), (3, (2, 1)), (4, (1, 2))):
            stack.apply(resource(engine, *plan))
            stack.wait(engine, f"revision {revision} to be carried out", carried_out(revision), timeout_s=120)
            now = roles(stack, engine)
            assert now.keys() == before.keys(), "no pod is created or deleted"
            assert sorted(now.values()).count("prefill") == plan[0]

    wanted = [(0.25 * n, 100 + n % 7, 30 + n % 11) for n in range(400)]
    results = during(stack.url(engine), MODEL, wanted, change)
    assert len(results) >= 20
    assert {r.outcome for r in results} == {"ok"}, [r.error for r in results if r.outcome != "ok"]

    if engine == "torch":
        # One that was made for prefill, became a decode and starts again is a decode.
        turned = next(uid for uid, role in roles(stack, engine).items() if role != before[uid])
        pod = next(p for p in stack.pods(engine) if p["metadata"]["uid"] == turned)
        stack.crash(pod["metadata"]["name"], timeout_s=90)
        with urllib.request.urlopen(f"http://{pod['status']['podIP']}:8000/state", timeout=10) as answer:
            assert json.load(answer)["role"] == "decode"
    stack.plane.kubectl("delete", "dsv", engine, "--wait=true")


def test_mixed_instances_of_vllm_answer_alone(stack: Stack) -> None:
    document = resource("vllm", 1, 1)
    document["metadata"]["name"] = "both"
    document["spec"]["plan"] = {"roles": [{"role": "mixed", "count": 2, "tp": 1, "pp": 1, "chunk": 512}]}
    stack.apply(document)
    found = stack.wait("both", "two mixed instances to serve", carried_out(1), timeout_s=180)
    assert found["status"]["plan"]["mixed"] == "2×tp1 with chunks of 512"
    assert sorted(roles(stack, "both").values()) == ["mixed", "mixed"]
    wanted = [(0.2 * n, 600 if n % 5 == 0 else 100, 20) for n in range(30)]
    results = asyncio.run(load.run_load(stack.url("both"), MODEL, wanted, vocab=256, seed=2))
    assert {r.outcome for r in results} == {"ok"}, [r.error for r in results if r.outcome != "ok"]
    used = [p["status"]["podIP"] for p in stack.pods("both", "mixed")]
    with urllib.request.urlopen(stack.url("both") + "/drain", timeout=10) as answer:
        view = json.load(answer)["instances"]
    assert len(used) == len(view) == 2
    assert all((v["admitting"], v["in_flight"], v["leased"]) == (True, 0, 0) for v in view.values())
    stack.plane.kubectl("delete", "dsv", "both", "--wait=true")

"""The whole path on real parts: chart, operator process, scheduler, simulated nodes, workers, router, Prometheus.

The cases build on each other in order, as a day of one installation does.
"""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from disaggserve.workload import Workload, preset
from e2e import load
from e2e.controlplane import writes
from e2e.controlplane.polling import wait_until
from e2e.stack import NAMESPACE, ROOT, Stack, condition, ready

OPERATOR = f"system:serviceaccount:{NAMESPACE}:disaggserve-operator"
EXAMPLE = ROOT / "examples/chat.yaml"
MODEL = "facebook/opt-13b"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("path"), scrape_s=1) as stack:
        stack.apply(EXAMPLE)
        yield stack


def post(stack: Stack, path: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(stack.url("chat") + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def requests(duration_s: float, seed: int) -> list[tuple[float, int, int]]:
    lengths = preset("sharegpt").scaled(0.2, 2048)
    drawn = Workload(rate=4.0, cv=1.0, lengths=lengths).requests(duration_s, seed)
    return [
        (a / 1e9, int(i), min(int(o), 60))
        for a, i, o in zip(drawn.arrival_ns, drawn.input, drawn.output, strict=True)
    ]


def drive(stack: Stack, duration_s: float, seed: int) -> list[load.Result]:
    return asyncio.run(
        load.run_load(stack.url("chat"), MODEL, requests(duration_s, seed), vocab=256, seed=seed)
    )


def operator_writes(stack: Stack) -> list[str]:
    """What the operator wrote so far, but for its lease."""
    found = [w for w in writes(stack.plane.audit_log) if w.user == OPERATOR and w.resource != "leases"]
    return [f"{w.verb} {w.resource} {w.name}" for w in found]


def test_a_manifest_becomes_tokens(stack: Stack) -> None:
    resource = stack.wait("chat", "chat to be ready", ready, timeout_s=120)
    plan = resource["status"]["plan"]
    assert plan["emulated"] is True
    assert plan["algorithm"] == "Joint"
    workers = [p for p in stack.pods("chat") if "disaggserve.dev/slot" in p["metadata"]["labels"]]
    assert len(workers) == sum(r["count"] for r in plan["roles"])
    asked = {"model": MODEL, "prompt": "a prompt", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    status, answer = post(stack, "/v1/completions", asked)
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 12
    again = post(stack, "/v1/completions", asked)[1]
    assert again["choices"][0]["text"] == answer["choices"][0]["text"], "greedy is repeatable"
    chat = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        "ignore_eos": True,
    }
    status, answer = post(stack, "/v1/chat/completions", chat)
    assert (status, answer["choices"][0]["message"]["role"]) == (200, "assistant")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "other", "prompt": "x"}, 404, "other"),
        ({"model": MODEL, "prompt": [5] * 3000}, 400, "2048"),
        ({"model": MODEL, "prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        (b"{", 400, "JSON"),
        ({"model": MODEL, "prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias"),
    ],
)
def test_bad_requests_get_openais_error_shape(stack: Stack, body: Any, status: int, words: str) -> None:
    code, answer = post(stack, "/v1/completions", body)
    assert code == status, answer
    assert set(answer["error"]) >= {"message", "type", "param", "code"}
    assert words in answer["error"]["message"]


def test_steady_traffic_writes_nothing_and_reaches_prometheus(stack: Stack) -> None:
    settled = "increase(disaggserve_operator_reconciles_total[15s])"
    wait_until(lambda: bool(stack.prometheus.query(settled)), "the operator to be scraped", timeout_s=60)
    begun, measured = 0, asyncio.Event()
    before: list[str] = []

    def on_result(_: load.Result) -> None:
        nonlocal begun, before
        begun += 1
        # By then the window is full of this traffic, and MetricsFresh and MeetingSLO have found their word.
        if begun == 110:
            before = operator_writes(stack)
            measured.set()

    sent = requests(50, 2)
    results = asyncio.run(
        load.run_load(stack.url("chat"), MODEL, sent, vocab=256, seed=2, on_result=on_result)
    )
    assert measured.is_set()
    assert {r.outcome for r in results} == {"ok"}
    assert operator_writes(stack)[len(before) :] == []
    assert condition(stack.resource("chat"), "MetricsFresh") == "True"
    seen = stack.prometheus.query('sum(disaggserve_router_arrivals_total{resource="default/chat"})')
    assert float(seen[0]["value"][1]) >= 0.9 * len(results)


def test_traffic_does_not_notice_that_the_operator_dies(stack: Stack) -> None:
    async def crash_under_load() -> list[load.Result]:
        sent = asyncio.create_task(
            load.run_load(stack.url("chat"), MODEL, requests(10, 3), vocab=256, seed=3)
        )
        operator = stack.get("pods", "-l", "app.kubernetes.io/component=operator", namespace=NAMESPACE)[0]
        await asyncio.to_thread(stack.nodes.crash, operator["metadata"]["name"], NAMESPACE)
        return await sent

    pods = {p["metadata"]["uid"] for p in stack.pods("chat")}
    results = asyncio.run(crash_under_load())
    assert {r.outcome for r in results} == {"ok"}
    assert {p["metadata"]["uid"] for p in stack.pods("chat")} == pods


def test_a_crashed_worker_comes_back(stack: Stack) -> None:
    stack.crash(next(p["metadata"]["name"] for p in stack.pods("chat", "decode")), timeout_s=60)
    wait_until(
        lambda: post(stack, "/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 3})[0] == 200,
        "requests to be answered again",
        timeout_s=60,
        interval_s=0.5,
    )


def test_missing_metrics_hold_the_plan_and_say_so(stack: Stack) -> None:
    stack.prometheus.stop()
    resource = stack.wait(
        "chat", "MetricsFresh=False", lambda r: condition(r, "MetricsFresh") == "False", timeout_s=90
    )
    said = next(c for c in resource["status"]["conditions"] if c["type"] == "MetricsFresh")
    assert "the plan is held" in said["message"]
    assert resource["status"]["plan"]["revision"] == 1


def test_deleting_the_resource_leaves_nothing(stack: Stack) -> None:
    stack.plane.kubectl("delete", "dsv", "chat", "--wait=true")
    kinds = "pods,deployments,services,serviceaccounts,rolebindings,networkpolicies,poddisruptionbudgets,controllerrevisions"

    def gone() -> bool:
        return not stack.get(kinds, "-l", "app.kubernetes.io/managed-by=disaggserve")

    wait_until(gone, "everything of the resource to be gone", timeout_s=90, interval_s=0.5)
    wait_until(lambda: not stack.pods("chat"), "the router to be gone", timeout_s=60, interval_s=0.5)

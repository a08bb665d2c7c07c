"""Low-affinity pairs on real parts: planned where no node has RDMA, started, asked how their KV goes, made more and fewer under traffic."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from e2e import load
from e2e.stack import Stack, carried_out
from tests.integration.traffic import during

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MODEL = "facebook/opt-13b"
NODES = """
nodes:
  - {name: gpu, count: 4, gpus: 2, product: NVIDIA-A100-SXM4-80GB, cpu: 64, memory: 512Gi}
  - {name: cpu, cpu: 32, memory: 128Gi}
"""
Json = dict[str, Any]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "nodes.yaml").write_text(NODES)
    with Stack(folder, folder / "nodes.yaml") as made:
        yield made


def resource(rate: float) -> Json:
    spec = {
        "model": {"id": MODEL},
        "slo": {"ttft": "1s", "tpot": "200ms"},
        "workload": {"rate": rate, "lengths": {"preset": "sharegpt"}},
        "hardware": {"affinity": "Low"},
        "engine": {"type": "torch"},
        "replan": {"mode": "Off"},
    }
    metadata = {"name": "near"}
    return {
        "apiVersion": "disaggserve.dev/v1alpha1",
        "kind": "DisaggServe",
        "metadata": metadata,
        "spec": spec,
    }


def pulls(pods: list[Json]) -> Counter[str]:
    """KV that the decodes of pairs have fetched, by transport."""
    found = Counter[str]()
    for pod in pods:
        with urllib.request.urlopen(f"http://{pod['status']['podIP']}:8000/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for way, n in re.findall(
            r'^disaggserve_worker_kv_pulls_total\{.*transport="(\w+)"\} (\d+)', text, re.M
        ):
            found[way] += int(n)
    return found


def message(found: Json) -> str:
    return next(str(c["message"]) for c in found["status"]["conditions"] if c["type"] == "Ready")


def test_pairs_serve_and_become_more_and_fewer_under_traffic(stack: Stack) -> None:
    stack.apply(resource(2))
    found = stack.wait("near", "the first plan to be carried out", carried_out(1), timeout_s=240)
    plan = found["status"]["plan"]
    assert (plan["paired"], plan["setting"]["link"]) == (True, "nvlink")
    before = stack.pods("near", "pair")
    assert len(before) == plan["roles"][0]["count"] == plan["roles"][1]["count"]
    said = stack.wait("near", "KV inside pairs", lambda r: "KV goes by shm" in message(r), timeout_s=60)
    assert "slower" not in message(said)
    assert {p["metadata"]["annotations"]["disaggserve.dev/kv-transport"] for p in before} == {"shm"}

    counts: list[int] = []

    def change() -> None:
        for revision, rate in ((2, 16.0), (3, 8.0)):
            stack.apply(resource(rate))
            what = f"revision {revision} to be carried out"
            found = stack.wait("near", what, carried_out(revision), timeout_s=240)
            stands = stack.pods("near", "pair")
            assert len(stands) == found["status"]["plan"]["roles"][0]["count"]
            counts.append(len(stands))

    wanted = [(0.4 * n, 100 + n % 7, 20 + n % 11) for n in range(1000)]
    results = during(stack.url("near"), MODEL, wanted, change)
    assert len(results) >= 10
    assert {r.outcome for r in results} == {"ok"}, [r.error for r in results if r.outcome != "ok"]
    after = stack.pods("near", "pair")
    assert len(before) < counts[1] < counts[0]

    # All KV came from inside the pairs: each one's own check, and every request.
    start = pulls(after)
    results = asyncio.run(
        load.run_load(stack.url("near"), MODEL, [(0.1 * n, 100, 10) for n in range(40)], vocab=256, seed=2)
    )
    assert {r.outcome for r in results} == {"ok"}, [r.error for r in results if r.outcome != "ok"]
    assert pulls(after) - start == {"shm": 40}
    assert set(start) == {"shm"}
    with urllib.request.urlopen(stack.url("near") + "/drain", timeout=10) as answer:
        text = answer.read().decode()
    assert all(p["metadata"]["uid"] in text for p in after)

    # A pair that dies comes back as one.
    stack.crash(after[0]["metadata"]["name"], timeout_s=120)
    assert set(pulls(stack.pods("near", "pair"))) <= {"shm"}
    stack.plane.kubectl("delete", "dsv", "near", "--wait=true")

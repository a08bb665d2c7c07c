"""`examples/vllm.yaml` on simulated nodes: vLLM's image is our paced worker there, behind vLLM's front."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from disaggserve import metric_names as names
from disaggserve.workload import Workload, preset
from e2e import load
from e2e.stack import ROOT, Stack, ready

EXAMPLE = ROOT / "examples/vllm.yaml"
MODEL = "facebook/opt-13b"


@pytest.mark.e2e
def test_the_example_serves_what_it_is_asked(tmp_path: Path) -> None:
    with Stack(tmp_path, scrape_s=1) as stack:
        stack.apply(EXAMPLE)
        resource = stack.wait("chat-vllm", "chat-vllm to be ready", ready, timeout_s=240)
        assert [r["role"] for r in resource["status"]["plan"]["roles"]] == ["prefill", "decode"]
        pods = stack.pods("chat-vllm", "prefill") + stack.pods("chat-vllm", "decode")
        assert {p["spec"]["containers"][0]["command"][0] for p in pods} == {"vllm"}
        drawn = Workload(rate=3.0, cv=1.0, lengths=preset("sharegpt").scaled(0.333, 2048)).requests(20.0, 1)
        asked = [
            (a / 1e9, int(i), min(int(o), 40))
            for a, i, o in zip(drawn.arrival_ns, drawn.input, drawn.output, strict=True)
        ]
        results = asyncio.run(load.run_load(stack.url("chat-vllm"), MODEL, asked, vocab=256, seed=1))
        assert {r.outcome for r in results} == {names.OK}, next(r.error for r in results if r.error)
        stack.plane.kubectl("delete", "dsv", "chat-vllm", "--wait=true", "--timeout=60s")

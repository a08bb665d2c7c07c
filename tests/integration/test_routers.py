"""Three routers side by side under load: one killed, one rolled, the API server away meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from e2e.controlplane.errors import CommandFailed
from e2e.controlplane.polling import wait_until
from e2e.dataplane import DataPlane, until
from e2e.nodes.processes import ForkServerClient
from e2e.stack import Stack, condition, ready
from e2e.storm import Storm, draw
from tests.integration.served import MODEL, Background
from tests.integration.test_chaos import LEASE_S, PACE

OUTAGE_S = 4.0
LAG_S = 0.3  # until clients hear that a router is gone


def test_only_what_died_with_its_router_is_lost(
    background: Background, forks: ForkServerClient, weights: Path, tmp_path: Path
) -> None:
    background.call(_load(forks, weights, tmp_path))


async def _load(forks: ForkServerClient, weights: Path, folder: Path) -> None:
    asks = draw(3, 60, OUTAGE_S + 1, prompt=(8, 120), tokens=(1, 40), leave=0)
    # What a dying router had not handed to a decode yet, prefill holds until its lease ends.
    flags = ("--pace", json.dumps(PACE), "--lease-s", str(LEASE_S))
    async with DataPlane(forks, folder, MODEL, weights, *flags) as plane:
        await asyncio.gather(
            *(plane.worker("prefill" if k % 2 else "decode") for k in range(4)),
            *(plane.router("--linger", str(2 * LAG_S)) for _ in range(3)),
        )
        endpoints = plane.alive("router")
        for router in endpoints:
            await plane.until_sees(router)
        storm = Storm(plane.session, MODEL, lambda: [router.url for router in endpoints])
        asks = await storm.learn(asks)

        running = asyncio.create_task(storm.run(asks))
        await plane.pods.down()
        up = asyncio.get_running_loop().time() + OUTAGE_S
        killed, rolled, _ = endpoints
        await asyncio.sleep(OUTAGE_S / 4)
        await plane.kill(killed)
        await asyncio.sleep(LAG_S)  # connections to it are refused meanwhile
        endpoints.remove(killed)
        await asyncio.sleep(OUTAGE_S / 4)
        leaving = asyncio.create_task(plane.terminate(rolled))
        await asyncio.sleep(LAG_S)  # it still takes requests
        endpoints.remove(rolled)
        assert await leaving == 0
        await asyncio.sleep(up - asyncio.get_running_loop().time())
        assert not running.done()
        await plane.pods.up()
        await plane.restart(killed)
        await plane.until_sees(killed)
        endpoints.append(killed)

        ends = await running
        assert [wrong for end in ends if (wrong := storm.wrong(end))] == []
        not_answered = [end for end in ends if end.outcome != "ok"]
        assert {(end.outcome, end.router) for end in not_answered} <= {("lost", killed.url)}
        assert {end.router for end in ends} == {killed.url, rolled.url, endpoints[0].url}
        await plane.quiet()


# ------------------------------------------------------------------------------------------- on a real control plane

LONG_OUTAGE_S = 60.0
RESOURCE: dict[str, Any] = {
    "apiVersion": "disaggserve.dev/v1alpha1",
    "kind": "DisaggServe",
    "metadata": {"name": "chat"},
    "spec": {
        "model": {"id": MODEL},
        "slo": {"ttft": "250ms", "tpot": "100ms"},
        "workload": {"rate": 3, "lengths": {"preset": "sharegpt", "inputScale": 0.2}},
        "hardware": {"maxGPUs": 8},
        "engine": {"type": "torch"},
        "replan": {"mode": "Off"},
        "router": {"replicas": 3},
        "plan": {"roles": [{"role": role, "tp": 1, "pp": 1, "count": 2} for role in ("prefill", "decode")]},
    },
}


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_three_routers_of_an_installation(tmp_path: Path) -> None:
    # With a node's usual 40 s of grace the controller manager, back from a longer outage, may find every node dead and take all
    # pods out of their Services before a kubelet's first word: as in any cluster, and nothing that a router could help.
    with Stack(tmp_path / "stack", node_monitor_grace_period=f"{2 * LONG_OUTAGE_S:g}s") as stack:
        stack.apply(RESOURCE)
        stack.wait("chat", "chat to be ready", ready, timeout_s=120)
        wait_until(lambda: len(routers(stack)) == 3, "three routers", timeout_s=60)
        asyncio.run(_installation(stack))


def routers(stack: Stack) -> dict[str, str]:
    """Names and URLs of the routers that a Service would be balanced over."""
    return {
        pod["metadata"]["name"]: f"http://{pod['status']['podIP']}:8000"
        for pod in stack.pods("chat", "router")
        if condition(pod, "Ready") == "True" and "deletionTimestamp" not in pod["metadata"]
    }


async def _installation(stack: Stack) -> None:
    endpoints = routers(stack)

    async def follow() -> None:
        """As kube-proxy does: what was known last stays while the API server is away."""
        nonlocal endpoints
        while True:
            with contextlib.suppress(CommandFailed):
                endpoints = await asyncio.to_thread(routers, stack)
            await asyncio.sleep(0.2)

    async def three_again(without: str) -> None:
        await until(lambda: len(endpoints) == 3 and without not in endpoints.values(), "three routers again")

    asks = draw(4, 300, LONG_OUTAGE_S + 40, prompt=(8, 120), tokens=(1, 40), leave=0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        storm = Storm(session, MODEL, lambda: list(endpoints.values()))
        asks = await storm.learn(asks)
        following = asyncio.create_task(follow())
        running = asyncio.create_task(storm.run(asks))
        try:
            (killed, killed_url), (rolled, rolled_url), _ = endpoints.items()
            await asyncio.sleep(3)
            await asyncio.to_thread(stack.nodes.crash, killed)
            await asyncio.sleep(3)
            await asyncio.to_thread(stack.plane.kubectl, "delete", "pod", rolled, "--wait=false")
            await three_again(without=rolled_url)
            await asyncio.to_thread(stack.plane.take_down, "kube-apiserver")
            await asyncio.sleep(LONG_OUTAGE_S)
            await asyncio.to_thread(stack.plane.bring_up, "kube-apiserver")
            assert not running.done()
            ends = await running
        finally:
            following.cancel()
            running.cancel()
        print(Counter(end.outcome for end in ends))
        assert [wrong for end in ends if (wrong := storm.wrong(end))] == []
        not_answered = [end for end in ends if end.outcome != "ok"]
        assert {(end.outcome, end.router) for end in not_answered} <= {("lost", killed_url)}, not_answered
    await asyncio.to_thread(stack.wait, "chat", "chat to be ready again", ready, timeout_s=120)

"""Three routers side by side under load: one killed, one rolled, the API server away meanwhile."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from e2e.dataplane import DataPlane
from e2e.nodes.processes import ForkServerClient
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

"""Pods killed, deleted and turned to the other role at random under streams of which some leave at random: every request ends once, with the right tokens.

Paced workers, so that streams last long enough to be hit; few KV blocks, so that they are preempted, too.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from disaggserve import metric_names as names
from e2e.dataplane import DataPlane, Member, Role, until
from e2e.nodes.processes import ForkServerClient
from e2e.storm import Ask, End, Storm, draw
from tests.integration.served import MODEL, Background

PACE = {"gpu": "NVIDIA-A100-SXM4-80GB", "nvlink": True, "rdma": True, "model": MODEL}
LEASE_S = 2.0  # what a killed decode has not pulled is held by prefill for so long


class Chaos:
    """Does one thing after another to the workers of a plane; there is always one ready of each role."""

    def __init__(self, plane: DataPlane, seed: int) -> None:
        self.plane, self.rng = plane, random.Random(seed)
        self.done: list[str] = []
        self.codes: list[int] = []
        self.actions: list[Callable[[Member], Awaitable[None]]] = [
            self.replace,
            self.restart,
            self.delete,
            self.turn,
        ]

    async def strike(self) -> None:
        """SIGKILL to a decode in the middle of its streams."""
        worker = self.plane.alive("decode")[0]
        await until(partial(self._decodes, worker), f"{worker.name} decodes")
        self.done.append(f"restart {worker.name}")
        await self.restart(worker)

    async def _decodes(self, worker: Member) -> bool:
        return bool((await self.plane.json(worker, "/state"))["running"])

    async def act(self) -> None:
        """One action on one worker, to its end: as many are ready as before."""
        role: Role = self.rng.choice(("prefill", "decode"))
        ready = self.plane.alive(role)
        action = self.rng.choice(self.actions)
        if len(ready) < 2:
            return
        worker = self.rng.choice(ready)
        self.done.append(f"{action.__name__} {worker.name}")
        await action(worker)

    async def replace(self, worker: Member) -> None:
        """SIGKILL; the API server hears late; another pod comes."""
        await self.plane.kill(worker)
        worker.ready = False
        await asyncio.sleep(self.rng.uniform(0, 0.5))
        self.plane.forget(worker)
        await self._another(worker)

    async def restart(self, worker: Member) -> None:
        """SIGKILL; the container starts again in the same pod."""
        await self.plane.kill(worker)
        worker.ready = False
        await asyncio.sleep(self.rng.uniform(0, 0.5))
        await self.plane.restart(worker)

    async def delete(self, worker: Member) -> None:
        """The pod is deleted and drains; its successor is there first, as in a rollout."""
        await self._another(worker)
        self.codes.append(await self.plane.terminate(worker))

    async def turn(self, worker: Member) -> None:
        """Prefill becomes decode, or decode prefill; another pod takes its old place."""
        role = worker.role
        await self.plane.turn(worker, "decode" if role == "prefill" else "prefill")
        await self.plane.worker("prefill" if role == "prefill" else "decode")

    async def _another(self, worker: Member) -> None:
        await self.plane.worker("prefill" if worker.role == "prefill" else "decode")


async def weather(
    forks: ForkServerClient, folder: Path, weights: Path, *, seed: int, streams: int, each: int, over_s: float
) -> None:
    """`each` prefill and decode workers, `streams` requests over `over_s`, chaos meanwhile."""
    print(f"seed {seed}")
    flags = ("--pace", json.dumps(PACE), "--kv-blocks", "96", "--lease-s", str(LEASE_S))
    asks = draw(seed, streams, over_s, prompt=(8, 120), tokens=(1, 60), leave=0.3)
    async with DataPlane(forks, folder, MODEL, weights, *flags) as plane:
        roles: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")
        await asyncio.gather(*(plane.worker(role) for role in roles for _ in range(each)))
        router = await plane.router("--max-queued", str(2 * streams))
        storm = Storm(plane.session, MODEL, lambda: [router.url])
        asks = await storm.learn(asks)
        assert len(asks) > 0.8 * streams
        before = await plane.outcomes()
        chaos = Chaos(plane, seed)
        running = asyncio.create_task(storm.run(asks))
        await chaos.strike()
        await chaos.turn(plane.alive("prefill")[0])
        while not running.done():
            await chaos.act()
            await asyncio.wait((running,), timeout=chaos.rng.uniform(0.05, 0.3))
        ends = await running
        print(f"{Counter(e.outcome for e in ends)}; {', '.join(chaos.done)}")
        await plane.quiet()
        after = await plane.outcomes()
        judge(storm, asks, ends, {k: n - before.get(k, 0) for k, n in after.items()})
        assert set(chaos.codes) <= {0}
        assert await plane.metric(router, names.ROUTER_RETRIES, role="decode") > 0


def judge(storm: Storm, asks: list[Ask], ends: list[End], counted: dict[str, int]) -> None:
    assert [end.ask for end in ends] == asks
    assert [wrong for end in ends if (wrong := storm.wrong(end))] == []
    assert [end for end in ends if end.outcome not in ("ok", "cancelled")] == []
    # The router has counted each once. One that leaves at its last token may have been answered before that was seen.
    assert sum(counted.values()) == counted.get(names.OK, 0) + counted.get(names.CANCELLED, 0) == len(asks)
    assert counted.get(names.CANCELLED, 0) <= sum(end.outcome == "cancelled" for end in ends)


def test_forty_streams(
    background: Background, forks: ForkServerClient, weights: Path, tmp_path: Path
) -> None:
    background.call(weather(forks, tmp_path, weights, seed=1, streams=40, each=2, over_s=3.0))


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(3))
def test_two_hundred_streams(
    background: Background, forks: ForkServerClient, weights: Path, tmp_path: Path, seed: int
) -> None:
    background.call(weather(forks, tmp_path, weights, seed=seed, streams=200, each=4, over_s=15.0))

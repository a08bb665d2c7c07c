"""Small real HTTP servers where pods would be: a router that says what it holds, and workers that change their role when asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from disaggserve import manifests
from e2e.nodes.addresses import Addresses

Json = dict[str, Any]


@dataclass
class Door:
    """One worker. It refuses another role while it holds something, and an epoch lower than the last."""

    role: str
    epoch: int = 0
    held: int = 0
    turns: list[tuple[str, int]] = field(default_factory=list)
    transport: str | None = None  # a pair's own word

    async def state(self, _: web.Request) -> web.Response:
        if self.role == "pair":
            return web.json_response({"status": "ready", "transport": self.transport})
        return web.json_response({"role": self.role, "epoch": self.epoch})

    async def take(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if asked["epoch"] < self.epoch:
            return web.json_response({"epoch": self.epoch}, status=409)
        if asked["role"] != self.role and self.held:
            return web.json_response({"running": self.held}, status=409)
        if (self.role, self.epoch) != (asked["role"], asked["epoch"]):
            self.turns.append((asked["role"], asked["epoch"]))
        self.role, self.epoch = asked["role"], asked["epoch"]
        return web.json_response({"role": self.role, "epoch": self.epoch})


class Doors:
    """All of a bench's pods: the address of each, and who answers there. `pods` lists the workers as the API server has them."""

    def __init__(self, pods: Callable[[], Awaitable[list[Json]]]) -> None:
        self._pods = pods
        self._addresses = Addresses()
        self._runners: list[web.AppRunner] = []
        self.workers: dict[str, Door] = {}

    async def open(self, pod: Json) -> str:
        """The address of a pod that is coming up."""
        labels, app = pod["metadata"]["labels"], web.Application()
        if labels[manifests.ROLE] == "router":
            app.router.add_get("/drain", self._drain)
        else:
            door = self.workers[pod["metadata"]["uid"]] = Door(labels[manifests.ROLE])
            app.router.add_get("/state", door.state)
            app.router.add_post("/role", door.take)
        runner, address = web.AppRunner(app, access_log=None), self._addresses.take()
        await runner.setup()
        await web.TCPSite(runner, address, manifests.HTTP_PORT).start()
        self._runners.append(runner)
        return address

    async def close(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _drain(self, _: web.Request) -> web.Response:
        """What a router would say that sees every label at once and whose requests all have ended."""
        said = {
            p["metadata"]["uid"]: {
                "admitting": manifests.DRAIN not in p["metadata"]["labels"],
                "in_flight": 0,
                "leased": 0,
            }
            for p in await self._pods()
        }
        return web.json_response({"instances": said})

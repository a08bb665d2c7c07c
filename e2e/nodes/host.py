"""What all pods of one agent share, and where one of them stands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from e2e.nodes.addresses import Addresses
from e2e.nodes.api import Api
from e2e.nodes.errors import Refused
from e2e.nodes.images import Image
from e2e.nodes.processes import WORKER_MODULES, ForkServerClient
from e2e.nodes.tiny import TinyModelError, make_tiny
from e2e.nodes.topology import SimulatedNode


@dataclass
class Host:
    """What all pods of this agent share."""

    api: Api
    folder: Path
    addresses: Addresses
    session: aiohttp.ClientSession
    """For probes: no connection is kept."""
    plain: ForkServerClient
    images: Mapping[str, Image]
    host_paths: Mapping[str, Path]
    cold_start_s: float
    failed: Callable[[str], None]
    """Told in one sentence when the agent cannot go on."""
    _workers: ForkServerClient | None = None
    _starting: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def workers(self) -> ForkServerClient:
        """The fork server with torch, started when it is first wanted. Ready when it says so itself."""
        async with self._starting:
            if self._workers is None:
                log = self.folder / "forkserver-workers.log"
                self._workers = await ForkServerClient.start(log, WORKER_MODULES)
                self._workers.ended.add_done_callback(
                    lambda _: self.failed(f"the workers' fork server has ended: see {log}")
                )
            return self._workers

    async def close(self) -> None:
        """End every process of every pod."""
        servers = [self.plain, *([self._workers] if self._workers is not None else [])]
        await asyncio.gather(*(server.close() for server in servers))

    def log(self, namespace: str, pod: str, container: str) -> Path:
        return self.folder / "logs" / f"{namespace}_{pod}_{container}.log"

    async def tiny(self, model: str) -> Path:
        """The folder of the tiny model that stands for `model`. Raises Refused."""
        folder = self.folder / "models" / model.replace("/", "--")
        try:
            return await asyncio.to_thread(make_tiny, model, folder)
        except TinyModelError as error:
            raise Refused("CreateContainerError", str(error)) from error


@dataclass(frozen=True)
class Place:
    """The node of a pod, as the pod sees it."""

    node: SimulatedNode
    address: str

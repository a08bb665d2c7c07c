"""Starts the operator: the lease, then kopf and the queue, with health and metrics beside them."""

from __future__ import annotations

import asyncio
import logging
import signal

import kopf
from aiohttp import web
from prometheus_client import generate_latest

from disaggserve.cluster import metrics
from disaggserve.cluster.client import Cluster, connect
from disaggserve.cluster.clock import WallClock
from disaggserve.cluster.handlers import Queue, registry
from disaggserve.cluster.leader import Leader
from disaggserve.cluster.reconcile import Reconciler
from disaggserve.cluster.search_pool import SearchPool
from disaggserve.cluster.settings import Settings

log = logging.getLogger(__name__)


async def _health(settings: Settings, searches: SearchPool) -> web.AppRunner:
    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        """A Deployment that rolls keeps its old pod until the new one need not wait for a compiler."""
        if searches.warm:
            return web.Response(text="ok\n")
        return web.Response(status=503, text="warming: the simulator is loaded or compiled; all else works\n")

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.REGISTRY), content_type="text/plain")

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", scrape)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, settings.health_host, settings.health_port).start()
    return runner


def _kopf_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.watching.server_timeout = 300
    settings.watching.connect_timeout = 10
    settings.watching.reconnect_backoff = 1
    return settings


async def _serve(settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    clock = WallClock()
    leading, stop = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def lead() -> None:
        loop.call_soon_threadsafe(leading.set)

    leader = Leader(settings, clock, lead)
    with SearchPool(settings.search_processes) as searches:
        health = await _health(settings, searches)
        leader.start()
        waits = [asyncio.create_task(leading.wait()), asyncio.create_task(stop.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if leading.is_set() and not stop.is_set():
            log.info("leading as %s", settings.identity)
            metrics.LEADING.set(1)
            cluster = Cluster(await connect(), leader.fence)
            reconciler = Reconciler(cluster, settings, clock, searches, lambda: searches.warm)
            queue = Queue(reconciler.reconcile)
            await kopf.operator(
                registry=registry(queue),
                settings=_kopf_settings(),
                standalone=True,
                clusterwide=not settings.watch,
                namespaces=settings.watch,
                stop_flag=stop,
            )
            await queue.close()
            await cluster.close()
    await health.cleanup()
    await asyncio.to_thread(leader.release)


def run(settings: Settings) -> None:
    """Until SIGTERM, or until the lease is lost."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("kopf", "leaderelection", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    asyncio.run(_serve(settings))

"""The router's process: starts, serves until SIGTERM, lets go of nothing that it has begun, ends with 0."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys

import uvloop

from disaggworker.router import config as configuration
from disaggworker.router.app import serving, settle
from disaggworker.router.config import Config
from disaggworker.router.discovery import Discovery

log = logging.getLogger(__name__)


def run(argv: list[str]) -> int:
    """`disaggworker router …` (with or without that first word): the exit code.

    1 with one sentence when the address cannot be listened on.
    """
    config = configuration.parse(argv[1:] if argv[:1] == ["router"] else argv, os.environ)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    settle()
    try:
        uvloop.run(_serve(config))
    except OSError as error:
        log.error("cannot listen on %s:%d: %s", config.host, config.port, error)
        return 1
    return 0


async def _serve(config: Config) -> None:
    stop = asyncio.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sign, stop.set)
    async with serving(config) as router:
        discovery = asyncio.create_task(
            Discovery(config.namespace, config.resource, router.update).run(), name="discovery"
        )
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((discovery, stopped), return_when=asyncio.FIRST_COMPLETED)
            if discovery.done():
                discovery.result()  # it runs until cancelled: this raises
            log.info("asked to stop: %d requests in flight", len(router.proxy.active))
            await router.finish()
        finally:
            for task in (discovery, stopped):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

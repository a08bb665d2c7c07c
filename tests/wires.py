"""What tests of streams and servers share: any cut of what comes over a socket, and an application that listens."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from aiohttp import web


def cut(whole: bytes, sizes: Sequence[int]) -> list[bytes]:
    """In pieces of these sizes, over and over."""
    out, at, k = [], 0, 0
    while at < len(whole):
        out.append(whole[at : at + sizes[k % len(sizes)]])
        at, k = at + sizes[k % len(sizes)], k + 1
    return out


@contextlib.asynccontextmanager
async def listening(app: web.Application) -> AsyncIterator[str]:
    """Its URL, on a free port of loopback; at the end it is gone at once."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()

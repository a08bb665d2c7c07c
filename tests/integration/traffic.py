"""A load that does not end before a change under it does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from e2e import load


def during(
    url: str, model: str, wanted: Sequence[load.Wanted], change: Callable[[], None]
) -> list[load.Result]:
    """Results of a load: `change` begins with its first answer, and at its end no more is sent."""

    async def run() -> list[load.Result]:
        begun, stop = asyncio.Event(), asyncio.Event()

        def on_result(_: load.Result) -> None:
            begun.set()

        sent = asyncio.create_task(
            load.run_load(url, model, wanted, vocab=256, seed=1, on_result=on_result, stop=stop)
        )
        await begun.wait()
        await asyncio.to_thread(change)
        stop.set()
        return await sent

    return asyncio.run(run())

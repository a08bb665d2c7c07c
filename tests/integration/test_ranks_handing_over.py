"""KV between instances of different tp and pp: the tokens are those of one rank on each side. `make e2e`: eight starts of torch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from e2e.nodes.tiny import make_tiny
from tests.integration.worker_pair import DECODE, PREFILL, pair

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SHAPES = [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 2), (2, 1)), ((2, 1), (1, 2))]


def flags(shape: tuple[int, int]) -> list[str]:
    tp, pp = shape
    return ["--tp", str(tp), "--pp", str(pp), "--kv-checksum"]


def test_tokens_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    folder = make_tiny("meta-llama/Meta-Llama-3-8B", tmp_path, layers=2, heads=4, hidden=64)
    asked = [[300 + (i * 7 + n) % 200 for i in range(n)] for n in (1, 16, 17, *range(20, 220, 18))]

    async def tokens(there: tuple[int, int], here: tuple[int, int]) -> list[list[int]]:
        beside = ["--dtype", "float32", "--kv-blocks", "256", "--context-length", "512"]
        async with pair("m", folder, *beside, prefill=flags(there), decode=flags(here)) as workers:
            body = {"max_tokens": 9, "temperature": 0, "ignore_eos": True}
            answers = await asyncio.gather(*(workers.complete({**body, "prompt": one}) for one in asked))
            for host in (PREFILL, DECODE):
                await workers.until(host, "/state", {"leased_blocks": 0, "running": 0, "intact": True})
            await workers.until(DECODE, "/state", {"pulls": {"tcp": len(asked)}})
        return [given for _, given, _ in answers]

    async def check() -> None:
        expected = await tokens(*SHAPES[0])
        for shape in SHAPES[1:]:
            assert await tokens(*shape) == expected, shape

    asyncio.run(check())

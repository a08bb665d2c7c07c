"""Workers that do both halves: their tokens are transformers', chunked, from the prefix cache, put back; and roles that change."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from e2e.nodes.tiny import make_tiny

pytest.importorskip("torch")

from tests.integration.test_parity import MODELS, greedy
from tests.integration.workers_here import Here, workers

TOKENS = 24
SHARED = [7 + 13 * i % 480 for i in range(200)]
# Some begin alike: past whole blocks, inside one, and all of another.
PROMPTS = [
    [5 + (i * 7919 + number * 31) % 480 for i in range(n)]
    for number, n in enumerate((1, 2, 16, 17, 150, 255))
] + [SHARED[:n] + [9] * extra for n, extra in ((64, 3), (70, 0), (64, 40), (200, 1), (199, 0), (200, 16))]


@pytest.fixture(scope="module", params=list(MODELS))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]]]:
    folder = make_tiny(
        MODELS[request.param], tmp_path_factory.mktemp("tiny") / request.param, layers=2, heads=4, hidden=64
    )
    return folder, greedy(folder, PROMPTS, TOKENS)


def mixed(*flags: str) -> list[str]:
    return ["mixed", "--context-length", "512", *flags]


async def everything_at_once(worker: Here) -> list[list[int]]:
    return list(await asyncio.gather(*(worker.tokens(prompt, TOKENS) for prompt in PROMPTS)))


def test_a_mixed_worker_answers_alone_with_transformers_tokens(
    checkpoint: tuple[Path, list[list[int]]],
) -> None:
    folder, expected = checkpoint

    async def test() -> None:
        tight = mixed("--chunk", "37", "--no-prefix-cache", "--kv-blocks", "40")
        flags = [mixed(), mixed("--chunk", "16"), mixed("--chunk", "7"), mixed("--kv-blocks", "40"), tight]
        async with workers(folder, *flags) as found:
            for worker in found:
                # From nothing; then what can be found is there, and it is the same.
                assert await everything_at_once(worker) == expected
                assert await everything_at_once(worker) == expected
                await worker.settled()
            for worker in found[3:]:
                assert await worker.figure("vllm:num_preemptions_total") > 0
            assert await found[4].figure("vllm:prefix_cache_queries_total") == 0
            for worker in found[:3]:
                assert await worker.figure("vllm:prefix_cache_hits_total") > 1000
                _, said = await worker.post({"prompt": SHARED, "max_tokens": 1})
                # Twelve blocks and half a one; the last token is computed.
                assert said["usage"]["prompt_tokens_details"] == {"cached_tokens": 192}

    asyncio.run(test())


def test_an_answer_that_ends_with_its_first_tokens_is_streamed_whole(tmp_path: Path) -> None:
    folder = make_tiny("Qwen/Qwen3-8B", tmp_path / "tiny", layers=2, heads=4, hidden=64)

    async def test() -> None:
        async with workers(folder, mixed()) as (worker,):
            for count in (1, 2, 3):
                body = {"prompt": PROMPTS[4], "max_tokens": count, "temperature": 0, "ignore_eos": True}
                *tokens, last = await worker.frames({**body, "stream_options": {"include_usage": True}})
                assert [frame["choices"][0]["finish_reason"] for frame in tokens] == [None] * (count - 1) + [
                    "length"
                ]
                assert last["usage"]["completion_tokens"] == count

    asyncio.run(test())


def test_roles_change_while_weights_stay(tmp_path: Path) -> None:
    folder = make_tiny("Qwen/Qwen3-8B", tmp_path / "tiny", layers=2, heads=4, hidden=64)
    prompt, count = PROMPTS[4], TOKENS
    body = {
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    (expected,) = greedy(folder, [prompt], count)

    async def hand_off(prefill: Here, decode: Here, **more: Any) -> list[int]:
        ask = {**body, **more, "kv_transfer_params": {"do_remote_decode": True, "max_tokens": count}}
        status, first = await prefill.post(ask)
        assert status == 200, first
        status, rest = await decode.post({**body, "kv_transfer_params": first["kv_transfer_params"]})
        assert status == 200, rest
        tokens: list[int] = rest["choices"][0]["token_ids"]
        return tokens

    async def turn(worker: Here, role: str, epoch: int, **more: Any) -> tuple[int, Any]:
        status, said = await worker.post({"role": role, "epoch": epoch, **more}, "/role")
        if status == 200:
            state = await worker.get()
            assert (state["role"], state["epoch"]) == (role, epoch)
            assert f'role="{role}"' in await worker.get("/metrics")
        return status, said

    async def test() -> None:
        both = ["--context-length", "512"]
        async with workers(folder, ["prefill", *both], ["decode", *both]) as (one, two):
            assert await hand_off(one, two) == expected
            # The other way round, and both at once.
            assert (await turn(one, "decode", 3))[0] == (await turn(two, "prefill", 3))[0] == 200
            assert await hand_off(two, one) == expected
            assert (await turn(one, "mixed", 4, chunk=32))[0] == 200
            assert await one.tokens(prompt, count) == expected
            assert await hand_off(two, one) == expected
            assert (await one.get())["chunk"] == 32
            # What is no work of its role: a stale router may try elsewhere, a client is told what is wrong.
            assert (await two.post(body))[0] == 400
            assert (await two.post({**body, "kv_transfer_params": {"handoff": "x"}}))[0] == 503
            # Asked again, or late: nothing changes.
            assert (await turn(one, "mixed", 4, chunk=32))[0] == 200
            assert (await turn(one, "decode", 4))[0] == 409
            assert (await turn(one, "prefill", 2))[0] == 409
            assert (await one.post({"role": "both", "epoch": 9}, "/role"))[0] == 400
            assert (await one.get())["role"] == "mixed"
            # A prompt whose KV waits to be pulled, and an answer that grows, hold a role fast.
            ask = {**body, "kv_transfer_params": {"do_remote_decode": True, "max_tokens": count}}
            _, first = await two.post(ask)
            status, said = await turn(two, "decode", 5)
            assert (status, said["leased"]) == (409, 1)
            assert "1 leased" in said["error"]["message"]
            assert (await turn(two, "mixed", 5))[0] == 200
            growing = asyncio.ensure_future(one.tokens(prompt, 300))
            while not (await one.get())["running"]:
                await asyncio.sleep(0.005)
            status, said = await turn(one, "prefill", 6)
            assert (status, said["requests"]) == (409, 1)
            assert (await growing)[:count] == expected
            status, rest = await one.post({**body, "kv_transfer_params": first["kv_transfer_params"]})
            assert rest["choices"][0]["token_ids"] == expected
            for worker in (one, two):
                await worker.settled()
            assert (await turn(one, "prefill", 6))[0] == (await turn(two, "decode", 6))[0] == 200
            assert await hand_off(one, two) == expected

    asyncio.run(test())

"""The router before real workers: what a client gets is what the two steps by hand give."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from disaggworker.router.app import serving
from disaggworker.router.config import Config
from disaggworker.router.fleet import Seen
from e2e import load
from e2e.nodes.tiny import make_tiny
from tests.integration.test_router import free_port, until
from tests.integration.worker_pair import DECODE, PREFILL, Pair, pair, url

pytest.importorskip("torch")

MODEL = "facebook/opt-13b"
CONFIG = Config("ns", "chat", MODEL, 2048, 60.0, 60.0, "127.0.0.1", linger_s=0.0)


def view() -> list[Seen]:
    return [
        Seen("p", "p", "prefill", "key", url(PREFILL, ""), True),
        Seen("d", "d", "decode", "key", url(DECODE, ""), True),
    ]


async def streamed(
    workers: Pair, base: str, path: str, body: dict[str, Any]
) -> tuple[str, list[int], Any, Any]:
    text, tokens, finish, usage = "", [], None, None
    async with workers.session.post(base + path, json={**body, "stream": True}) as answer:
        assert answer.status == 200
        *frames, done, end = (await answer.read()).split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    for frame in frames:
        said = json.loads(frame.removeprefix(b"data: "))
        usage = said.get("usage") or usage
        for choice in said["choices"]:
            text += choice["text"] if "text" in choice else choice["delta"]["content"]
            tokens += choice["token_ids"]
            finish = choice["finish_reason"]
    return text, tokens, finish, usage


def test_answers_are_the_workers_own(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    make_tiny(MODEL, weights)

    async def test() -> None:
        config = replace(CONFIG, port=free_port())
        base = f"http://127.0.0.1:{config.port}"
        async with pair(MODEL, weights, "--context-length", "2048") as workers, serving(config) as router:
            router.update(view())
            plain = {"model": MODEL, "prompt": "The keeper of the lighthouse", "temperature": 0}
            chat = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
            for path, asked in (
                ("/v1/completions", {**plain, "max_tokens": 12, "ignore_eos": True}),
                ("/v1/completions", {**plain, "max_tokens": 1}),
                ("/v1/completions", plain),  # no limit of the client's is not the router's limit of one
                ("/v1/chat/completions", {**chat, "max_completion_tokens": 9, "ignore_eos": True}),
            ):
                body = {**asked, "return_token_ids": True, "stream_options": {"include_usage": True}}
                text, tokens, finish, usage = await streamed(workers, base, path, body)
                async with workers.session.post(
                    base + path, json={**asked, "return_token_ids": True}
                ) as answer:
                    whole = json.loads(await answer.read())
                (choice,) = whole["choices"]
                assert choice["token_ids"] == tokens
                assert (choice["text"] if "text" in choice else choice["message"]["content"]) == text
                assert (choice["finish_reason"], whole["usage"]) == (finish, usage)
                wanted = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
                assert len(tokens) == usage["completion_tokens"]
                assert len(tokens) == wanted or finish == "stop"
            by_hand = await workers.complete({**plain, "max_tokens": 12, "ignore_eos": True})
            body = {**plain, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
            assert (await streamed(workers, base, "/v1/completions", body))[:3] == by_hand

            async with workers.session.post(
                base + "/v1/completions", json={**plain, "prompt": [5] * 3000}
            ) as answer:
                assert answer.status == 400
                assert "2048" in json.loads(await answer.read())["error"]["message"]

            wanted_load = [(0.02 * k, 5 + 17 * k, 1 + k) for k in range(16)]
            results = await load.run_load(base, MODEL, wanted_load, vocab=256, seed=1)
            assert {(r.outcome, r.error) for r in results} == {("ok", "")}
            await until(lambda: not router.proxy.active, "no request in flight")
            router.fleet.check_integrity()
            await workers.until(PREFILL, "/state", {"leased_blocks": 0, "running": 0})
            await workers.until(DECODE, "/state", {"running": 0, "waiting": 0})

    asyncio.run(test())

"""What a router and an operator must know of vLLM, said once and held against our stand-in and against a real one.

In the order in which it stands: the last ones end a server.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterator
from typing import Any

import aiohttp
import pytest

from disaggserve import metric_names as names
from disaggworker.router import vllm
from e2e.vllm import environment
from tests.conformance import servers
from tests.conformance.servers import CONTEXT, LEASE_S, MODEL, Body, Client, Pair

PROMPT = list(range(20, 120))
LONG: Body = {"model": MODEL, "prompt": PROMPT, "max_tokens": CONTEXT, "temperature": 0, "ignore_eos": True}
SHORT: Body = LONG | {"max_tokens": 12}
PULLED = f"{names.VLLM_PROMPT_TOKENS_BY_SOURCE}{{{names.PULLED}}}"
KEYS = (
    "do_remote_prefill do_remote_decode remote_block_ids remote_engine_id remote_request_id remote_host remote_port "
    "tp_size dcp_size pp_size remote_num_tokens remote_blocks_expiry_time transfer_mode remote_prefill_cached_tokens"
)


@pytest.fixture(
    scope="module", params=["stand-in", pytest.param("vllm", marks=[pytest.mark.e2e, pytest.mark.vllm])]
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if request.param == "vllm" and not environment.made():
        pytest.skip("there is no vLLM here: make e2e-vllm installs it")
    with servers.pair(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(4 * servers.PATIENCE_S):
            await test

    asyncio.run(bounded())


def client() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


def error(answer: Body) -> tuple[str, str | None, int]:
    found = answer["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    return found["type"], found["param"], found["code"]


def test_it_says_who_it_is(pair: Pair) -> None:
    async def test() -> None:
        async with client() as session, session.get(f"{pair.decode.url}/v1/models") as answer:
            [card] = (await answer.json())["data"]
        assert (card["id"], card["max_model_len"]) == (MODEL, CONTEXT)

    run(test())


def test_prefill_gives_one_token_and_where_its_kv_is(pair: Pair) -> None:
    async def test() -> None:
        async with client() as session:
            ask = Client(session)
            answer = await ask.prefilled(pair.prefill, SHORT)
            assert answer["usage"]["prompt_tokens"] == len(PROMPT)
            assert answer["usage"]["completion_tokens"] == 1
            params = answer["kv_transfer_params"]
            assert set(params) == set(KEYS.split())
            assert (params["do_remote_prefill"], params["do_remote_decode"]) == (True, False)
            assert (params["remote_host"], params["remote_port"]) == (servers.PREFILL, 5600)
            assert (params["remote_num_tokens"], params["transfer_mode"]) == (len(PROMPT), "pull")
            [blocks] = params["remote_block_ids"]
            assert len(blocks) == -(-len(PROMPT) // servers.BLOCK[pair.kind])
            # Held until somebody comes, or the lease ends.
            assert (await ask.figures(pair.prefill))[names.VLLM_KV_USAGE] > 0
            await ask.until(pair.prefill, lambda f: f[names.VLLM_KV_USAGE] == 0, "the lease ends")
            assert (await ask.figures(pair.prefill))[names.VLLM_KV_EXPIRED] == 1

    run(test())


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_decode_goes_on_from_it_with_a_plain_servers_tokens(pair: Pair, path: str) -> None:
    async def test() -> None:
        body = dict(SHORT) | {"return_token_ids": True}
        if path.startswith("chat"):
            del body["prompt"]
            body["messages"] = [
                {"role": "user", "content": "How many processors are needed for this traffic?"}
            ]
        async with client() as session:
            ask = Client(session)
            _, plain = await ask.post(pair.prefill, body, path=path)
            before = await ask.figures(pair.decode)
            params = (await ask.prefilled(pair.prefill, body, path=path))["kv_transfer_params"]
            sent = dict(body) | {"kv_transfer_params": params}
            status, answer = await ask.post(pair.decode, sent, path=path, id="abc")
            assert status == 200
            kind = "chatcmpl" if path.startswith("chat") else "cmpl"
            assert answer["id"] == f"{kind}-abc"
            [mine], [his] = answer["choices"], plain["choices"]
            assert (mine["token_ids"], mine["finish_reason"]) == (his["token_ids"], "length")
            assert mine.get("text") == his.get("text")
            assert mine.get("message", {}).get("content") == his.get("message", {}).get("content")
            assert answer["usage"]["completion_tokens"] == 12
            pulled = (await ask.figures(pair.decode))[PULLED] - before[PULLED]
            assert pulled in (params["remote_num_tokens"], params["remote_num_tokens"] - 1)
            first_s = vllm.first_token_s(answer)
            assert first_s is not None
            assert 0 < first_s < servers.PATIENCE_S
            await ask.until(
                pair.prefill, lambda f: f[names.VLLM_KV_USAGE] == 0, "prefill's blocks are free again"
            )

    run(test())


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_is_what_the_router_takes_it_for(pair: Pair, path: str) -> None:
    """Its first frame with a choice is the user's first token; usage, if asked for, comes once and last."""

    async def test() -> None:
        chat = path.startswith("chat")
        body = SHORT | {"prompt": [7, *PROMPT], "return_token_ids": True}  # no cache has seen it
        if chat:
            del body["prompt"]
            body["messages"] = [{"role": "user", "content": "Once upon a time there was a keeper."}]
        async with client() as session:
            ask = Client(session)
            _, plain = await ask.post(pair.prefill, body, path=path)
            answer = await ask.prefilled(pair.prefill, body, path=path)
            sent = json.loads(vllm.for_decode(body | {"stream": True}, answer["kv_transfer_params"]))
            stream, kept = vllm.Frames(keep_usage=False), b""
            async with session.post(f"{pair.decode.url}/v1/{path}", json=sent) as reply:
                async for chunk in reply.content.iter_any():
                    kept += stream.feed(chunk)
            assert (stream.tokens, stream.done, stream.error) == (12, True, None)
            assert b'"usage":{' not in kept
            frames = [f[6:] for f in kept.split(b"\n\n") if f]
            assert frames[-1] == b"[DONE]"
            [whole], choices = plain["choices"], [json.loads(f)["choices"][0] for f in frames[:-1]]
            # The frame of the role alone, which vLLM sends with the first token, names none.
            assert [t for c in choices for t in c.get("token_ids") or ()] == whole["token_ids"]
            text = "".join(c["delta"].get("content") or "" if chat else c["text"] for c in choices)
            assert text == (whole["message"]["content"] if chat else whole["text"])
            assert choices[-1]["finish_reason"] == "length"

    run(test())


def test_what_is_wrong_is_refused_in_openais_shape(pair: Pair) -> None:
    async def test() -> None:
        async with client() as session:
            ask = Client(session)
            status, answer = await ask.post(pair.prefill, SHORT | {"prompt": [20] * (CONTEXT + 1)})
            assert (status, *error(answer)) == (400, "BadRequestError", "input_tokens", 400)
            status, answer = await ask.post(pair.prefill, SHORT | {"model": "another"})
            assert (status, *error(answer)) == (404, "NotFoundError", "model", 404)
            status, answer = await ask.post(pair.prefill, SHORT | {"temperature": -1})
            assert (status, *error(answer)[::2]) == (400, "BadRequestError", 400)
            async with session.post(
                f"{pair.prefill.url}/v1/completions", data=b"{", headers={"Content-Type": "application/json"}
            ) as reply:
                assert reply.status == 400
            # Prompt and answer together: the answer is cut, and that is no error.
            status, answer = await ask.post(pair.prefill, LONG | {"prompt": [20] * (CONTEXT - 3)})
            assert (status, answer["usage"]["completion_tokens"]) == (200, 3)

    run(test())


def test_a_client_that_goes_is_noticed(pair: Pair) -> None:
    async def test() -> None:
        async with client() as session:
            ask = Client(session)
            frames = ask.frames(pair.decode, LONG)
            await anext(frames)
            assert (await ask.figures(pair.decode))[names.VLLM_RUNNING] == 1
            await frames.aclose()
            idle = (names.VLLM_RUNNING, names.VLLM_WAITING, names.VLLM_KV_USAGE)
            await ask.until(pair.decode, lambda f: not any(f[n] for n in idle), "nothing runs any more")

    run(test())


def test_kv_that_is_fetched_too_late_is_answered_as_if_it_were_right(pair: Pair) -> None:
    """Nothing in decode's answer tells; only prefill's counter does, afterwards. So the router watches the time."""

    async def test() -> None:
        async with client() as session:
            ask = Client(session)
            before = await ask.figures(pair.prefill)
            body = SHORT | {"prompt": [9, *PROMPT]}
            params = (await ask.prefilled(pair.prefill, body))["kv_transfer_params"]
            gone = before[names.VLLM_KV_EXPIRED] + 1
            await ask.until(pair.prefill, lambda f: f[names.VLLM_KV_EXPIRED] == gone, f"{LEASE_S} s are over")
            status, _ = await ask.post(pair.decode, body | {"kv_transfer_params": params})
            assert status == 200
            # It looks at what decode has told it when it has something to do.
            status, _ = await ask.post(pair.prefill, SHORT)
            assert status == 200
            late = before[names.VLLM_KV_LATE] + 1
            await ask.until(pair.prefill, lambda f: f[names.VLLM_KV_LATE] == late, "prefill has noticed")
        assert vllm.late(vllm.LEASE_S)

    run(test())


def test_figures_have_the_names_that_we_read(pair: Pair) -> None:
    async def test() -> None:
        async with client() as session:
            found = await Client(session).figures(pair.decode)
        gauges = [names.VLLM_RUNNING, names.VLLM_WAITING, names.VLLM_KV_USAGE, names.VLLM_PREEMPTIONS]
        counters = [PULLED, names.VLLM_KV_EXPIRED, names.VLLM_KV_LATE, names.VLLM_KV_FAILED]
        times = [names.VLLM_TTFT, names.VLLM_INTER_TOKEN, names.VLLM_TPOT, names.VLLM_QUEUE_TIME]
        times += [names.VLLM_PREFILL_TIME, names.VLLM_DECODE_TIME]
        lengths = [names.VLLM_PROMPT_TOKENS, names.VLLM_GENERATION_TOKENS]
        missing = [n for n in [*gauges, *counters] if n not in found]
        missing += [n for n in [*times, *lengths] if f"{n}_count" not in found or f"{n}_sum" not in found]
        assert not missing

    run(test())


def test_a_longer_prompt_ends_a_server_and_a_dead_prefill_is_a_500_or_an_error_in_the_stream(
    pair: Pair,
) -> None:
    """Why both sides get the very same prompt, and clients' own params go nowhere."""

    async def test() -> None:
        async with client() as session:
            ask = Client(session)
            body = SHORT | {"prompt": [11, *PROMPT]}
            one = await ask.prefilled(pair.prefill, body)
            two = await ask.prefilled(pair.prefill, body)
            other = await ask.prefilled(pair.decode, SHORT | {"prompt": [13, *PROMPT]})
            longer = SHORT | {
                "prompt": [13, 13, *PROMPT, *PROMPT],
                "kv_transfer_params": other["kv_transfer_params"],
            }
            try:
                status, _ = await ask.post(pair.prefill, longer)
                assert status == 500
            except aiohttp.ClientError:
                pass  # it went without a word
            await asyncio.to_thread(pair.prefill.process.wait, servers.PATIENCE_S)
            status, answer = await ask.post(
                pair.decode, body | {"kv_transfer_params": one["kv_transfer_params"]}
            )
            assert (status, *error(answer)) == (500, "InternalServerError", None, 500)
            sent = body | {"stream": True, "kv_transfer_params": two["kv_transfer_params"]}
            stream = vllm.Frames(keep_usage=False)
            async with session.post(f"{pair.decode.url}/v1/completions", json=sent) as reply:
                assert reply.status == 200
                async for chunk in reply.content.iter_any():
                    stream.feed(chunk)
            assert stream.error is not None
            assert not stream.begun, "an error before the first token: the router can begin again elsewhere"
            # It lives on.
            status, _ = await ask.post(pair.decode, body)
            assert status == 200

    run(test())


def test_asked_to_end_it_finishes_what_it_has_and_says_that_it_is_well(pair: Pair) -> None:
    async def test() -> None:
        async with client() as session:
            ask = Client(session)
            frames = ask.frames(pair.decode, LONG | {"stream_options": {"include_usage": True}})
            got = [await anext(frames)]
            pair.decode.process.terminate()
            # From some moment on nothing new is taken, and it says so with HTTP 200 and no token.
            finish = "length"
            while finish != "abort":
                status, answer = await ask.post(pair.decode, SHORT | {"max_tokens": 1})
                assert status == 200
                finish = answer["choices"][0]["finish_reason"]
            assert answer["usage"]["completion_tokens"] == 0
            assert vllm.aborted(answer)
            first = await ask.prefilled(pair.decode, SHORT)
            assert first["kv_transfer_params"] is None
            stream = vllm.Frames(keep_usage=False)
            sent = SHORT | {"stream": True}
            async with session.post(f"{pair.decode.url}/v1/completions", json=sent) as reply:
                assert reply.status == 200
                async for chunk in reply.content.iter_any():
                    stream.feed(chunk)
            assert not stream.begun
            async with session.get(f"{pair.decode.url}/health") as health:
                assert health.status == 200
            got += [frame async for frame in frames]
            assert got[-1] == "[DONE]"
            # By usage: while its reader is busy, a frame may hold several tokens.
            assert got[-2]["usage"]["completion_tokens"] == CONTEXT - len(PROMPT)
        assert await asyncio.to_thread(pair.decode.process.wait, servers.PATIENCE_S) == 0

    run(test())

"""The whole router on loopback, between a client and instances that speak the engine's dialect without an engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from disaggserve import metric_names as names
from disaggserve import workload
from disaggworker.load import Book
from disaggworker.router.app import Router, serving
from disaggworker.router.config import Config
from disaggworker.router.fleet import Role, Seen
from e2e import load
from tests.wires import listening

Json = dict[str, Any]

PATIENCE_S = 20.0
MODEL = "tiny"
CONFIG = Config("ns", "chat", MODEL, 2048, 5.0, 5.0, "127.0.0.1", queue_timeout_s=PATIENCE_S, linger_s=0.0)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3 * PATIENCE_S):
            await test

    asyncio.run(bounded())


async def until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never came true: {what}"
        await asyncio.sleep(0.005)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def letter(place: int) -> str:
    """What every instance says at this place of every answer: a token out of its place is seen."""
    return "A" if place == 0 else chr(ord("a") + place % 26)


def frame(text: str, finish: str | None = None, chat: bool = False, ids: bool = False) -> bytes:
    choice: Json = {"index": 0, "finish_reason": finish}
    choice |= {"delta": {"content": text}} if chat else {"text": text}
    choice |= {"token_ids": [ord(text)]} if ids else {}
    return b"data: " + json.dumps({"id": "x", "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


class Fake:
    """One instance: `trouble` decides what goes wrong, `gate` when it answers."""

    def __init__(self, role: Role, name: str, key: str = "k") -> None:
        self.role, self.name, self.key = role, name, key
        self.bodies: list[Json] = []
        self.ids: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.mid = asyncio.Event()  # decode: between its first frame and its others
        self.mid.set()
        self.status, self.error = 200, b""
        self.dies = ""  # "" | "before" | "mid": after its first frame
        self.says_seed = True  # so that an answer can go on elsewhere
        self.engine = "torch"
        self.pieces: list[bytes] | None = None
        self.written = 0  # bytes that its socket has taken
        self.cancelled = 0
        self.released: list[str] = []
        self.book: Book | None = None  # what it tells of its load, where it does
        self.url = ""

    @property
    def seen(self) -> Seen:
        return Seen(self.name, self.name, self.role, self.key, self.url, True, engine=self.engine)

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Fake]:
        app = web.Application()
        app.router.add_post("/v1/completions", self._handle)
        app.router.add_post("/v1/chat/completions", self._handle)
        app.router.add_post("/release", self._release)
        if self.book:
            app.router.add_get("/load", self.book.stream)
        async with listening(app) as self.url:
            yield self

    async def _handle(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.bodies.append(body)
        self.ids.append(http.headers["X-Request-Id"])
        try:
            with self.book.queued(http, len(body["prompt"])) if self.book else contextlib.nullcontext():
                await self.gate.wait()
            if self.dies == "before":
                assert http.transport is not None
                http.transport.abort()
                return web.Response()
            if self.status != 200:
                return web.Response(status=self.status, body=self.error)
            return self._first(body) if self.role == "prefill" else await self._rest(http, body)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _release(self, http: web.Request) -> web.Response:
        self.released.append((await http.json())["handoff"])
        return web.Response()

    def _first(self, body: Json) -> web.Response:
        chat = "messages" in body
        params = body["kv_transfer_params"]
        answered = params.get("resume", {}).get("answered", [])
        text = letter(len(answered))
        done = params.get("max_tokens") == len(answered) + 1
        choice: Json = {"index": 0, "finish_reason": "length", "token_ids": [ord(text)]}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        tokens = 7 if chat or isinstance(body["prompt"], str) else len(body["prompt"])
        given: Json = {"from": self.name, "handoff": f"{self.name}-{len(self.bodies)}", "answered": answered}
        if self.says_seed:
            given["seed"] = params.get("resume", {}).get("seed", 5)
        return web.json_response(
            {
                "id": "cmpl-1",
                "model": MODEL,
                "created": 1,
                "choices": [choice],
                "usage": {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1},
                "kv_transfer_params": {"done": True} if done else given,
            }
        )

    async def _rest(self, http: web.Request, body: Json) -> web.StreamResponse:
        chat = "messages" in body
        n = body.get("max_tokens") or body.get("max_completion_tokens") or 4
        if not body.get("stream"):
            return web.json_response(
                {
                    "choices": [{"text": "".join(map(letter, range(n)))}],
                    "usage": {"prompt_tokens": 3, "completion_tokens": n},
                }
            )
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(http)
        await answer.write(b"")
        if self.engine == "vllm" or self.role == "mixed":  # all of the answer is its own
            assert body["stream_options"]["include_usage"]
            usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":%d}}\n\n' % n
            pieces = [*stream(n, chat, 0)[:-1], usage, b"data: [DONE]\n\n"]
        else:
            start = len(body["kv_transfer_params"]["answered"]) + 1
            pieces = stream(n, chat, start, "return_token_ids" in body)
        for piece in self.pieces or pieces:
            await answer.write(piece)
            self.written += len(piece)
            if self.dies == "mid":
                assert http.transport is not None
                http.transport.abort()
                return answer
            await self.mid.wait()
        await answer.write_eof()
        return answer


def stream(n: int, chat: bool = False, start: int = 1, ids: bool = False) -> list[bytes]:
    frames = [frame(letter(k), "length" if k == n - 1 else None, chat, ids) for k in range(start, n)]
    return [*frames, b"data: [DONE]\n\n"]


class Bench:
    """A router, its instances, and a client."""

    def __init__(self, router: Router, url: str, client: aiohttp.ClientSession, fakes: list[Fake]) -> None:
        self.router, self.url, self.client, self.fakes = router, url, client, fakes

    def show(self, *changed: Seen) -> None:
        """The view: all fakes, some otherwise."""
        other = {s.uid: s for s in changed}
        self.router.update([other.get(f.name, f.seen) for f in self.fakes])

    def post(self, path: str = "/v1/completions", headers: Json | None = None, **body: Any) -> Any:
        asked = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 4, **body}
        asked = {k: v for k, v in asked.items() if v is not ...}
        return self.client.post(self.url + path, json=asked, headers=headers)

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.client.get(self.url + path) as answer:
            return answer.status, await answer.json()

    async def metrics(self) -> dict[str, float]:
        """Non-zero samples, as `name{label="value",…}` without the resource label, which must be there."""
        await until(lambda: not self.router.proxy.active, "no request in flight")  # counted at their very end
        async with self.client.get(self.url + "/metrics") as answer:
            text = await answer.text()
        out = {}
        for family in text_string_to_metric_families(text):
            for s in family.samples:
                labels = dict(s.labels)
                assert labels.pop(names.RESOURCE_LABEL) == "ns/chat"
                if s.value:
                    inside = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
                    out[f"{s.name}{{{inside}}}"] = s.value
        return out

    async def outcomes(self) -> dict[str, float]:
        head = names.ROUTER_REQUESTS + "{"
        return {
            k[len(head) : -1].replace("outcome=", "").replace(",slo_met=", " "): v
            for k, v in (await self.metrics()).items()
            if k.startswith(head)
        }

    async def idle(self) -> None:
        await until(lambda: not self.router.proxy.active, "no request in flight")
        self.router.fleet.check_integrity()
        assert self.router.admission.queued == 0


@contextlib.asynccontextmanager
async def bench(*fakes: Fake, config: Config = CONFIG) -> AsyncIterator[Bench]:
    config = replace(config, port=free_port())
    async with contextlib.AsyncExitStack() as stack:
        for fake in fakes:
            await stack.enter_async_context(fake.up())
        router = await stack.enter_async_context(serving(config))
        client = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
        made = Bench(router, f"http://127.0.0.1:{config.port}", client, list(fakes))
        made.show()
        yield made


def pair() -> tuple[Fake, Fake]:
    return Fake("prefill", "p"), Fake("decode", "d")


# ------------------------------------------------------------------------------------------- the hand-off


def test_stream_is_first_token_then_decodes_bytes_unchanged() -> None:
    async def test() -> None:
        p, d = pair()
        d.mid.clear()
        async with bench(p, d) as b:
            async with b.post(
                stream=True, stop=["."], kv_transfer_params={"evil": 1}, headers={"X-Request-Id": "my-id"}
            ) as answer:
                assert answer.status == 200
                assert answer.headers["X-Request-Id"] == "my-id"
                first = json.loads(
                    (await answer.content.readuntil(b"\n\n"))[6:]
                )  # while decode has not ended
                assert first["choices"] == [
                    {"index": 0, "text": "A", "logprobs": None, "finish_reason": None}
                ]
                assert first["object"] == "text_completion"
                d.mid.set()
                assert await answer.read() == b"".join(stream(4))
            assert p.ids == d.ids == ["my-id"]
            asked, handed = p.bodies[0], d.bodies[0]
            assert (asked["stream"], asked["max_tokens"]) == (False, 1)
            name = asked["kv_transfer_params"].pop("handoff")
            assert re.fullmatch("[0-9a-f]{32}", name)
            assert asked["kv_transfer_params"] == {
                "do_remote_decode": True,
                "do_remote_prefill": False,
                "max_tokens": 4,
                "stop": ["."],
            }
            assert handed["kv_transfer_params"] == {
                "from": "p",
                "handoff": "p-1",
                "seed": 5,
                "answered": [],
            }
            assert (handed["stream"], handed["max_tokens"], handed["stop"]) == (True, 4, ["."])
            await b.idle()

    run(test())


def test_chat_starts_with_role_and_content() -> None:
    async def test() -> None:
        async with bench(*pair()) as b:
            async with b.post(
                "/v1/chat/completions",
                prompt=...,
                max_tokens=...,
                max_completion_tokens=3,
                stream=True,
                messages=[{"role": "user", "content": "hello"}],
            ) as answer:
                frames = (await answer.read()).split(b"\n\n")
            first = json.loads(frames[0][6:])
            assert first["object"] == "chat.completion.chunk"
            assert first["choices"][0]["delta"] == {"role": "assistant", "content": "A"}
            assert b"\n\n".join(frames[1:]) == b"".join(stream(3, chat=True))
            assert b.fakes[0].bodies[0]["max_completion_tokens"] == 1

    run(test())


def test_whole_answer_is_decodes_own() -> None:
    async def test() -> None:
        async with bench(*pair()) as b:
            async with b.post() as answer:
                assert await answer.json() == {
                    "choices": [{"text": "Abcd"}],
                    "usage": {"prompt_tokens": 3, "completion_tokens": 4},
                }
                assert answer.headers["X-Request-Id"]
            assert await b.outcomes() == {"ok true": 1}

    run(test())


@pytest.mark.parametrize("usage", [False, True])
def test_an_answer_that_ends_at_its_first_token_needs_no_decode(usage: bool) -> None:
    async def test() -> None:
        p, d = pair()
        async with bench(p, d) as b:
            async with b.post(max_tokens=1) as answer:
                whole = await answer.json()
            assert whole["choices"] == [{"index": 0, "text": "A", "finish_reason": "length"}]
            assert "kv_transfer_params" not in whole
            async with b.post(max_tokens=1, stream=True, stream_options={"include_usage": usage}) as answer:
                *frames, done, end = (await answer.read()).split(b"\n\n")
            assert (done, end) == (b"data: [DONE]", b"")
            said = [json.loads(f[6:]) for f in frames]
            assert said[0]["choices"][0]["finish_reason"] == "length"
            assert [s["choices"] for s in said[1:]] == ([[]] if usage else [])
            assert not usage or said[1]["usage"]["completion_tokens"] == 1
            assert not d.bodies
            assert await b.outcomes() == {"ok true": 2}  # one token alone meets TPOT
            await b.idle()

    run(test())


def test_frames_split_anywhere_are_counted_once_and_pass_unchanged() -> None:
    async def test() -> None:
        p, d = pair()
        async with bench(p, d) as b:
            usage = b'data: {"choices":[],"usage":{"completion_tokens":6}}\n\n'
            whole = b"".join([*stream(6)[:-1], usage, b"data: [DONE]\n\n"])
            d.pieces = [whole[k : k + 11] for k in range(0, len(whole), 11)]
            async with b.post(max_tokens=6, stream=True) as answer:
                body = await answer.read()
            assert body.split(b"\n\n", 1)[1] == whole
            found = await b.metrics()
            assert sum(v for k, v in found.items() if k.startswith(names.ROUTER_OUTPUT_TOKENS)) == 6

    run(test())


# ------------------------------------------------------------------------------------------- what is counted


def test_metrics_are_exact() -> None:
    async def test() -> None:
        async with bench(*pair()) as b:
            assert await b.metrics() == {}
            for prompt, n in (([1] * 65, 4), ([1] * 64, 17), ("abcdefgh", 2)):
                async with b.post(prompt=prompt, max_tokens=n, stream=True) as answer:
                    await answer.read()
            async with b.post(model="other") as answer:
                assert answer.status == 404
            found = await b.metrics()
            assert found[names.ROUTER_ARRIVALS + "{}"] == 3
            assert await b.outcomes() == {"ok true": 3, "rejected false": 1}
            lengths = {k: v for k, v in found.items() if k.startswith(names.ROUTER_LENGTHS)}
            assert lengths == {
                "disaggserve_router_lengths_total{input_bucket=1,output_bucket=0}": 1,
                "disaggserve_router_lengths_total{input_bucket=0,output_bucket=1}": 1,
                "disaggserve_router_lengths_total{input_bucket=0,output_bucket=0}": 1,
            }
            assert found[names.ROUTER_INPUT_TOKENS + "{input_bucket=0}"] == 64 + 7
            assert found[names.ROUTER_INPUT_TOKENS + "{input_bucket=1}"] == 65
            assert found[names.ROUTER_OUTPUT_TOKENS + "{output_bucket=0}"] == 4 + 2
            assert found[names.ROUTER_OUTPUT_TOKENS + "{output_bucket=1}"] == 17
            gaps, squares = found[names.ROUTER_GAPS + "{}"], found[names.ROUTER_GAPS_SQUARED + "{}"]
            assert gaps**2 / 2 <= squares <= gaps**2  # of two gaps
            assert found[names.ROUTER_TTFT + "_count{}"] == 3
            assert found[names.ROUTER_TPOT + "_count{}"] == 3

    run(test())


def test_all_label_values_are_there_from_the_start() -> None:
    async def test() -> None:
        async with bench() as b:
            async with b.client.get(b.url + "/metrics") as answer:
                text = await answer.text()
            assert text.count(names.ROUTER_LENGTHS + "{") == 144
            assert text.count(names.ROUTER_REQUESTS + "{") == 2 * len(names.OUTCOMES)
            assert f'{names.ROUTER_GAPS}{{resource="ns/chat"}} 0.0' in text
            assert f'{names.ROUTER_ARRIVALS}{{resource="ns/chat"}} 0.0' in text

    run(test())


def test_a_promise_not_kept_is_seen() -> None:
    async def test() -> None:
        async with bench(*pair(), config=replace(CONFIG, ttft_s=1e-9)) as b:
            async with b.post() as answer:
                await answer.read()
            assert await b.outcomes() == {"ok false": 1}

    run(test())


# ------------------------------------------------------------------------------------------- when instances fail


@pytest.mark.parametrize("how", ["before", "500", "gone"])
def test_another_prefill_takes_over(how: str) -> None:
    async def test() -> None:
        bad, good, d = Fake("prefill", "p0"), Fake("prefill", "p1"), Fake("decode", "d")
        bad.dies, bad.status = ("before", 200) if how == "before" else ("", 500)
        async with bench(bad, good, d) as b:
            if how == "gone":
                b.show(replace(bad.seen, url=f"http://127.0.0.1:{free_port()}"))
            async with b.post(stream=True) as answer:
                assert (await answer.read()).endswith(b"[DONE]\n\n")
            assert len(good.bodies) == 1
            assert await b.outcomes() == {"ok true": 1}
            await b.idle()

    run(test())


def test_attempts_are_bounded() -> None:
    async def test() -> None:
        p, d = pair()
        p.status = 500
        async with bench(p, d) as b:
            async with b.post() as answer:
                assert answer.status == 502
                assert (await answer.json())["error"]["code"] == "instance_failed"
            assert 1 < len(p.bodies) < 10
            assert await b.outcomes() == {"failed false": 1}
            await b.idle()

    run(test())


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("how", ["before", "500", "mid", "said"])
def test_an_answer_goes_on_elsewhere(how: str, chat: bool) -> None:
    """Decode fails after the first token or in mid-stream: the client sees the answer of one undisturbed instance."""

    async def test() -> None:
        p, bad, good = Fake("prefill", "p"), Fake("decode", "d0"), Fake("decode", "d1")
        bad.dies, bad.status = (how if how in ("before", "mid") else ""), 500 if how == "500" else 200
        if how == "said":
            error = b'data: {"error": {"message": "out of memory"}}\n\n'
            bad.pieces = [frame(letter(1), None, chat, ids=True), error, b"data: [DONE]\n\n"]
        asked = {"prompt": ..., "messages": [{"role": "user", "content": "a"}]} if chat else {}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        async with bench(p, bad, good) as b:
            async with b.post(
                path, stream=True, temperature=0.7, stream_options={"include_usage": True}, **asked
            ) as answer:
                *frames, done, end = (await answer.read()).split(b"\n\n")
            assert (done, end) == (b"data: [DONE]", b"")
            said = [json.loads(f[6:]) for f in frames]
            choices = [s["choices"][0] for s in said]
            texts = [c["delta"]["content"] if chat else c["text"] for c in choices]
            assert texts == [letter(k) for k in range(4)]
            assert [c["finish_reason"] for c in choices] == [None, None, None, "length"]
            assert not any("token_ids" in c for c in choices)
            assert not chat or ["role" in c["delta"] for c in choices] == [True, False, False, False]
            had = [ord(letter(k)) for k in range(2 if how in ("mid", "said") else 1)]
            assert p.bodies[1]["kv_transfer_params"]["resume"] == {"answered": had, "seed": 5}
            found = await b.metrics()
            assert found[names.ROUTER_CONTINUATIONS + "{}"] == 1
            assert found[names.ROUTER_LENGTHS + "{input_bucket=0,output_bucket=0}"] == 1
            assert found[names.ROUTER_OUTPUT_TOKENS + "{output_bucket=0}"] == 4
            assert await b.outcomes() == {"ok true": 1}
            await b.idle()

    run(test())


def test_an_answer_goes_on_as_often_as_it_gets_further() -> None:
    async def test() -> None:
        p, dying = Fake("prefill", "p"), [Fake("decode", f"d{k}") for k in range(7)]
        for d in dying:
            d.dies = "mid"
        async with bench(p, *dying) as b:
            async with b.post(stream=True, max_tokens=14, return_token_ids=True) as answer:
                frames = (await answer.read()).split(b"\n\n")[:-2]
            choices = [json.loads(f[6:])["choices"][0] for f in frames]
            assert [c["text"] for c in choices] == [letter(k) for k in range(14)]
            assert [c["token_ids"] for c in choices] == [[ord(letter(k))] for k in range(14)]
            assert [len(d.bodies) for d in dying] == [1] * 7
            assert await b.outcomes() == {"ok true": 1}
            await b.idle()

    run(test())


def test_an_answer_whose_last_token_is_there_lacks_nothing() -> None:
    async def test() -> None:
        p, d = pair()
        d.dies = "mid"
        async with bench(p, d) as b:
            async with b.post(stream=True, max_tokens=2, stream_options={"include_usage": True}) as answer:
                _, last, usage, done, _ = (await answer.read()).split(b"\n\n")
            assert json.loads(last[6:])["choices"][0]["finish_reason"] == "length"
            assert json.loads(usage[6:])["usage"] == {
                "prompt_tokens": 3,
                "completion_tokens": 2,
                "total_tokens": 5,
            }
            assert done == b"data: [DONE]"
            assert len(p.bodies) == 1
            assert await b.outcomes() == {"ok true": 1}

    run(test())


def test_an_answer_goes_on_with_the_same_weights_or_not_at_all() -> None:
    async def test() -> None:
        p, dying, last = Fake("prefill", "p0", "a"), Fake("decode", "d0", "a"), Fake("decode", "d1", "a")
        others = Fake("prefill", "p9", "b"), Fake("decode", "d9", "b")
        dying.dies = "mid"
        config = replace(CONFIG, queue_timeout_s=0.2)
        async with bench(p, dying, last, *others, config=config) as b:
            b.show(replace(last.seen, draining=True))  # it still takes what its prefill was given
            async with b.post(stream=True) as answer:
                assert b'"error"' not in (await answer.read())
            assert len(last.bodies) == 1
            b.show(replace(last.seen, ready=False))
            await until(lambda: b.router.fleet.decode("a", b.router.proxy.clock()), "d0 is tried again")
            async with b.post(stream=True) as answer:
                frames = [json.loads(f[6:]) for f in (await answer.read()).split(b"\n\n")[:-2]]
            assert [f["choices"][0]["text"] for f in frames[:-1]] == [letter(0), letter(1)]
            assert "of the pairing key" in frames[-1]["error"]["message"]
            assert not any(o.bodies for o in others)
            await b.idle()

    run(test())


def test_an_answer_of_a_pair_does_not_begin_again_at_a_mixed_instance() -> None:
    async def test() -> None:
        p, dying, mixed = Fake("prefill", "p"), Fake("decode", "d"), Fake("mixed", "m")
        dying.dies = "mid"
        async with bench(p, dying, mixed, config=replace(CONFIG, queue_timeout_s=0.2)) as b:
            b.show(replace(mixed.seen, ready=False))
            dying.gate.clear()
            asked = asyncio.create_task(b.post(stream=True).__aenter__())
            await until(lambda: dying.bodies, "decode has the request")
            b.show(*(replace(f.seen, ready=False) for f in (p, dying)))  # only the mixed one is left
            dying.gate.set()
            frames = [json.loads(f[6:]) for f in (await (await asked).read()).split(b"\n\n")[:-2]]
            assert [f["choices"][0]["text"] for f in frames[:-1]] == [letter(0), letter(1)]
            assert "of the pairing key" in frames[-1]["error"]["message"]
            assert not mixed.bodies
            await b.idle()

    run(test())


@pytest.mark.parametrize("how", ["before", "mid"])
def test_an_answer_that_cannot_go_on_ends_honestly(how: str) -> None:
    async def test() -> None:
        p, bad, good = Fake("prefill", "p"), Fake("decode", "d0"), Fake("decode", "d1")
        bad.dies, p.says_seed = how, False
        async with bench(p, bad, good) as b:
            async with b.post(stream=True, temperature=0.7) as answer:
                *_, error, done, _ = (await answer.read()).split(b"\n\n")
            assert "neither tokens nor seed" in json.loads(error[6:])["error"]["message"]
            assert done == b"data: [DONE]"
            assert await b.outcomes() == {"failed false": 1}
            async with b.post(temperature=0.7) as answer:  # nothing was shown: from the start
                assert answer.status == 200
            await b.idle()

    run(test())


@pytest.mark.parametrize("how", ["", "before", "500", "said", "mid"])
def test_vllms_answer_is_all_decodes(how: str) -> None:
    """It fails unseen until its first token, and honestly after it."""

    async def test() -> None:
        p, bad, good = Fake("prefill", "p"), Fake("decode", "d0"), Fake("decode", "d1")
        p.says_seed = False
        for fake in (p, bad, good):
            fake.engine = "vllm"
        bad.dies, bad.status = (how if how in ("before", "mid") else ""), 500 if how == "500" else 200
        if how == "said":
            bad.pieces = [b'data: {"error":{"message":"prefill is gone"}}\n\n', b"data: [DONE]\n\n"]
        async with bench(p, bad, good) as b:
            async with b.post(stream=True) as answer:
                body = await answer.read()
            if how == "mid":
                assert body.startswith(frame("A"))
                assert b'"error"' in body
            else:
                assert body == b"".join(stream(4, start=0))
                assert len(p.bodies) == (1 if not how else 2)
                found = await b.metrics()
                assert found[names.ROUTER_OUTPUT_TOKENS + "{output_bucket=0}"] == 4
            assert await b.outcomes() == {"failed false" if how == "mid" else "ok true": 1}
            await b.idle()

    run(test())


@pytest.mark.parametrize("engine", ["torch", "vllm"])
@pytest.mark.parametrize("how", ["", "before", "500", "mid"])
def test_a_mixed_instance_answers_alone(engine: str, how: str) -> None:
    async def test() -> None:
        bad, good = Fake("mixed", "m0"), Fake("mixed", "m1")
        bad.engine = good.engine = engine
        bad.dies, bad.status = (how if how in ("before", "mid") else ""), 500 if how == "500" else 200
        async with bench(bad, good) as b:
            async with b.post(stream=True, prompt="abcdefgh" * 20) as answer:
                body = await answer.read()
            assert all("kv_transfer_params" not in asked for f in (bad, good) for asked in f.bodies)
            if how == "mid":  # it says no seed, so that another could not go on with it
                assert body.startswith(frame("A"))
                assert b'"error"' in body
                assert await b.outcomes() == {"failed false": 1}
            else:
                assert body == b"".join(stream(4, start=0))
                async with b.post() as answer:
                    assert (await answer.json())["choices"][0]["text"] == "Abcd"
                assert await b.outcomes() == {"ok true": 2}
                found = await b.metrics()
                assert found[names.ROUTER_INPUT_TOKENS + "{input_bucket=0}"] == 6, (
                    "as the instance counted, not as guessed"
                )
                assert found[names.ROUTER_UNCACHED_TOKENS + "{}"] == 6
            await b.idle()

    run(test())


def test_requests_are_shared_among_mixed_instances_and_counted_where_they_are() -> None:
    async def test() -> None:
        fakes = [Fake("mixed", f"m{n}") for n in range(3)]
        async with bench(*fakes) as b:
            for fake in fakes:
                fake.mid.clear()
            asked = [asyncio.create_task(_read(b.post(stream=True))) for _ in range(3)]
            await until(lambda: all(f.bodies for f in fakes), "one request on each")
            await until(lambda: b.router.admission.queued == 0, "every first token")
            view = (await b.get("/drain"))[1]["instances"]
            assert [(v["in_flight"], v["leased"]) for v in view.values()] == [(1, 0)] * 3
            held = [(i.queued_tokens, i.kv_tokens > 0) for i in b.router.fleet.instances()]
            assert held == [(0, True)] * 3, "what decodes is no longer in the queue"
            for fake in fakes:
                fake.mid.set()
            assert await asyncio.gather(*asked) == [b"".join(stream(4, start=0))] * 3
            await b.idle()

    run(test())


async def _read(answer: Any) -> bytes:
    async with answer as opened:
        return bytes(await opened.read())


def test_a_decode_that_cannot_be_reached_costs_no_second_prefill() -> None:
    async def test() -> None:
        p, bad, good = Fake("prefill", "p"), Fake("decode", "d0"), Fake("decode", "d1")
        async with bench(p, bad, good) as b:
            b.show(replace(bad.seen, url=f"http://127.0.0.1:{free_port()}"))
            async with b.post(stream=True, temperature=0.7) as answer:
                assert (await answer.read()).endswith(b"".join(stream(4)))
            assert len(p.bodies) == 1
            assert not p.released
            await b.idle()

    run(test())


def test_kv_that_nobody_will_pull_is_given_back() -> None:
    async def test() -> None:
        p, d = pair()
        d.status, d.error = 400, b'{"error":{"message":"no"}}'
        async with bench(p, d) as b:
            async with b.post() as answer:
                assert answer.status == 400
            await until(lambda: p.released == ["p-1"], "the hand-off is released")
            d.status = 200
            d.gate.clear()
            asked = asyncio.create_task(b.post().__aenter__())
            await until(lambda: len(d.bodies) == 2, "decode has the request")
            asked.cancel()
            await until(lambda: d.cancelled and len(p.released) == 2, "and released when the client goes")
            await b.idle()

    run(test())


def test_a_client_that_goes_cancels_upstream() -> None:
    async def test() -> None:
        p, d = pair()
        async with bench(p, d) as b:
            d.mid.clear()
            async with b.post(stream=True) as answer:
                await answer.content.readuntil(b"\n\n")
                await until(lambda: d.bodies, "decode has the request")
                answer.close()
            await until(lambda: d.cancelled, "decode was told")
            await b.idle()
            p.gate.clear()
            asked = asyncio.create_task(b.post().__aenter__())
            await until(lambda: len(p.bodies) == 2, "prefill has the request")
            asked.cancel()
            await until(lambda: p.cancelled, "prefill was told")
            await b.idle()
            assert await b.outcomes() == {"cancelled false": 2}

    run(test())


def test_a_slow_client_holds_its_instance_back() -> None:
    """What a client does not take is not piled up in the router."""

    async def test() -> None:
        p, d = pair()
        async with bench(p, d) as b:
            text = "x" * 2**16
            d.pieces = [frame(text) for _ in range(640)]
            d.pieces += stream(2)
            reader, writer = await asyncio.open_connection("127.0.0.1", b.router.config.port, limit=2**16)
            body = json.dumps({"prompt": "a", "max_tokens": 642, "stream": True}).encode()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
            )
            writer.write(body)
            still, before = 0, -1
            while still < 20:  # nothing has moved for a while
                still, before = (still + 1, d.written) if d.written == before else (0, d.written)
                await asyncio.sleep(0.02)
            assert 0 < d.written < 30 * 2**20
            got = 0
            while not (piece := await reader.read(2**20)).endswith(b"0\r\n\r\n"):
                got += len(piece)
            writer.close()
            assert got + len(piece) > 40 * 2**20
            await b.idle()
            assert await b.outcomes() == {"ok true": 1}

    run(test())


def test_a_workers_refusal_is_passed_on() -> None:
    async def test() -> None:
        p, d = pair()
        p.status = 400
        p.error = b'{"error":{"message":"too long","type":"invalid_request_error","param":"input_tokens","code":null}}'
        async with bench(p, d) as b:
            async with b.post() as answer:
                assert (answer.status, await answer.read()) == (400, p.error)
            assert len(p.bodies) == 1
            assert await b.outcomes() == {"rejected false": 1}

    run(test())


# ------------------------------------------------------------------------------------------- capacity, drain, end


def test_waiters_are_served_when_an_instance_comes_up() -> None:
    async def test() -> None:
        p, d = pair()
        async with bench(p, d) as b:
            b.show(replace(d.seen, ready=False))
            assert (await b.get("/ready"))[0] == 503
            asked = asyncio.create_task(b.post().__aenter__())
            await until(lambda: b.router.admission.queued, "the request waits")
            b.show()
            answer = await asked
            assert answer.status == 200
            await answer.read()
            assert await b.get("/ready") == (200, {"ready": True, "reason": None})

    run(test())


def test_no_pair_in_time_is_503_and_a_full_queue_429() -> None:
    async def test() -> None:
        config = replace(CONFIG, queue_timeout_s=0.3, max_queued=1)
        async with bench(Fake("prefill", "p", "old"), Fake("decode", "d", "new"), config=config) as b:
            first = asyncio.create_task(b.post().__aenter__())
            await until(lambda: b.router.admission.queued, "the request waits")
            async with b.post() as answer:
                assert answer.status == 429
                assert int(answer.headers["Retry-After"]) > 0
            answer = await first
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert "pairing key" in (await answer.json())["error"]["message"]
            assert await b.outcomes() == {"refused false": 2}

    run(test())


def test_requests_stay_within_their_pairing_key() -> None:
    async def test() -> None:
        fakes = [
            Fake("prefill", "p0", "a"),
            Fake("decode", "d0", "a"),
            Fake("prefill", "p1", "b"),
            Fake("decode", "d1", "b"),
        ]
        async with bench(*fakes) as b:
            await asyncio.gather(*(self_read(b) for _ in range(12)))
            for p, d in (fakes[:2], fakes[2:]):
                assert p.ids
                assert sorted(p.ids) == sorted(d.ids)

    async def self_read(b: Bench) -> None:
        async with b.post(stream=True) as answer:
            await answer.read()

    run(test())


def test_drain_view_follows_a_request() -> None:
    async def test() -> None:
        p, d = pair()
        async with bench(p, d) as b:

            async def view() -> dict[str, tuple[bool, int, int]]:
                status, body = await b.get("/drain")
                assert status == 200
                return {
                    k: (v["admitting"], v["in_flight"], v["leased"]) for k, v in body["instances"].items()
                }

            for gate in (p.gate, d.gate, d.mid):
                gate.clear()
            asked = asyncio.create_task(b.post(stream=True).__aenter__())
            await until(lambda: p.bodies, "prefill has the request")
            assert await view() == {"p": (True, 1, 0), "d": (True, 0, 0)}
            b.show(replace(p.seen, draining=True))
            p.gate.set()
            await until(lambda: d.bodies, "decode has the request")
            assert await view() == {"p": (False, 0, 1), "d": (True, 1, 0)}
            d.gate.set()
            answer = await asked
            await until(lambda: not b.router.fleet.drain_view()["p"]["leased"], "decode has the KV")
            assert await view() == {"p": (False, 0, 0), "d": (True, 1, 0)}
            d.mid.set()
            await answer.read()
            await b.idle()
            b.router.update([d.seen])
            assert set(await view()) == {"d"}  # unknown, not zero

    run(test())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"model":"tiny"}', 400),
        (b'{"model":"tiny","prompt":"a","n":2}', 400),
        (b'{"model":"tiny","prompt":"a","max_tokens":0}', 400),
        (b'{"model":"other","prompt":"a"}', 404),
        (b'{"model":"tiny","prompt":"' + b"a" * (4 * 2**20) + b'"}', 413),
    ],
)
def test_wrong_requests_are_refused_in_openais_shape(body: bytes, status: int) -> None:
    async def test() -> None:
        p, d = pair()
        async with bench(p, d) as b:
            async with b.client.post(b.url + "/v1/completions", data=body) as answer:
                assert answer.status == status
                error = (await answer.json())["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert status != 404 or error["code"] == "model_not_found"
            assert not p.bodies
            assert await b.outcomes() == {"rejected false": 1}

    run(test())


def test_small_answers() -> None:
    async def test() -> None:
        async with bench(*pair()) as b:
            _, models = await b.get("/v1/models")
            assert [m["id"] for m in models["data"]] == [MODEL]
            assert (await b.get("/v1/models/other"))[0] == 404
            assert (await b.get("/health"))[0] == 200
            status, body = await b.get("/nowhere")
            assert (status, body["error"]["type"]) == (404, "invalid_request_error")
            async with b.post(headers={"X-Request-Id": "bad id\u00e9"}) as answer:
                assert answer.headers["X-Request-Id"].isalnum()

    run(test())


def test_finish_waits_for_streams() -> None:
    async def test() -> None:
        p, d = pair()
        async with bench(p, d) as b:
            d.mid.clear()
            async with b.post(stream=True) as answer:
                await answer.content.readuntil(b"\n\n")
                finishing = asyncio.create_task(b.router.finish())
                await until(lambda: b.router.proxy.closing, "it is closing")
                assert (await b.get("/ready"))[0] == 503
                assert not finishing.done()
                d.mid.set()
                assert (await answer.read()) == b"".join(stream(4))
            await finishing

    run(test())


# ------------------------------------------------------------------------------------------- several routers

FACTS = dict.fromkeys(("waiting", "running", "free_blocks", "total_blocks", "leased_blocks"), 0)


def test_routers_side_by_side_share_the_load_and_notice_silence() -> None:
    async def test() -> None:
        p0, p1, d = Fake("prefill", "p0"), Fake("prefill", "p1"), Fake("decode", "d")
        p0.book, p1.book = Book(lambda: FACTS), Book(lambda: FACTS)
        async with bench(p0, p1, d) as a, bench_beside(a) as b, bench_beside(a) as c:

            def known(name: str) -> list[Any]:
                return [i for x in (a, b, c) for i in x.router.fleet.instances() if i.seen.name == name]

            await until(lambda: all(i.others and not i.lost for i in [*known("p0"), *known("p1")]), "heard")
            assert not any(i.lost for i in known("d"))  # it has no such door: own counts are all there is
            p0.gate.clear()
            p1.gate.clear()
            asked = [asyncio.create_task(a.post(prompt=[5] * 100).__aenter__())]
            await until(
                lambda: sorted(i.all_queued_tokens for i in known("p0")) == [100] * 3, "of a's request"
            )
            asked.append(asyncio.create_task(b.post(prompt=[5] * 60).__aenter__()))
            await until(
                lambda: sorted(i.all_queued_tokens for i in known("p1")) == [60] * 3, "of b's request"
            )
            asked.append(asyncio.create_task(c.post(prompt=[5] * 30).__aenter__()))
            await until(lambda: len(p1.bodies) == 2, "the shorter queue of all three routers' requests")
            for fake in (p0, p1):
                fake.gate.set()
            for task in asked:
                assert (await task).status == 200
            p0.book.close()
            await until(lambda: all(i.lost for i in known("p0")), "p0 has fallen silent")
            async with a.post() as answer:
                assert answer.status == 200
            assert (len(p0.bodies), len(p1.bodies)) == (1, 3)  # unknown is not idle

    run(test())


@contextlib.asynccontextmanager
async def bench_beside(other: Bench) -> AsyncIterator[Bench]:
    """Another router before the same instances."""
    config = replace(CONFIG, port=free_port())
    async with serving(config) as router:
        made = Bench(router, f"http://127.0.0.1:{config.port}", other.client, other.fakes)
        made.show()
        yield made


# ------------------------------------------------------------------------------------------- discovery, process


class ApiServer:
    """Just enough of an API server: a list of pods, and a watch."""

    def __init__(self) -> None:
        self.pods: list[Json] = []
        self.version = 1
        self.lists = 0
        self.down = False
        self.watches: list[asyncio.Queue[Json | None]] = []

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/ns/pods", self._pods)
        async with listening(app) as url:
            yield url

    async def _pods(self, http: web.Request) -> web.StreamResponse:
        assert http.query["labelSelector"].startswith("disaggserve.dev/resource=chat,")
        if self.down:
            return web.json_response({"message": "down"}, status=503)
        if "watch" not in http.query:
            self.lists += 1
            return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": self.pods})
        answer = web.StreamResponse()
        await answer.prepare(http)
        events: asyncio.Queue[Json | None] = asyncio.Queue()
        self.watches.append(events)
        while (event := await events.get()) is not None:
            line = json.dumps(event).encode() + b"\n"
            await answer.write(line[:9])
            await answer.write(line[9:])
        return answer


def pod(fake: Fake, **labels: str) -> Json:
    host, port = fake.url.removeprefix("http://").split(":")
    return {
        "metadata": {
            "uid": fake.name,
            "name": fake.name,
            "resourceVersion": "2",
            "labels": {"disaggserve.dev/role": fake.role, "disaggserve.dev/pairing-key": "k", **labels},
        },
        "spec": {"containers": [{"ports": [{"name": "http", "containerPort": int(port)}]}]},
        "status": {"podIP": host, "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    }


def test_the_process_finds_its_pods_and_ends_with_0(tmp_path: Path) -> None:
    async def test() -> None:
        p, d, api = *pair(), ApiServer()
        async with p.up(), d.up(), api.up() as server, aiohttp.ClientSession() as client:
            kubeconfig = tmp_path / "kubeconfig"
            kubeconfig.write_text(
                json.dumps(
                    {
                        "apiVersion": "v1",
                        "kind": "Config",
                        "current-context": "c",
                        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                        "clusters": [{"name": "c", "cluster": {"server": server}}],
                        "users": [{"name": "u", "user": {"token": "t"}}],
                    }
                )
            )
            api.pods = [pod(p)]
            port = free_port()
            arguments = f"--namespace ns --resource chat --model-name {MODEL} --context-length 2048 --ttft 1 --tpot 1 --port {port} --linger 0.1"
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "disaggworker",
                "router",
                *arguments.split(),
                env={
                    **os.environ,
                    "KUBECONFIG": str(kubeconfig),
                    "POD_IP": "127.0.0.1",
                    "PYTHONPATH": os.pathsep.join(sys.path),
                },
            )
            url = f"http://127.0.0.1:{port}"
            try:

                async def reach(wanted: Callable[[Json], bool], what: str) -> None:
                    deadline_s = time.monotonic() + PATIENCE_S
                    while True:
                        with contextlib.suppress(aiohttp.ClientError):
                            async with client.get(url + "/drain") as answer:
                                if wanted((await answer.json())["instances"]):
                                    return
                        assert time.monotonic() < deadline_s, what
                        await asyncio.sleep(0.02)

                await reach(lambda v: set(v) == {"p"}, "listed")
                await until(lambda: len(api.watches) == 1, "watched")
                api.watches[0].put_nowait({"type": "ADDED", "object": pod(d)})
                await reach(lambda v: set(v) == {"p", "d"} and v["d"]["admitting"], "added")
                body = {"model": MODEL, "prompt": [1], "max_tokens": 3, "stream": True}
                async with client.post(url + "/v1/completions", json=body) as answer:
                    assert (await answer.read()).endswith(b"".join(stream(3)))
                api.watches[0].put_nowait(
                    {"type": "MODIFIED", "object": pod(p, **{"disaggserve.dev/drain": "true"})}
                )
                await reach(lambda v: not v["p"]["admitting"], "drains")
                api.pods = [pod(p), pod(d)]
                expired = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
                api.watches[0].put_nowait({"type": "ERROR", "object": expired})
                await reach(lambda v: v["p"]["admitting"], "listed again after 410")
                await until(lambda: len(api.watches) == 2, "watched again")
                api.down = True
                for watch in api.watches:
                    watch.put_nowait(None)
                d.mid.clear()
                async with client.post(url + "/v1/completions", json=body) as answer:  # from the last view
                    await answer.content.readuntil(b"\n\n")
                    process.send_signal(signal.SIGTERM)
                    d.mid.set()
                    assert (await answer.read()) == b"".join(stream(3))
                assert await process.wait() == 0
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    run(test())


# ------------------------------------------------------------------------------------------- the load generator


def test_load_is_counted_and_replayable(tmp_path: Path) -> None:
    async def test() -> None:
        p, d = pair()
        async with bench(p, d) as b:
            wanted = [(0.01 * k, 10 + k, 1 + k % 4) for k in range(20)]
            told: list[load.Result] = []
            results = await load.run_load(b.url, MODEL, wanted, vocab=100, seed=1, on_result=told.append)
            assert [(r.input_tokens, r.output_tokens) for r in results] == [w[1:] for w in wanted]
            assert {(r.outcome, r.error) for r in results} == {("ok", "")}
            assert sorted(told, key=lambda r: r.due_s) == results
            assert sorted(len(body["prompt"]) for body in p.bodies) == [w[1] for w in wanted]
            assert all(body["ignore_eos"] and max(body["prompt"]) < 100 for body in p.bodies)
            load.write_csv(results, tmp_path / "out.csv")
            trace = workload.read_trace(tmp_path / "out.csv")
            assert trace.output.tolist() == [w[2] for w in wanted]
            assert load.summary(results, 60, 60)["attainment"] == 1
            assert load.summary(results, 0, 60)["attainment"] == 0
            assert (await b.outcomes()) == {"ok true": 20}

    run(test())


def test_load_tells_short_answers_and_refusals_and_stops() -> None:
    async def test() -> None:
        p, d = pair()
        async with bench(p, d, config=replace(CONFIG, max_queued=1)) as b:
            d.pieces = stream(3)
            (short,) = await load.run_load(b.url, MODEL, [(0, 5, 9)], vocab=100, seed=1)
            assert (short.outcome, short.error) == ("failed", "3 tokens came where 9 were asked for")
            assert math.isnan(short.ttft_s)
            p.gate.clear()
            stop = asyncio.Event()
            wanted = [(0.0, 5, 4), (0.2, 5, 4), (1e6, 5, 4)]
            task = asyncio.create_task(load.run_load(b.url, MODEL, wanted, vocab=100, seed=1, stop=stop))
            await until(lambda: b.router.metrics.requests[names.REFUSED, False], "the second is refused")
            stop.set()
            p.gate.set()
            d.pieces = None
            results = await task
            assert [r.outcome for r in results] == ["ok", "refused"]
            assert load.summary(results, 60, 60)["attainment"] == 0.5

    run(test())

"""The router between a client and vLLM servers: what each half is sent, and what of their answers is believed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from disaggserve import metric_names as names
from disaggworker.router import vllm
from disaggworker.router.app import Router, serving
from disaggworker.router.config import Config
from disaggworker.router.fleet import Role, Seen
from tests.wires import listening

Json = dict[str, Any]
PATIENCE_S = 20.0
CONFIG = Config("ns", "chat", "tiny", 2048, 5.0, 5.0, "127.0.0.1", queue_timeout_s=PATIENCE_S, linger_s=0.0)
ABORTED = {
    "choices": [{"index": 0, "text": "", "finish_reason": "abort"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 0},
    "kv_transfer_params": None,
}
Trouble = Callable[[web.Request, Json], Coroutine[Any, Any, web.StreamResponse | None]]


def frame(value: Json) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def choice(text: str, finish: str | None = None) -> bytes:
    return frame({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


USAGE = frame({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}})
DONE = b"data: [DONE]\n\n"
ANSWER = [choice("AB"), choice("C"), choice("D", "length"), USAGE, DONE]  # a frame may hold several tokens
ERROR = frame(
    {"error": {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}}
)


class Fake:
    """A server; `trouble` comes before its own answer, once for each entry."""

    def __init__(self, role: Role, name: str) -> None:
        self.role, self.name = role, name
        self.bodies: list[Json] = []
        self.trouble: list[Trouble] = []
        self.first_ms: float | None = 5.0
        self.url = ""

    @property
    def seen(self) -> Seen:
        return Seen(self.name, self.name, self.role, "k", self.url, True, engine="vllm")

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Fake]:
        app = web.Application()
        app.router.add_post("/v1/completions", self._handle)
        app.router.add_post("/v1/chat/completions", self._handle)
        async with listening(app) as self.url:
            yield self

    async def _handle(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.bodies.append(body)
        if self.trouble and (answer := await self.trouble.pop(0)(http, body)) is not None:
            return answer
        if self.role == "prefill":
            return web.json_response(
                {
                    "choices": [{"text": "never shown", "message": {"content": "never shown"}}],
                    "usage": {"prompt_tokens": len(body["prompt"] or "abc"), "completion_tokens": 1},
                    "kv_transfer_params": {
                        "opaque": [self.name, len(self.bodies)],
                        "do_remote_prefill": True,
                    },
                }
            )
        if body.get("stream"):
            return await streamed(http, *ANSWER)
        return web.json_response(
            {
                "choices": [{"index": 0, "text": "ABCD", "finish_reason": "length"}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 4},
                "metrics": {"time_to_first_token_ms": self.first_ms},
            }
        )


async def streamed(http: web.Request, *frames: bytes) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(http)
    for one in frames:
        await answer.write(one)
    await answer.write_eof()
    return answer


class Bench:
    def __init__(
        self, router: Router, url: str, client: aiohttp.ClientSession, fakes: dict[str, Fake]
    ) -> None:
        self.router, self.url, self.client, self.fakes = router, url, client, fakes

    async def ask(self, path: str = "/v1/completions", **body: Any) -> tuple[int, Any]:
        """Status and answer; of a stream its frames."""
        asked = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, **body}
        async with self.client.post(self.url + path, json=asked) as answer:
            data = await answer.read()
        if answer.status != 200 or not body.get("stream"):
            return answer.status, json.loads(data)
        return 200, [f[6:] for f in data.split(b"\n\n") if f]

    def text(self, frames: list[bytes]) -> str:
        found = [json.loads(f) for f in frames if f != b"[DONE]"]
        return "".join(c["text"] for f in found for c in f.get("choices", ()))


def run(test: Callable[[Bench], Coroutine[Any, Any, None]], *, prefills: int = 1, decodes: int = 1) -> None:
    """Every request ends, and nothing is held afterwards."""

    async def bounded() -> None:
        async with asyncio.timeout(3 * PATIENCE_S), contextlib.AsyncExitStack() as stack:
            made = [Fake("prefill", f"p{k}") for k in range(prefills)]
            made += [Fake("decode", f"d{k}") for k in range(decodes)]
            fakes = {f.name: await stack.enter_async_context(f.up()) for f in made}
            config = CONFIG.__class__(**{**CONFIG.__dict__, "port": _port()})
            router = await stack.enter_async_context(serving(config))
            router.update([f.seen for f in fakes.values()])
            client = await stack.enter_async_context(aiohttp.ClientSession())
            await test(Bench(router, f"http://127.0.0.1:{config.port}", client, fakes))
            router.fleet.check_integrity()

    asyncio.run(bounded())


def _port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def _draining(http: web.Request, body: Json) -> web.StreamResponse:
    return await streamed(http, USAGE, DONE) if body.get("stream") else web.json_response(ABORTED)


async def _failing(http: web.Request, body: Json) -> web.StreamResponse:
    if body.get("stream"):
        return await streamed(http, ERROR, DONE)
    error = {
        "error": {
            "message": "Internal server error",
            "type": "InternalServerError",
            "param": None,
            "code": 500,
        }
    }
    return web.json_response(error, status=500)


async def _cut(http: web.Request, body: Json) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    if body.get("stream"):
        await answer.prepare(http)
    assert http.transport is not None
    http.transport.abort()
    return answer


@pytest.mark.parametrize("stream", [False, True])
def test_both_get_the_same_prompt_and_decode_gets_what_prefill_said(stream: bool) -> None:
    async def test(bench: Bench) -> None:
        status, answer = await bench.ask(
            stream=stream,
            max_tokens=4,
            min_tokens=2,
            stop=["z"],
            kv_transfer_params={"do_remote_prefill": True, "remote_host": "elsewhere"},
        )
        assert status == 200
        [first], [second] = bench.fakes["p0"].bodies, bench.fakes["d0"].bodies
        assert first["prompt"] == second["prompt"] == [5, 6, 7]
        assert (first["max_tokens"], first["stream"], "min_tokens" in first) == (1, False, False)
        assert first["kv_transfer_params"] == {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        }
        assert second["kv_transfer_params"] == {"opaque": ["p0", 1], "do_remote_prefill": True}
        assert (second["max_tokens"], second["min_tokens"], second["stop"]) == (4, 2, ["z"])
        if stream:
            assert bench.text(answer) == "ABCD", "prefill's token is dropped"
            assert not any(b'"usage"' in f for f in answer), "only the router asked for it"
        else:
            assert answer["choices"][0]["text"] == "ABCD"
        assert bench.router.metrics.requests[names.OK, True] == 1
        assert sum(bench.router.metrics.output_tokens) == 4, "by usage: there were three frames"

    run(test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("trouble", [_draining, _failing, _cut], ids=["draining", "failing", "cut"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_what_fails_before_the_first_token_is_done_again(role: str, trouble: Trouble, stream: bool) -> None:
    """A server that drains says 200 and gives no token; a dead prefill is decode's error, in a stream after its 200."""

    async def test(bench: Bench) -> None:
        bench.fakes[role[0] + "0"].trouble = [trouble]
        status, answer = await bench.ask(stream=stream)
        assert status == 200, answer
        assert (bench.text(answer) if stream else answer["choices"][0]["text"]) == "ABCD"
        assert sum(len(f.bodies) for f in bench.fakes.values() if f.role == "prefill") == 2

    run(test)


def test_a_first_token_after_the_lease_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decode fetched may have been another's: prefill computes the prompt again."""
    monkeypatch.setattr(vllm, "LATE_S", 0.05)

    async def test(bench: Bench) -> None:
        never = asyncio.Event()

        async def stuck(http: web.Request, _: Json) -> None:
            await never.wait()

        bench.fakes["d0"].trouble = [stuck]
        status, answer = await bench.ask(stream=True)
        assert (status, bench.text(answer)) == (200, "ABCD")
        assert len(bench.fakes["p0"].bodies) == 2
        # An answer in one piece tells when its first token came; one that is as late as that is thrown away.
        bench.fakes["d0"].first_ms = 60.0
        status, answer = await bench.ask()
        assert (status, answer["error"]["code"]) == (502, "instance_failed")

    run(test)


@pytest.mark.parametrize("last", [ERROR, choice("", "abort"), b""], ids=["error", "abort", "nothing"])
def test_what_fails_in_mid_stream_is_said(last: bytes) -> None:
    async def test(bench: Bench) -> None:
        async def broken(http: web.Request, _: Json) -> web.StreamResponse:
            return await streamed(http, choice("AB"), *filter(None, [last]))

        bench.fakes["d0"].trouble = [broken]
        _, frames = await bench.ask(stream=True)
        *sent, error, done = frames
        assert (bench.text(sent), done) == ("AB", b"[DONE]")
        assert json.loads(error)["error"]["type"] == "server_error"
        assert bench.router.metrics.requests[names.FAILED, False] == 1

    run(test)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 0.5, "seed": 0}])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    "sent", [["A"], ["AB"], ["AB", "C"], ["A", "", "BC"], ["AB", "C", "D"]], ids=lambda sent: "+".join(sent)
)
def test_an_answer_that_can_be_given_again_goes_on(how: Json, chat: bool, sent: list[str]) -> None:
    """Wherever it broke off and however it was cut into frames: the client has it once, whole, with its end."""

    def said(text: str, finish: str | None = None) -> bytes:
        part = {"delta": {"content": text}} if chat else {"text": text}
        return frame({"choices": [{"index": 0, **part, "finish_reason": finish}]})

    async def test(bench: Bench) -> None:
        async def broken(http: web.Request, _: Json) -> web.StreamResponse:
            return await streamed(http, *map(said, sent))

        async def whole(http: web.Request, _: Json) -> web.StreamResponse:
            return await streamed(http, said("AB"), said("C"), said("D"), said("", "length"), USAGE, DONE)

        for decode in ("d0", "d1"):
            bench.fakes[decode].trouble = [broken if decode == "d0" else whole]
        asked = {"messages": [{"role": "user", "content": "a"}], "prompt": None} if chat else {}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        _, frames = await bench.ask(path, stream=True, **how, **asked)
        choices = [json.loads(f)["choices"][0] for f in frames[:-1]]
        assert "".join(c["delta"]["content"] if chat else c["text"] for c in choices) == "ABCD"
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"]
        assert frames[-1] == b"[DONE]"
        metrics = bench.router.metrics
        assert (metrics.requests[names.OK, True], metrics.continuations) == (1, 1)
        assert sum(metrics.output_tokens) == 4

    run(test, decodes=2)


@pytest.mark.parametrize("again", ["AX", "X"])
def test_an_answer_given_again_otherwise_is_an_honest_error(again: str) -> None:
    async def test(bench: Bench) -> None:
        async def broken(http: web.Request, _: Json) -> web.StreamResponse:
            return await streamed(http, choice("AB"))

        async def other(http: web.Request, _: Json) -> web.StreamResponse:
            return await streamed(http, choice(again), choice("CD", "length"), USAGE, DONE)

        bench.fakes["d0"].trouble, bench.fakes["d1"].trouble = [broken], [other]
        _, frames = await bench.ask(stream=True, temperature=0)
        *sent, error, _ = frames
        assert bench.text(sent) == "AB"
        assert "not as the client has it" in json.loads(error)["error"]["message"]
        assert bench.router.metrics.requests[names.FAILED, False] == 1

    run(test, decodes=2)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"echo": True, "logprobs": 1}, "echo"),
    ],
)
def test_what_two_servers_cannot_answer_together_is_refused_by_field(more: Json, field: str) -> None:
    async def test(bench: Bench) -> None:
        status, answer = await bench.ask(**more)
        assert (status, answer["error"]["param"]) == (400, field)
        assert not any(f.bodies for f in bench.fakes.values()), "nobody was asked"

    run(test)

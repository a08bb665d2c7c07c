"""The router before real workers: what a client gets is what the two steps by hand give, whatever happens to a worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from disaggworker.router.app import Router, serving
from disaggworker.router.config import Config
from disaggworker.router.fleet import Seen
from e2e import load
from e2e.nodes.tiny import make_tiny
from tests.integration.test_router import free_port, until
from tests.integration.worker_pair import DECODE, PORT, PREFILL, Pair, pair, url

pytest.importorskip("torch")

MODEL = "facebook/opt-13b"
CONFIG = Config("ns", "chat", MODEL, 2048, 60.0, 60.0, "127.0.0.1", linger_s=0.0)
PLAIN = {"model": MODEL, "prompt": "The keeper of the lighthouse", "temperature": 0}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
SEEN = [
    Seen("p", "p", "prefill", "key", url(PREFILL, ""), True),
    Seen("d", "d", "decode", "key", url(DECODE, ""), True),
]

Json = dict[str, Any]
Run = Callable[[Callable[[Pair], Coroutine[Any, Any, None]]], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a test beside one prefill and one decode worker, which all tests here share."""
    weights = tmp_path_factory.mktemp("tiny") / "weights"
    make_tiny(MODEL, weights)
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        workers = runner.run(
            stack.enter_async_context(pair(MODEL, weights, "--context-length", "2048", "--lease-s", "300"))
        )
        yield lambda test: runner.run(asyncio.wait_for(test(workers), 120))
        runner.run(stack.aclose())


@contextlib.asynccontextmanager
async def router(*seen: Seen) -> AsyncIterator[tuple[Router, str]]:
    config = replace(CONFIG, port=free_port())
    async with serving(config) as made:
        made.update(seen)
        yield made, f"http://127.0.0.1:{config.port}"


async def streamed(workers: Pair, base: str, path: str, body: Json) -> list[Json]:
    """The frames of a stream."""
    async with workers.session.post(base + path, json={**body, "stream": True}) as answer:
        assert answer.status == 200
        *frames, done, end = (await answer.read()).split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    return list(map(said, frames))


def said(frame: bytes) -> Json:
    """What a frame says, but for the second in which it was made and that its usage is yet to come."""
    out = json.loads(frame.removeprefix(b"data: "))
    return {k: v for k, v in out.items() if k != "created" and (k, v) != ("usage", None)}


def assert_same(one: Any, other: Any) -> None:
    """Equal; numbers nearly so: prefill and decode sum in another order."""
    if isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-4)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def joined(frames: list[Json]) -> tuple[str, list[int], Any, Any]:
    """Text, token ids, finish reason and usage."""
    text, tokens, finish, usage = "", [], None, None
    for frame in frames:
        usage = frame.get("usage") or usage
        for choice in frame["choices"]:
            text += choice["text"] if "text" in choice else choice["delta"]["content"]
            tokens += choice["token_ids"]
            finish = choice["finish_reason"]
    return text, tokens, finish, usage


async def free(workers: Pair, host: str) -> None:
    """Every block of the worker is back."""
    _, text = await workers.get(host, "/state")
    total = json.loads(text)["total_blocks"]
    nothing = {"running": 0, "waiting": 0, "leased_blocks": 0, "free_blocks": total}
    await workers.until(host, "/state", nothing)


def test_answers_are_the_workers_own(run: Run) -> None:
    async def test(workers: Pair) -> None:
        async with router(*SEEN) as (made, base):
            for path, asked in (
                ("/v1/completions", {**PLAIN, "max_tokens": 12, "ignore_eos": True}),
                ("/v1/completions", {**PLAIN, "max_tokens": 1}),
                ("/v1/completions", PLAIN),  # no limit of the client's is not the router's limit of one
                ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 9, "ignore_eos": True}),
            ):
                body = {**asked, "return_token_ids": True, "stream_options": {"include_usage": True}}
                text, tokens, finish, usage = joined(await streamed(workers, base, path, body))
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
            by_hand = await workers.complete({**PLAIN, "max_tokens": 12, "ignore_eos": True})
            body = {**PLAIN, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
            assert joined(await streamed(workers, base, "/v1/completions", body))[:3] == by_hand

            async with workers.session.post(
                base + "/v1/completions", json={**PLAIN, "prompt": [5] * 3000}
            ) as answer:
                assert answer.status == 400
                assert "2048" in json.loads(await answer.read())["error"]["message"]

            wanted_load = [(0.02 * k, 5 + 17 * k, 1 + k) for k in range(16)]
            results = await load.run_load(base, MODEL, wanted_load, vocab=256, seed=1)
            assert {(r.outcome, r.error) for r in results} == {("ok", "")}
            await until(lambda: not made.proxy.active, "no request in flight")
            made.fleet.check_integrity()
            for host in (PREFILL, DECODE):
                await free(workers, host)

    run(test)


# ------------------------------------------------------------------------------------------- workers that die


class Cutting:
    """A decode worker that dies: the way to the real one, which ends after so many frames of an answer.

    Or one that comes too late: what it is to pull (`late`) has been given up by then.
    """

    def __init__(self) -> None:
        self.after_frames = 10**6
        self.cuts = 0
        self.late = 0

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Seen]:
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            yield Seen("a", "a", "decode", "key", f"http://127.0.0.1:{port}", True)

    async def _carry(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        worker, to_worker = await asyncio.open_connection(DECODE, PORT)
        ways = [asyncio.create_task(self._asked(client, to_worker))]
        ways.append(asyncio.create_task(self._answered(worker, to_client)))
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for writer in (to_client, to_worker):
            writer.close()

    async def _asked(self, client: asyncio.StreamReader, to_worker: asyncio.StreamWriter) -> None:
        while data := await client.read(65536):
            head, _, body = data.partition(b"\r\n\r\n")
            if self.late and head.startswith(b"POST"):
                self.late -= 1
                params = json.loads(body)["kv_transfer_params"]
                async with (
                    aiohttp.ClientSession() as session,
                    session.post(url(PREFILL, "/release"), json=params) as answer,
                ):
                    assert answer.status == 200
            to_worker.write(data)

    async def _answered(self, worker: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        left = self.after_frames
        while data := await worker.read(65536):
            *whole, last = data.split(b"data: ")
            if len(whole) > left:
                to_client.write(b"data: ".join([*whole, last][: left + 1]))
                self.cuts += 1
                return
            left -= len(whole)
            to_client.write(data)


@pytest.mark.parametrize(
    ("chat", "asked"),
    [
        (False, {"temperature": 0}),
        (False, {"temperature": 1, "seed": 11, "logprobs": 2}),
        (True, {"temperature": 1, "seed": 12, "logprobs": True, "top_logprobs": 3}),
        (False, {"temperature": 1, "seed": 13, "stop": ...}),
    ],
)
def test_an_answer_goes_on_as_if_nothing_had_happened(run: Run, chat: bool, asked: Json) -> None:
    """Frame by frame: texts, log probabilities, offsets, stop strings, limit and usage."""

    async def test(workers: Pair) -> None:
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = {**(CHAT if chat else PLAIN), "max_tokens": 20, "ignore_eos": True, **asked}
        body |= {"return_token_ids": True, "stream_options": {"include_usage": True}}
        cutting = Cutting()
        async with cutting.up() as dying, router(*SEEN) as (made, base):
            if "stop" in asked:
                body["stop"] = None
                text = joined(await streamed(workers, base, path, body))[0]
                body["stop"] = text[9:12]  # over two tokens or more: these are of a byte each
            wanted = await streamed(workers, base, path, body)
            assert len(wanted) == 21 or "stop" in asked
            ends = (0, 1, 2, 7, len(wanted) - 3, len(wanted) - 2)
            for after in (n for n in ends if 0 <= n < len(wanted)):
                cutting.after_frames = after
                made.update([SEEN[0], dying])  # first of the two, and so the first choice
                made.update([*SEEN, dying])
                a, *_ = [i for i in made.fleet.instances() if i.seen.role == "decode"]
                await until(lambda a=a: a.others and not a.lost, "its load is known")
                cuts = cutting.cuts
                headers = {"X-Request-Id": wanted[0]["id"].split("-", 1)[1]}
                async with workers.session.post(
                    base + path, json={**body, "stream": True}, headers=headers
                ) as answer:
                    *frames, done, _ = (await answer.read()).split(b"\n\n")
                assert cutting.cuts == cuts + 1
                assert done == b"data: [DONE]"
                assert_same(list(map(said, frames)), wanted)
                await until(lambda: not made.proxy.active, "no request in flight")
                made.update(SEEN)  # the dead one leaves the view, and comes up anew
            made.fleet.check_integrity()
            assert made.metrics.continuations >= 3
            for host in (PREFILL, DECODE):
                await free(workers, host)

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_hand_off_that_has_expired_costs_the_client_nothing(run: Run, stream: bool) -> None:
    async def test(workers: Pair) -> None:
        late = Cutting()
        body = {**PLAIN, "temperature": 1, "seed": 5, "max_tokens": 12, "ignore_eos": True}
        body |= {"return_token_ids": True}

        async def tokens(base: str) -> list[int]:
            if stream:
                return joined(await streamed(workers, base, "/v1/completions", body))[1]
            async with workers.session.post(base + "/v1/completions", json=body) as answer:
                assert answer.status == 200
                return list(json.loads(await answer.read())["choices"][0]["token_ids"])

        async with late.up() as decode, router(SEEN[0], decode) as (made, base):
            wanted = await tokens(base)
            late.late = 2
            assert await tokens(base) == wanted
            assert not late.late
            assert made.metrics.retries["decode"] == 2
            await until(lambda: not made.proxy.active, "no request in flight")
            made.fleet.check_integrity()
        for host in (PREFILL, DECODE):
            await free(workers, host)

    run(test)


# ------------------------------------------------------------------------------------------- clients that go


@pytest.mark.parametrize("stage", ["prefill", "waiting for the pull", "decode"])
def test_a_client_that_goes_leaves_no_kv(run: Run, stage: str) -> None:
    async def test(workers: Pair) -> None:
        async with router(*SEEN) as (made, base):
            body = {**PLAIN, "prompt": [5] * 1900, "max_tokens": 100, "ignore_eos": True, "stream": True}

            async def ask() -> None:
                async with workers.session.post(base + "/v1/completions", json=body) as answer:
                    async for _ in answer.content.iter_any():
                        pass

            asked = [asyncio.create_task(ask()) for _ in range(12)]
            p, d = made.fleet.instances()
            assert (p.seen.name, d.seen.name) in (("p", "d"), ("d", "p"))
            p, d = (p, d) if p.seen.name == "p" else (d, p)
            held = {
                "prefill": lambda: p.in_flight > 3,
                "waiting for the pull": lambda: p.leased > 0,
                "decode": lambda: d.in_flight > 0 and not p.leased,
            }[stage]
            await until(held, stage)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            await until(lambda: not made.proxy.active, "no request in flight")
            made.fleet.check_integrity()
            for host in (PREFILL, DECODE):
                await free(workers, host)  # long before any lease ends

    run(test)


@pytest.mark.parametrize("broken", [False, True])
def test_an_answer_that_is_never_read_leaves_no_kv(run: Run, broken: bool) -> None:
    """Prefill has answered, and holds KV whose name is still on its way when the client, or the connection, goes."""

    async def test(workers: Pair) -> None:
        answered = asyncio.Event()

        async def carry(router: asyncio.StreamReader, to_router: asyncio.StreamWriter) -> None:
            worker, to_worker = await asyncio.open_connection(PREFILL, PORT)
            while data := await router.read(65536):
                to_worker.write(data)
                if data.startswith(b"POST /v1") and not answered.is_set():
                    await worker.readuntil(b"\r\n\r\n")
                    answered.set()
                    if broken:
                        break
                    await router.read()  # until the router goes
                elif data.startswith(b"POST"):
                    head = await worker.readuntil(b"\r\n\r\n")
                    [length] = re.findall(rb"Content-Length: (\d+)", head)
                    to_router.write(head + await worker.readexactly(int(length)))
            for writer in (to_router, to_worker):
                writer.close()

        async with await asyncio.start_server(carry, "127.0.0.1", 0) as server:
            between = replace(SEEN[0], url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            async with router(between, SEEN[1]) as (made, base):

                async def ask() -> int:
                    async with workers.session.post(base + "/v1/completions", json=PLAIN) as answer:
                        return answer.status

                asked = asyncio.create_task(ask())
                await answered.wait()
                if broken:
                    assert await asked == 200
                else:
                    asked.cancel()
                    await asyncio.wait([asked])
                await until(lambda: not made.proxy.active, "no request in flight")
                for host in (PREFILL, DECODE):
                    await free(workers, host)

    run(test)


# ------------------------------------------------------------------------------------------- several routers


def test_routers_hear_of_each_others_requests(run: Run) -> None:
    async def test(workers: Pair) -> None:
        async with router(*SEEN) as (one, base), router(*SEEN) as (two, _), router(*SEEN) as (three, _):
            routers = one, two, three

            def loads(name: str) -> list[Any]:
                return [next(i for i in r.fleet.instances() if i.seen.name == name) for r in routers]

            await until(lambda: all(i.others and not i.lost for n in "pd" for i in loads(n)), "all hear")
            body = {**PLAIN, "prompt": [5] * 300, "max_tokens": 1500, "ignore_eos": True, "stream": True}
            async with workers.session.post(base + "/v1/completions", json=body) as answer:
                await answer.content.readuntil(b"\n\n")
                mine, *others = loads("d")
                await until(lambda: all(i.all_kv_tokens > 301 for i in others), "the others hear of it")
                assert not any(i.kv_tokens for i in others)
                assert mine.others.kv_tokens == 0  # its own it counts itself
                answer.close()
            await until(lambda: not any(i.all_kv_tokens for i in loads("d")), "and that it ended")

    run(test)


def test_a_worker_tells_its_load_often_and_when_nothing_changes(run: Run) -> None:
    async def test(workers: Pair) -> None:
        clock = asyncio.get_running_loop().time
        async with workers.session.get(url(DECODE, "/load"), timeout=aiohttp.ClientTimeout(10)) as answer:
            lines = []
            for _ in range(2):
                lines.append((clock(), json.loads(await answer.content.readline())))
        (first_s, first), (next_s, second) = lines
        assert first == second
        assert next_s - first_s < 2
        assert set(first) >= {"queued_tokens", "kv_tokens", "free_blocks", "leased_blocks", "version"}

    run(test)

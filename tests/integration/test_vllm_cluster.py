"""Two prefill and two decode instances of a real vLLM under our operator and router, on a CPU: `make e2e-vllm`.

The cases build on each other in order; each ends with all four servers alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import aiohttp
import pytest

from disaggserve import metric_names as names
from disaggserve.wire import VLLM_LEASE_S
from e2e.controlplane.polling import wait_until
from e2e.nodes.tiny import make_tiny
from e2e.stack import Stack, condition, ready
from e2e.vllm import environment

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(1500)]

MODEL, NAME, CONTEXT = "test/llama-tiny", "tiny", 512
PULLED = f"{names.VLLM_PROMPT_TOKENS_BY_SOURCE}{{{names.PULLED}}}"
START_S = 600.0  # four servers on two cores, whatever else runs there
Json = dict[str, Any]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if not environment.made():
        pytest.skip("there is no vLLM here: make e2e-vllm installs it")
    folder = tmp_path_factory.mktemp("vllm")
    weights = make_tiny(MODEL, folder / "model", hidden=128, layers=2, heads=4)
    config = json.loads((weights / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    vllm = environment.launcher(folder / "bin")
    role = {"tp": 1, "pp": 1, "count": 2}
    spec = {
        "model": {
            "id": MODEL,
            "servedName": NAME,
            "config": json.dumps(config),
            "contextLength": CONTEXT,
            "weights": {"hostPath": {"path": "/weights/tiny"}},
        },
        "slo": {"ttft": "10s", "tpot": "1s", "attainment": 0.9},
        "workload": {"rate": 1, "lengths": {"preset": "humaneval"}},
        "hardware": {"maxGPUs": 8},
        "engine": {"type": "vllm"},
        "replan": {"mode": "Off"},
        "rollout": {"drainTimeout": "2m"},
        "plan": {"roles": [{"role": r, **role} for r in ("prefill", "decode")]},
    }
    document = {
        "apiVersion": "disaggserve.dev/v1alpha1",
        "kind": "DisaggServe",
        "metadata": {"name": NAME},
        "spec": spec,
    }
    paths = {"/weights/tiny": weights}
    with Stack(folder / "stack", images={"vllm-openai": [str(vllm)]}, host_paths=paths) as made:
        made.apply(document)
        made.wait(NAME, "vLLM to serve", ready, timeout_s=START_S)
        yield made


@pytest.fixture(autouse=True)
def well(stack: Stack) -> None:
    """Each case begins with all four, whatever became of the one before."""
    until(lambda: all_ready(stack), "all four to be well")


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(600):
            await test

    asyncio.run(bounded())


def prompts(count: int, seed: int) -> list[list[int]]:
    """No two begin alike: nothing of one is in a cache because of another."""
    draw = random.Random(seed)
    return [[draw.randrange(20, 700) for _ in range(draw.randrange(80, 200))] for _ in range(count)]


def body(prompt: Sequence[int], **more: Any) -> Json:
    asked = {"model": NAME, "prompt": list(prompt), "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    return asked | {"return_token_ids": True} | more


class Client:
    def __init__(self, session: aiohttp.ClientSession, stack: Stack) -> None:
        self.session, self.stack = session, stack
        self.url = stack.url(NAME)

    async def post(self, asked: Json | bytes, url: str = "") -> tuple[int, Json]:
        data = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
        headers = {"Content-Type": "application/json"}
        async with self.session.post(
            f"{url or self.url}/v1/completions", data=data, headers=headers
        ) as answer:
            return answer.status, json.loads(await answer.read())

    async def frames(self, asked: Json) -> list[Any]:
        """All frames of a stream, read to its end."""
        return [frame async for frame in self.stream(asked)]

    async def stream(self, asked: Json) -> Any:
        async with self.session.post(f"{self.url}/v1/completions", json=asked | {"stream": True}) as answer:
            assert answer.status == 200, await answer.read()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    async def tokens(self, asked: Json, *, streamed: bool = False) -> list[int]:
        if streamed:
            frames = await self.frames(asked)
            assert not any("error" in f for f in frames), frames[-1]
            return [t for f in frames for c in f["choices"] for t in c["token_ids"]]
        status, answer = await self.post(asked)
        assert status == 200, answer
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    async def plain(self, prompt: Sequence[int], **more: Any) -> list[int]:
        """What a server gives that is asked for the whole answer, without a word of hand-offs."""
        status, answer = await self.post(body(prompt, **more), url=address(self.stack, "prefill")[0])
        assert status == 200, answer
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    async def figure(self, role: str, name: str) -> float:
        """Over all instances of a role."""
        total = 0.0
        for url in address(self.stack, role):
            async with self.session.get(f"{url}/metrics") as answer:
                text = await answer.text()
            for labels, value in re.findall(
                rf"^{re.escape(name.partition('{')[0])}\{{(.*)\}} (\S+)$", text, re.M
            ):
                if "{" not in name or f'source="{names.PULLED}"' in labels:
                    total += float(value)
        return total


@contextlib.asynccontextmanager
async def client(stack: Stack) -> Any:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(session, stack)


def address(stack: Stack, role: str) -> list[str]:
    return [f"http://{p['status']['podIP']}:8000" for p in stack.pods(NAME, role)]


def restarts(stack: Stack) -> dict[str, int]:
    pods = stack.pods(NAME, "prefill") + stack.pods(NAME, "decode")
    return {p["metadata"]["name"]: p["status"]["containerStatuses"][0]["restartCount"] for p in pods}


def all_ready(stack: Stack) -> bool:
    pods = [p for role in ("prefill", "decode", "router") for p in stack.pods(NAME, role)]
    return len(pods) == 5 and all(condition(p, "Ready") == "True" for p in pods)


def until(holds: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    wait_until(holds, what, timeout_s=timeout_s, interval_s=0.5)


def signalled(stack: Stack, role: str, number: int) -> None:
    """To every process of every instance of a role."""
    wanted = {p["metadata"]["name"] for p in stack.pods(NAME, role)}
    for pod in stack.nodes.pods():
        if pod["name"] in wanted:
            for pid in pod["processes"].values():
                os.killpg(pid, number)


def test_200_requests_are_really_handed_over_and_have_a_plain_servers_tokens(stack: Stack) -> None:
    async def test() -> None:
        asked = prompts(200, seed=1)
        async with client(stack) as ask:
            before = await ask.figure("decode", PULLED)
            gate = asyncio.Semaphore(8)

            async def one(k: int) -> list[int]:
                async with gate:
                    found: list[int] = await ask.tokens(body(asked[k]), streamed=k % 2 == 0)
                    return found

            served = await asyncio.gather(*(one(k) for k in range(len(asked))))
            pulled = await ask.figure("decode", PULLED) - before
            # All of every prompt; vLLM computes the last token of a pulled prompt anew, and counts it there.
            whole = sum(map(len, asked))
            assert whole - len(asked) <= pulled <= whole
            assert [await ask.plain(p) for p in asked] == served
            assert await ask.figure("prefill", names.VLLM_KV_LATE) == 0
            assert await ask.figure("decode", names.VLLM_KV_FAILED) == 0
        assert set(restarts(stack).values()) == {0}

    run(test())


def test_what_is_over_long_or_hostile_is_refused_and_kills_nobody(stack: Stack) -> None:
    async def test() -> None:
        [prompt, other] = prompts(2, seed=2)
        async with client(stack) as ask:
            status, answer = await ask.post(body([30] * (CONTEXT + 1)))
            assert (status, answer["error"]["type"]) == (400, "BadRequestError")
            # With another's params the decode's server would die: they go nowhere.
            url = address(stack, "prefill")[0]
            _, stolen = await ask.post(
                body(other[:40], max_tokens=1, kv_transfer_params={"do_remote_decode": True}), url
            )
            assert stolen["kv_transfer_params"]["remote_block_ids"]
            found = await ask.tokens(body(prompt, kv_transfer_params=stolen["kv_transfer_params"]))
            assert found == await ask.plain(prompt)
            for more, field in (
                ({"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
                ({"use_beam_search": True}, "use_beam_search"),
                ({"prompt_logprobs": 1}, "prompt_logprobs"),
                ({"echo": True, "logprobs": 1}, "echo"),
                ({"n": 2}, "n"),
                ({"max_tokens": -1}, "max_tokens"),
            ):
                status, answer = await ask.post(body(prompt, **more))
                assert (status, answer["error"]["param"]) == (400, field), answer
            # Strange, and served: the same prompt on both sides all the same.
            for more in (
                {"truncate_prompt_tokens": 33},
                {"echo": True},
                {"add_special_tokens": False},
                {"min_tokens": 8},
                {"stream_interval": 5},
                {"request_id": "abc"},
                {"max_tokens": 1},
            ):
                both = [await ask.tokens(body(prompt, **more), streamed=s) for s in (False, True)]
                plain = await ask.plain(prompt, **more)
                assert both == [plain, plain], more
            # A plain server's engine would end at this.
            smuggled = {"vllm_xargs": {"kv_transfer_params": "x"}}
            assert await ask.tokens(body(prompt, **smuggled)) == await ask.plain(prompt)
            assert (await ask.post(b"{"))[0] == 400
            assert (await ask.post(b'{"prompt":' + b"[" * 5000))[0] == 400
        assert set(restarts(stack).values()) == {0}

    run(test())


def test_a_prefill_that_dies_before_the_pull_costs_time_only(stack: Stack) -> None:
    """Decode stands still while it has the request, prefill is killed, decode wakes up to a pull from nobody."""

    async def test() -> None:
        asked = prompts(4, seed=3)
        async with client(stack) as ask:
            want = [await ask.plain(p) for p in asked]
            served_before = await ask.figure("prefill", f"{names.VLLM_PROMPT_TOKENS}_count")
            signalled(stack, "decode", signal.SIGSTOP)
            try:
                tasks = [
                    asyncio.create_task(ask.tokens(body(p), streamed=k % 2 == 0)) for k, p in enumerate(asked)
                ]
                while await ask.figure("prefill", f"{names.VLLM_PROMPT_TOKENS}_count") < served_before + 4:
                    await asyncio.sleep(0.1)
                stack.nodes.crash(stack.pods(NAME, "prefill")[0]["metadata"]["name"])
            finally:
                signalled(stack, "decode", signal.SIGCONT)
            assert await asyncio.gather(*tasks) == want
            assert await ask.figure("decode", names.VLLM_KV_FAILED) > 0, "somebody's pull found nobody"
        until(lambda: all_ready(stack), "the prefill instance to be back")
        assert sorted(restarts(stack).values()) == [0, 0, 0, 1]

    run(test())


def test_a_decode_that_dies_in_mid_stream_is_an_error_that_says_so(stack: Stack) -> None:
    async def test() -> None:
        [prompt] = prompts(1, seed=4)
        async with client(stack) as ask:
            want = await ask.plain(prompt, max_tokens=CONTEXT)
            got: list[int] = []
            error: Json | None = None
            killed = False
            async for frame in ask.stream(body(prompt, max_tokens=CONTEXT)):
                if "error" in frame:
                    error = frame["error"]
                    break
                got += [t for c in frame["choices"] for t in c["token_ids"]]
                if not killed:
                    killed = True
                    for pod in stack.pods(NAME, "decode"):
                        stack.nodes.crash(pod["metadata"]["name"])
            assert got == want[: len(got)], "what was sent is right"
            assert error is not None or got == want
            if error is not None:
                assert error["type"] == "server_error"

    run(test())


def test_kv_whose_lease_ran_out_is_computed_again_and_never_served(stack: Stack) -> None:
    """Decode stands still for longer than prefill keeps the KV; then its late pull would be answered from other blocks."""

    async def test() -> None:
        asked = prompts(6, seed=5)
        async with client(stack) as ask:
            want = [await ask.plain(p) for p in asked]
            expired_before = await ask.figure("prefill", names.VLLM_KV_EXPIRED)
            signalled(stack, "decode", signal.SIGSTOP)
            try:
                tasks = [
                    asyncio.create_task(ask.tokens(body(p), streamed=k % 2 == 0))
                    for k, p in enumerate(asked[:2])
                ]
                deadline_s = asyncio.get_running_loop().time() + VLLM_LEASE_S + 30
                while await ask.figure("prefill", names.VLLM_KV_EXPIRED) < expired_before + 2:
                    assert asyncio.get_running_loop().time() < deadline_s
                    await asyncio.sleep(0.5)
                # Their blocks get other prompts' KV.
                for p in prompts(12, seed=6):
                    await ask.plain(p)
            finally:
                signalled(stack, "decode", signal.SIGCONT)
            assert await asyncio.gather(*tasks) == want[:2]

    run(test())


def test_the_pods_end_when_they_have_nothing_to_do(stack: Stack) -> None:
    """Deleting the resource drains them: by their counters, long before the drain timeout of two minutes."""
    stack.plane.kubectl("delete", "dsv", NAME, "--wait=false")
    until(lambda: not (stack.pods(NAME, "prefill") or stack.pods(NAME, "decode")), "no pod to be left", 60)

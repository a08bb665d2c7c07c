"""A prefill and a decode worker as real processes on two loopback addresses, and how a router would talk to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).parents[2]
# Of this process alone: two checkouts may be tested on one machine at a time, and must not talk to each other's workers.
_NET = f"127.0.{21 + os.getpid() % 200}"
PREFILL, DECODE = f"{_NET}.1", f"{_NET}.2"
PORT, KV_PORT = 8431, 5631
DEADLINE_S = 150.0  # a worker imports torch: seconds, or a minute on a machine that is busy

Body = dict[str, Any]


def url(host: str, path: str) -> str:
    """A worker's address."""
    return f"http://{host}:{PORT}{path}"


def start(
    role: str, host: str, model: str, weights: Path, *flags: str, log: int | None = None
) -> subprocess.Popen[bytes]:
    """One worker, as its pod would start it."""
    argv = [sys.executable, "-m", "disaggworker", role, "--model", model, "--weights", str(weights)]
    argv += ["--pairing-key", "key", "--port", str(PORT), "--kv-port", str(KV_PORT), *flags]
    path = os.pathsep.join(str(ROOT / part) for part in ("operator", "worker_image"))
    return subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": path, "POD_IP": host}, stderr=log)


class Pair:
    """The two workers, and a client of both."""

    def __init__(self, session: aiohttp.ClientSession, processes: dict[str, subprocess.Popen[bytes]]) -> None:
        self.session, self.processes = session, processes

    async def post(
        self, host: str, body: Body, path: str = "/v1/completions", **more: Any
    ) -> tuple[int, bytes]:
        """Status and body of a request."""
        async with self.session.post(url(host, path), json=body, **more) as response:
            return response.status, await response.read()

    async def get(self, host: str, path: str) -> tuple[int, str]:
        """Status and body of a GET."""
        async with self.session.get(url(host, path)) as response:
            return response.status, await response.text()

    async def prefill(self, body: Body, path: str = "/v1/completions") -> Body:
        """The first of the two steps."""
        beside = {k: body[k] for k in ("max_tokens",) if k in body}
        first = {
            **body,
            "stream": False,
            "max_tokens": 1,
            "kv_transfer_params": {"do_remote_decode": True, **beside},
        }
        status, data = await self.post(PREFILL, first, path)
        assert status == 200, data
        answer: Body = json.loads(data)
        return answer

    async def complete(self, body: Body, path: str = "/v1/completions") -> tuple[str, list[int], str | None]:
        """Both steps, streamed: text, token ids and finish reason."""
        body = {**body, "return_token_ids": True, "stream": True}
        answer = await self.prefill(body, path)
        [choice] = answer["choices"]
        text, tokens = answer["kv_transfer_params"]["text"], list(choice["token_ids"])
        finish: str | None = choice["finish_reason"]
        if answer["kv_transfer_params"]["done"]:
            return text, tokens, finish
        status, data = await self.post(
            DECODE, {**body, "kv_transfer_params": answer["kv_transfer_params"]}, path
        )
        assert status == 200, data
        *frames, done, empty = data.decode().split("\n\n")
        assert (done, empty) == ("data: [DONE]", "")
        for frame in frames:
            for choice in json.loads(frame.removeprefix("data: "))["choices"]:
                text += choice["text"] if "text" in choice else choice["delta"]["content"]
                tokens += choice["token_ids"]
                finish = choice["finish_reason"]
        return text, tokens, finish

    async def until(self, host: str, path: str, wanted: dict[str, Any]) -> None:
        """Wait until a worker's JSON says this."""
        end = time.monotonic() + DEADLINE_S
        while True:
            _, text = await self.get(host, path)
            facts = json.loads(text)
            if all(facts.get(k) == v for k, v in wanted.items()):
                return
            assert time.monotonic() < end, f"{host}{path} says {facts}, not {wanted}"
            await asyncio.sleep(0.01)

    async def metric(self, host: str, name: str) -> float:
        """The value of a series without a histogram."""
        _, text = await self.get(host, "/metrics")
        [line] = [line for line in text.splitlines() if line.startswith(name + "{")]
        return float(line.rsplit(" ", 1)[1])


@contextlib.asynccontextmanager
async def pair(
    model: str, weights: Path, *flags: str, prefill: Sequence[str] = (), decode: Sequence[str] = ()
) -> AsyncIterator[Pair]:
    """Two ready workers; both must end with exit code 0."""
    processes = {
        PREFILL: start("prefill", PREFILL, model, weights, *flags, *prefill),
        DECODE: start("decode", DECODE, model, weights, *flags, *decode),
    }
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            for host, process in processes.items():
                await _ready(session, host, process)
            yield Pair(session, processes)
            for process in processes.values():
                process.terminate()
            codes = [await asyncio.to_thread(process.wait, DEADLINE_S) for process in processes.values()]
            assert all(code in (0, -9) for code in codes), codes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


async def _ready(session: aiohttp.ClientSession, host: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + DEADLINE_S
    while True:
        assert process.poll() is None, f"the worker on {host} ended with {process.returncode}"
        assert time.monotonic() < end, f"the worker on {host} is not ready"
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(url(host, "/ready")) as response:
                if response.status == 200:
                    return
        await asyncio.sleep(0.05)


def stderr_of(role: str, model: str, weights: Path, *flags: str) -> tuple[int, str]:
    """Exit code and stderr of a worker that is meant to refuse."""
    with tempfile.TemporaryFile() as log:
        process = start(role, PREFILL, model, weights, *flags, log=log.fileno())
        code = process.wait(DEADLINE_S)
        log.seek(0)
        return code, log.read().decode()

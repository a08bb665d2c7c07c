"""Two servers that speak vLLM, prefill and decode, on two loopback addresses: our stand-in, or real ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from e2e.nodes.tiny import make_tiny
from e2e.vllm import environment

ROOT = Path(__file__).parents[2]
# Of this process alone: two checkouts may be tested on one machine at a time.
_NET = f"127.0.{21 + os.getpid() % 200}"
PREFILL, DECODE = f"{_NET}.11", f"{_NET}.12"
PORT = 8000
MODEL = "tiny"
CONTEXT = 512
LEASE_S = 3
BLOCK = {"stand-in": 16, "vllm": 32}  # tokens; a CPU has no other
START_WITHIN_S = {"stand-in": 120.0, "vllm": 400.0}
PATIENCE_S = 30.0

Body = dict[str, Any]


class Server:
    """One of the two."""

    def __init__(self, kind: str, host: str, weights: Path, log: Path) -> None:
        self.kind, self.host, self.log = kind, host, log
        self.url = f"http://{host}:{PORT}"
        transfer = {
            "kv_connector": "NixlConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"kv_lease_duration": LEASE_S},
        }
        argv = ["serve", str(weights), "--served-model-name", MODEL, "--max-model-len", str(CONTEXT)]
        argv += ["--dtype", "float32", "--block-size", "16", "--host", host, "--port", str(PORT)]
        argv += ["--kv-transfer-config", json.dumps(transfer), "--shutdown-timeout", "20"]
        argv += ["--enable-per-request-metrics", "--enable-prompt-tokens-details"]
        env = dict(os.environ) | {"VLLM_NIXL_SIDE_CHANNEL_HOST": host, "VLLM_NIXL_SIDE_CHANNEL_PORT": "5600"}
        if kind == "vllm":
            argv = [*environment.command(), *argv, *environment.CPU_FLAGS]
            env |= environment.variables(log.parent / host)
        else:
            argv = [sys.executable, "-m", "disaggworker", "--speak", "vllm", *argv, "--kv-blocks", "256"]
            env["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("operator", "worker_image"))
        with log.open("ab") as out:
            self.process = subprocess.Popen(argv, env=env, stdout=out, stderr=out, start_new_session=True)

    def kill(self) -> None:
        """With all its processes: a real one's engine is another."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def alive(self) -> bool:
        return self.process.poll() is None


class Pair:
    """The two servers and what is asked of them."""

    def __init__(self, kind: str, weights: Path, folder: Path) -> None:
        self.kind = kind
        self.prefill, self.decode = (
            Server(kind, host, weights, folder / f"{kind}-{host}.log") for host in (PREFILL, DECODE)
        )

    def wait(self) -> None:
        """Until both serve."""
        deadline_s = time.monotonic() + START_WITHIN_S[self.kind]
        for server in (self.prefill, self.decode):
            while not _serves(server.url):
                tail = server.log.read_text(errors="replace")[-3000:]
                assert server.alive(), f"{server.host} has ended:\n{tail}"
                assert time.monotonic() < deadline_s, f"{server.host} does not serve:\n{tail}"
                time.sleep(0.1)


def _serves(url: str) -> bool:
    async def ask() -> bool:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as answer:
            return answer.status == 200

    try:
        return asyncio.run(ask())
    except (aiohttp.ClientError, OSError):
        return False


@contextlib.contextmanager
def pair(kind: str, folder: Path) -> Iterator[Pair]:
    """Both, ready; ended with the block."""
    weights = make_tiny("llama-tiny", folder / "model", hidden=128, layers=2, heads=4)
    made = Pair(kind, weights, folder)
    try:
        made.wait()
        yield made
    finally:
        for server in (made.prefill, made.decode):
            server.kill()


class Client:
    """Requests to either server."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def post(
        self, server: Server, body: Body, *, path: str = "completions", id: str = ""
    ) -> tuple[int, Body]:
        """Status and answer."""
        headers = {"X-Request-Id": id} if id else {}
        url = f"{server.url}/v1/{path}"
        async with self.session.post(url, json=body, headers=headers) as answer:
            return answer.status, json.loads(await answer.read())

    async def prefilled(self, server: Server, body: Body, *, path: str = "completions") -> Body:
        """The first of the two steps: prefill's whole answer."""
        limit = "max_completion_tokens" if path.startswith("chat") else "max_tokens"
        params = {"do_remote_decode": True, "do_remote_prefill": False} | dict.fromkeys(
            ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
        )
        first = {**body, "stream": False, limit: 1, "kv_transfer_params": params}
        first.pop("stream_options", None)
        status, answer = await self.post(server, first, path=path)
        assert status == 200, answer
        return answer

    async def frames(self, server: Server, body: Body) -> AsyncIterator[Any]:
        """The JSON of each frame of a stream; "[DONE]" as it is."""
        async with self.session.post(f"{server.url}/v1/completions", json={**body, "stream": True}) as answer:
            assert answer.status == 200, await answer.read()
            async for line in answer.content:
                if line.startswith(b"data: "):
                    said = line[6:].strip()
                    yield "[DONE]" if said == b"[DONE]" else json.loads(said)

    async def figures(self, server: Server) -> Mapping[str, float]:
        """Metrics by name, all label sets of a name together; those with a source by `name{source}`."""
        async with self.session.get(f"{server.url}/metrics") as answer:
            text = await answer.text()
        found: dict[str, float] = {}
        for name, labels, value in re.findall(r"^(\S+?)(?:\{(.*)\})? (\S+)$", text, re.M):
            source = re.search(r'source="(\w+)"', labels)
            key = f"{name}{{{source[1]}}}" if source else name
            found[key] = found.get(key, 0.0) + float(value)
        return found

    async def until(self, server: Server, holds: Callable[[Mapping[str, float]], bool], what: str) -> None:
        """Wait for the metrics to say so."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not holds(found := await self.figures(server)):
            assert time.monotonic() < deadline_s, f"never came true: {what}; {dict(found)}"
            await asyncio.sleep(0.05)

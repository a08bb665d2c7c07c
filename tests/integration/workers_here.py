"""Workers in this process, each on a loopback address of its own: torch is imported once, and no process starts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from disaggworker import config
from disaggworker.worker.main import Worker

PORT, KV_PORT = 8433, 5633
_NET = f"127.1.{os.getpid() % 250}"

Body = dict[str, Any]


class Here:
    """One worker and a client of it."""

    def __init__(self, host: str, worker: Worker, session: aiohttp.ClientSession) -> None:
        self.host, self.worker, self._session = host, worker, session

    async def post(self, body: Body, path: str = "/v1/completions") -> tuple[int, Any]:
        """Status and JSON of an answer."""
        async with self._session.post(f"http://{self.host}:{PORT}{path}", json=body) as answer:
            return answer.status, json.loads(await answer.read())

    async def frames(self, body: Body) -> list[Any]:
        """What a stream says, frame by frame; it must end with [DONE]."""
        url = f"http://{self.host}:{PORT}/v1/completions"
        async with self._session.post(url, json={**body, "stream": True}) as answer:
            assert answer.status == 200
            *frames, done, end = (await answer.read()).split(b"\n\n")
        assert (done, end) == (b"data: [DONE]", b"")
        return [json.loads(frame.removeprefix(b"data: ")) for frame in frames]

    async def get(self, path: str = "/state") -> Any:
        async with self._session.get(f"http://{self.host}:{PORT}{path}") as answer:
            return json.loads(await answer.read()) if path == "/state" else await answer.text()

    async def figure(self, name: str) -> float:
        """A series without labels but the model's."""
        (line,) = [line for line in (await self.get("/metrics")).splitlines() if line.startswith(name + "{")]
        return float(line.rsplit(" ", 1)[1])

    async def tokens(self, prompt: list[int], count: int, **more: Any) -> list[int]:
        """Of a plain request."""
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, **more}
        status, said = await self.post({**body, "return_token_ids": True})
        assert status == 200, said
        found: list[int] = said["choices"][0]["token_ids"]
        return found

    async def settled(self) -> Any:
        """The state once nothing is held, which must be intact and all free."""
        while True:
            state = await self.get()
            if not (state["running"] or state["waiting"] or state["leased_blocks"]):
                assert state["intact"] is True
                if state["free_blocks"] == state["total_blocks"]:
                    return state
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def workers(weights: Path, *argvs: list[str]) -> AsyncIterator[list[Here]]:
    """Ready workers, one for each list of arguments (the role first); ended with the block, each with code 0."""
    found: list[Here] = []
    tasks = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=200)) as session:
        for number, (role, *flags) in enumerate(argvs, 1):
            host = f"{_NET}.{number}"
            argv = [role, "--model", "tiny", "--weights", str(weights), "--pairing-key", "key"]
            argv += ["--port", str(PORT), "--kv-port", str(KV_PORT), "--dtype", "float32", *flags]
            worker = Worker(config.read(argv, {"POD_IP": host}))
            found.append(Here(host, worker, session))
            tasks.append(asyncio.ensure_future(worker.main()))
        try:
            for here, task in zip(found, tasks, strict=True):
                while "ready" not in await _ready(session, here.host):
                    assert not task.done(), task.result()
                    await asyncio.sleep(0.02)
            yield found
        finally:
            for here in found:
                here.worker.stop()
            assert await asyncio.gather(*tasks) == [0] * len(tasks)


async def _ready(session: aiohttp.ClientSession, host: str) -> str:
    with contextlib.suppress(aiohttp.ClientError):
        async with session.get(f"http://{host}:{PORT}/ready") as answer:
            return await answer.text()
    return ""

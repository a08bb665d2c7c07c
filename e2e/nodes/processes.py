"""The agent's side of a fork server: start a process, signal its group, wait for its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e.nodes.errors import AgentError, Refused
from e2e.nodes.forkserver import MARK

CHECKOUT = Path(__file__).resolve().parents[2]

WORKER_MODULES = ("torch", "aiohttp", "uvloop", "zmq", "msgspec", "safetensors", "tokenizers", "disaggworker")
"""Imported once, in the workers' fork server."""

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Process:
    """One process of a container, leader of its own session and process group."""

    def __init__(self, server: ForkServerClient, identity: str) -> None:
        self._server = server
        self._identity = identity
        self.pid = 0
        self._started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def running(self) -> bool:
        return not self._exit.done()

    async def wait(self) -> int:
        """The exit code; 128 + the signal's number when a signal ended it."""
        return await asyncio.shield(self._exit)

    def signal(self, number: signal.Signals) -> None:
        """To the whole process group; nothing once the process has ended."""
        if self.running:
            self._server.send({"do": "signal", "id": self._identity, "signal": int(number)})


class ForkServerClient:
    """A running fork server. `start` it, `spawn` processes, `close` ends them all."""

    def __init__(self, popen: subprocess.Popen[bytes], writer: asyncio.StreamWriter, log: Path) -> None:
        self._popen = popen
        self._writer = writer
        self._log = log
        self._ids = itertools.count()
        self._listener: asyncio.Task[None] | None = None
        self._processes: dict[str, Process] = {}
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the server has ended by itself, which the agent does not survive."""

    @classmethod
    async def start(cls, log: Path, modules: Sequence[str] = ()) -> ForkServerClient:
        """Start the server; returns at once, while it is still importing `modules`."""
        ours, theirs = socket.socketpair()
        path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("ab") as output, theirs:
            popen = subprocess.Popen(
                [sys.executable, "-m", "e2e.nodes.forkserver", str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # The folder is there for those who look for what is left of a run.
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path, "DISAGGSERVE_NODES": str(log.parent)},
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        client = cls(popen, writer, log)
        client._listener = asyncio.create_task(client._listen(reader))
        return client

    async def ready(self) -> None:
        """When everything is imported. Raises AgentError if it did not come to that."""
        await asyncio.shield(self._ready)

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        nice: int = 0,
        call: str | None = None,
    ) -> Process:
        """Start `argv` with exactly `env`. With `call` (`module:function`) that is called, and nothing exec'd."""
        await self.ready()
        identity = f"{os.getpid()}-{self._popen.pid}-{next(self._ids)}"
        process = self._processes[identity] = Process(self, identity)
        self.send(
            {
                "do": "start",
                "id": identity,
                "argv": list(argv),
                "env": {**env, MARK: identity},
                "cwd": str(cwd),
                "log": str(log),
                "nice": nice,
                "call": call,
            }
        )
        try:
            process.pid = await asyncio.shield(process._started)
        except asyncio.CancelledError:
            process.signal(signal.SIGKILL)
            raise
        return process

    def send(self, message: dict[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def close(self) -> None:
        """End everything it started, and itself."""
        if self._listener is not None:
            self._listener.cancel()
        self._writer.close()
        await asyncio.to_thread(self._popen.wait)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                self._hear(json.loads(line))
        for process in self._processes.values():  # they die with their server
            process._exit.set_result(128 + signal.SIGKILL)
        self._processes.clear()
        self.ended.set_result(None)
        if not self._ready.done():
            self._ready.set_exception(AgentError(f"the fork server did not start: see {self._log}"))

    def _hear(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self._ready.set_result(None)
            return
        process = self._processes[message["id"]]
        if "pid" in message:
            process._started.set_result(message["pid"])
        elif "failed" in message:
            del self._processes[message["id"]]
            process._started.set_exception(Refused("RunContainerError", message["failed"]))
            process._exit.set_result(128)
        else:
            del self._processes[message["id"]]
            process._exit.set_result(message["exit"])

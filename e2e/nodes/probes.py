"""Asking a container how it is: httpGet, tcpSocket, exec, sleep; the same actions serve probes and hooks."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp

from e2e.nodes.errors import Refused
from e2e.nodes.processes import Process

Json = dict[str, Any]

Exec = Callable[[Sequence[str]], Awaitable[Process]]
"""Starts a command in the container's surroundings."""


class Actions:
    """What can be done to one running container from outside."""

    def __init__(self, container: Json, address: str, session: aiohttp.ClientSession, execute: Exec) -> None:
        self._container = container
        self._address = address
        self._session = session
        self._execute = execute

    async def succeeds(self, action: Json, timeout_s: float | None) -> str | None:
        """Carry out a probe or hook; None when it went well, else one sentence of what was wrong.

        `timeout_s=None`: the caller sets the bound by cancelling.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if "httpGet" in action:
                    return await self._http(action["httpGet"])
                if "tcpSocket" in action:
                    return await self._tcp(action["tcpSocket"])
                if "exec" in action:
                    return await self._exec(action["exec"]["command"])
                await asyncio.sleep(action["sleep"]["seconds"])
                return None
        except TimeoutError:
            return f"no answer within {timeout_s:g} s"
        except (aiohttp.ClientError, OSError, Refused) as error:
            return str(error) or type(error).__name__

    async def _http(self, get: Json) -> str | None:
        host = get.get("host") or self._address
        url = f"{get.get('scheme', 'HTTP').lower()}://{host}:{self._port(get['port'])}{get.get('path', '/')}"
        headers = {"User-Agent": "kube-probe/disaggserve"}
        headers |= {header["name"]: header["value"] for header in get.get("httpHeaders", [])}
        async with self._session.get(url, headers=headers, allow_redirects=False, ssl=False) as answer:
            return None if 200 <= answer.status < 400 else f"HTTP status {answer.status} from {url}"

    async def _tcp(self, socket: Json) -> str | None:
        host = socket.get("host") or self._address
        _, writer = await asyncio.open_connection(host, self._port(socket["port"]))
        writer.close()
        return None

    async def _exec(self, command: Sequence[str]) -> str | None:
        process = await self._execute(command)
        try:
            code = await process.wait()
        finally:
            process.signal(signal.SIGKILL)
        return None if code == 0 else f"the command {command[0]} exited with {code}"

    def _port(self, port: int | str) -> int:
        for named in self._container.get("ports", []):
            if named.get("name") == port:
                return int(named["containerPort"])
        try:
            return int(port)
        except ValueError:
            raise Refused("", f"the container has no port named {port!r}") from None

"""The Kubernetes API as the agent needs it: plain JSON over aiohttp, and a watch that lists anew when it must.

A typed client would parse every pod of every event into model objects; this process shares two cores with
everything else.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import ssl
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import yaml

from e2e.nodes.errors import AgentError, ApiError

Json = dict[str, Any]

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"

_USER_AGENT = "disaggserve-nodes"
_WATCH_S = 300
_TIMEOUT_S = 30.0
_RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)

log = logging.getLogger(__name__)


class Api:
    """One API server, as the user of a kubeconfig. Use as an async context manager."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        context = _named(config, "contexts", config["current-context"])["context"]
        cluster = _named(config, "clusters", context["cluster"])["cluster"]
        user = _named(config, "users", context["user"])["user"]
        self.server: str = cluster["server"].rstrip("/")
        self.authority = _data(cluster, "certificate-authority")
        """Who signed the server's certificate, PEM; empty when the kubeconfig names nobody."""
        self._tls = ssl.create_default_context(cadata=self.authority.decode() or None)
        certificate, key = _data(user, "client-certificate"), _data(user, "client-key")
        if certificate:
            # The ssl module takes files only; the copy is gone as soon as it is read.
            with tempfile.NamedTemporaryFile(suffix=".pem") as pem:
                pem.write(certificate + b"\n" + key)
                pem.flush()
                self._tls.load_cert_chain(pem.name)
        token = user.get("token") or (Path(user["tokenFile"]).read_text() if "tokenFile" in user else "")
        if not certificate and not token:
            raise AgentError(
                f"{kubeconfig} holds neither a client certificate nor a token for its current user"
            )
        self._headers = {"User-Agent": _USER_AGENT} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._tls),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str, **parameters: str) -> Json:
        return await self._request("GET", path, None, "", parameters)

    async def post(self, path: str, body: Json, *, impersonate: tuple[str, str] | None = None) -> Json:
        """`impersonate`: (user, group) on whose behalf."""
        extra = (
            {"Impersonate-User": impersonate[0], "Impersonate-Group": impersonate[1]} if impersonate else {}
        )
        return await self._request("POST", path, body, "application/json", {}, extra)

    async def put(self, path: str, body: Json) -> Json:
        return await self._request("PUT", path, body, "application/json", {})

    async def patch(self, path: str, body: Json, content_type: str) -> Json:
        return await self._request("PATCH", path, body, content_type, {})

    async def delete(self, path: str, body: Json | None = None) -> Json:
        return await self._request("DELETE", path, body, "application/json", {})

    async def insist(self, call: Callable[[], Any], what: str) -> Json:
        """Repeat `call` while the server is away or overloaded. Raises ApiError for what it refuses."""
        for attempt in range(1 << 30):
            try:
                result: Json = await call()
                return result
            except ApiError as error:
                if error.status < 500 and error.status != 429:
                    raise
                log.warning("%s: %s", what, error)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                log.warning("%s: %s", what, error or type(error).__name__)
            await asyncio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
        raise AssertionError("unreachable")

    async def follow(
        self,
        path: str,
        parameters: Mapping[str, str],
        replace: Callable[[list[Json]], None],
        change: Callable[[str, Json], None],
    ) -> None:
        """Forever: `replace` with a full list, then `change(type, object)` for each event; a new list when the
        watch has expired or the server was away."""
        attempt = 0
        while True:
            try:
                listing = await self.get(path, **parameters)
                version = listing["metadata"]["resourceVersion"]
                replace(listing["items"])
                attempt = 0
                while True:
                    version = await self._watch(path, parameters, version, change)
            except ApiError as error:
                log.warning("watch of %s: %s", path, error)
                if error.status == 410:
                    continue
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                log.warning("watch of %s: %s", path, error or type(error).__name__)
            await asyncio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
            attempt += 1

    async def _watch(
        self, path: str, parameters: Mapping[str, str], version: str, change: Callable[[str, Json], None]
    ) -> str:
        """One watch request to its end; the version to go on from."""
        assert self._session is not None
        query = {
            **parameters,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(_WATCH_S),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_S, sock_read=_WATCH_S + _TIMEOUT_S)
        async with self._session.get(self.server + path, params=query, timeout=timeout) as answer:
            await _check(answer)
            pending = b""
            async for chunk in answer.content.iter_any():
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        status = event["object"]
                        raise ApiError(
                            status.get("code", 500), status.get("reason", ""), status.get("message", "")
                        )
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        change(event["type"], event["object"])
        return version

    async def _request(
        self,
        method: str,
        path: str,
        body: Json | None,
        content_type: str,
        parameters: Mapping[str, str],
        headers: Mapping[str, str] | None = None,
    ) -> Json:
        assert self._session is not None
        async with self._session.request(
            method,
            self.server + path,
            params=parameters,
            data=None if body is None else json.dumps(body),
            headers={**(headers or {}), **({"Content-Type": content_type} if body is not None else {})},
        ) as answer:
            await _check(answer)
            result: Json = await answer.json()
            return result


async def _check(answer: aiohttp.ClientResponse) -> None:
    if answer.status < 400:
        return
    text = await answer.text()
    try:
        status = json.loads(text)
        raise ApiError(answer.status, status.get("reason", ""), status.get("message", text))
    except json.JSONDecodeError:
        raise ApiError(answer.status, answer.reason or "", text) from None


def _named(config: Json, kind: str, name: str) -> Json:
    for entry in config.get(kind, []):
        if entry["name"] == name:
            found: Json = entry
            return found
    raise AgentError(f"the kubeconfig has no {kind} entry named {name!r}")


def _data(entry: Json, key: str) -> bytes:
    if f"{key}-data" in entry:
        return base64.b64decode(entry[f"{key}-data"])
    return Path(entry[key]).read_bytes() if key in entry else b""

"""Keeps the API's view of one pod's status equal to ours, with as few writes as that takes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from e2e.nodes import status
from e2e.nodes.api import STRATEGIC, Api
from e2e.nodes.errors import ApiError

Json = dict[str, Any]

log = logging.getLogger(__name__)


class Reporter:
    """Writes what `current()` gives when told that it may have changed, and only if it has."""

    def __init__(self, api: Api, pod: Json, current: Callable[[], Json]) -> None:
        self._api = api
        self._path = (
            f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}/status"
        )
        self._uid: str = pod["metadata"]["uid"]
        self._current = current
        self._dirty = asyncio.Event()
        self._writing = asyncio.Lock()
        self._version = 0
        self.written: Json = {}
        """What the API server was last told; empty before."""
        self._task: asyncio.Task[None] | None = None

    def changed(self) -> None:
        """Write soon. Changes that come while a write is under way go into the next one together."""
        if self._task is None:
            self._task = asyncio.create_task(self._write_when_dirty())
        self._dirty.set()

    def compare(self, pod: Json) -> None:
        """The API has a new version: if somebody else has changed our conditions, say again what is true.

        The node controller does so, marking pods unready, when a heartbeat was late.
        """
        if not self.written or int(pod["metadata"]["resourceVersion"]) <= self._version:
            return
        theirs = {condition["type"]: condition["status"] for condition in pod["status"].get("conditions", [])}
        ours = {condition["type"]: condition["status"] for condition in self.written["conditions"]}
        if any(theirs.get(kind) != value for kind, value in ours.items()):
            self.written = {}
            self.changed()
        elif pod["spec"].get("readinessGates"):
            self.changed()

    async def flush(self) -> None:
        """Write now; on return the API server knows, or the pod is gone."""
        async with self._writing:
            self._dirty.clear()
            new = self._current()
            if new == self.written:
                return
            body = {"metadata": {"uid": self._uid}, "status": status.patch(new)}
            try:
                answer = await self._api.insist(
                    lambda: self._api.patch(self._path, body, STRATEGIC), f"writing {self._path}"
                )
                self._version = int(answer["metadata"]["resourceVersion"])
            except ApiError as error:
                # 404 and 409: it is gone, or another of that name has come; the watch will say so.
                if error.status not in (404, 409):
                    log.error("%s was refused: %s", self._path, error)
            self.written = new

    def stop(self) -> None:
        """Write nothing more."""
        if self._task is not None:
            self._task.cancel()

    async def _write_when_dirty(self) -> None:
        while True:
            await self._dirty.wait()
            await self.flush()

"""What pods say of themselves over HTTP: routers of every instance, workers of their own role.

Who cannot be asked is unknown, not idle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import aiohttp

from disaggserve import manifests
from disaggserve.api.plan import Slot, SlotRole
from disaggserve.cluster.client import Json
from disaggserve.rollout import PHASES, Instance, Load

T = TypeVar("T")

_TIMEOUT_S = 3.0
_FAULTS = (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError)


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S))


def _url(pod: Json, path: str) -> str:
    """Raises KeyError while the pod has no address."""
    ip = pod["status"]["podIP"]
    return f"http://{f'[{ip}]' if ':' in ip else ip}:{manifests.HTTP_PORT}{path}"


async def _said(
    http: aiohttp.ClientSession, pod: Json, path: str, read: Callable[[Any], T | None]
) -> T | None:
    """What `read` finds in the pod's answer; None also where it does not answer, or answers something else."""
    try:
        async with http.get(_url(pod, path)) as answer:
            answer.raise_for_status()
            return read(await answer.json())
    except _FAULTS:
        return None


async def _held(http: aiohttp.ClientSession, router: Json) -> Mapping[str, Mapping[str, int]] | None:
    return await _said(http, router, "/drain", lambda said: said["instances"])


async def _state(http: aiohttp.ClientSession, worker: Json) -> Mapping[str, Any] | None:
    return await _said(http, worker, "/state", lambda said: said if said["role"] in PHASES else None)


async def _nothing() -> None:
    return None


async def transports(pairs: Sequence[Json]) -> dict[str, str]:
    """How the KV of pairs goes, as they found out when they started; by pod uid, without those that do not say."""
    async with session() as http:
        said = await asyncio.gather(*(_transport(http, pod) for pod in pairs))
    return {pod["metadata"]["uid"]: way for pod, way in zip(pairs, said, strict=True) if way}


async def _transport(http: aiohttp.ClientSession, pair: Json) -> str | None:
    def read(said: Any) -> str | None:
        return said["transport"] if isinstance(said["transport"], str) else None

    return await _said(http, pair, "/state", read)


async def with_words(
    instances: Sequence[Instance], routers: Sequence[Json], workers: Sequence[Json]
) -> list[Instance]:
    """Instances with what all routers together say of them, and their own word on their role; asked only when one drains."""
    if not any(i.drain_age_s is not None for i in instances):
        return list(instances)
    running = [r for r in routers if r["status"].get("phase") in ("Running", "Pending")]
    pods = {w["metadata"]["uid"]: w for w in workers}
    async with session() as http:
        asked = [
            _state(http, pods[i.uid]) if i.drain_age_s is not None and i.role_change == "door" else _nothing()
            for i in instances
        ]
        views, states = await asyncio.gather(
            asyncio.gather(*(_held(http, r) for r in running)), asyncio.gather(*asked)
        )
    return [
        replace(i, load=_load(i.uid, views), says=said["role"] if said else None)
        for i, said in zip(instances, states, strict=True)
    ]


def _load(uid: str, views: Sequence[Mapping[str, Mapping[str, int]] | None]) -> Load | None:
    if not views or any(v is None or uid not in v for v in views):
        return None
    mine = [v[uid] for v in views if v is not None]
    return Load(
        admitting=any(bool(m["admitting"]) for m in mine),
        in_flight=sum(int(m["in_flight"]) for m in mine),
        leased=sum(int(m["leased"]) for m in mine),
    )


async def take_role(worker: Json, slot: Slot, epoch: int) -> str:
    """Tells an empty worker its role, and has it say so; the empty string when it does, else why not, in words.

    Asking again is harmless. `epoch` is the committed plan's revision: a worker refuses one that is lower than the last.
    """
    name, role = worker["metadata"]["name"], slot.role
    body: dict[str, Any] = {"role": role, "epoch": epoch}
    if slot.chunk is not None:
        body["chunk"] = slot.chunk
    try:
        async with session() as http:
            async with http.post(_url(worker, "/role"), json=body) as answer:
                if answer.status != 200:
                    words = " ".join((await answer.text()).split())[:300]
                    return f"{name} does not become {role} yet: HTTP {answer.status} {words}"
            said = await _state(http, worker)
    except _FAULTS as error:
        return f"{name} cannot be told to become {role}: {error or type(error).__name__}"
    if said is None or (said["role"], said.get("epoch")) != (role, epoch):
        seen: SlotRole | None = said["role"] if said else None
        return f"{name} was told to become {role} in revision {epoch}, and says {seen or 'nothing'}"
    return ""

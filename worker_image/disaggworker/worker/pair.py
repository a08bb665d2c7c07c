"""A low-affinity pair: a prefill and a decode worker in one container, so that KV stays in its memory (Algorithm 2).

    disaggworker pair [--prefill-gpus 0,1] [--decode-gpus 2,3] [--ready-port 8002] prefill … decode …

Each of the two has its own flags, as it has them alone, and its own ports. They start together, are ready together, drain
together, and neither outlives the other. Once both are ready one request goes through both, and tells by which transport its
KV went: that is checked, not assumed, since what two processes of one host can share depends on how they were started.

Whoever asks about the pod asks the pair's own port: /ready and /health of both, /state with the transport, and /metrics, where
`role` tells the two apart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import aiohttp
from aiohttp import web

from disaggworker import config
from disaggworker.errors import StartError
from disaggworker.metrics import CONTENT_TYPE

_PR_SET_PDEATHSIG = 1
_LOOK_S = 0.1
_PATIENCE_S = 30.0  # for the one request


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise StartError(f"{self.prog}: {message}.")


@dataclasses.dataclass(frozen=True)
class Command:
    """One of the two workers: its flags, and the GPUs that it may see; None: all there are."""

    role: str
    flags: list[str]
    gpus: str | None

    def ports(self) -> set[int]:
        """Its HTTP port, and the KV port of each of its ranks."""
        known = self._known()
        return {known.port, *range(known.kv_port, known.kv_port + known.tp * known.pp)}

    @property
    def port(self) -> int:
        """Its HTTP port."""
        return int(self._known().port)

    def _known(self) -> argparse.Namespace:
        parser = _Parser(prog=f"disaggworker pair … {self.role}", add_help=False, allow_abbrev=False)
        for flag, default in (("--port", 8000), ("--kv-port", 5600), ("--tp", 1), ("--pp", 1)):
            parser.add_argument(flag, type=int, default=default)
        return parser.parse_known_args(self.flags)[0]

    def argv(self) -> list[str]:
        """As a process is started with it."""
        share = ["--kv-share"] if self.role == "prefill" else []
        return [sys.executable, "-m", "disaggworker", self.role, *self.flags, *share]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `disaggworker pair` was told."""

    prefill: Command
    decode: Command
    host: str
    ready_port: int

    @property
    def both(self) -> tuple[Command, Command]:
        """Prefill first."""
        return self.prefill, self.decode


def read(argv: Sequence[str], env: Mapping[str, str]) -> Settings:
    """The settings in `argv`, without the word "pair". Raises `StartError`."""
    rest = list(argv)
    flags: dict[str, list[str]] = {}
    for role in ("decode", "prefill"):
        there = [at for at in _words(rest) if rest[at] == role]
        if len(there) != 1 and "--help" not in rest:
            raise StartError(
                f"disaggworker pair: say `prefill` and its flags, then `decode` and its flags; {role!r} is there {len(there)} times."
            )
        at = there[0] if there else len(rest)
        rest, flags[role] = rest[:at], rest[at + 1 :]
    parser = _Parser(prog="disaggworker pair", allow_abbrev=False, epilog="then: prefill FLAGS decode FLAGS")
    parser.add_argument("--prefill-gpus", help="as in CUDA_VISIBLE_DEVICES; default: all")
    parser.add_argument("--decode-gpus", help="likewise")
    parser.add_argument(
        "--ready-port", type=int, default=8002, help="of the pair's own /ready, /health, /state and /metrics"
    )
    own = parser.parse_args(rest)
    prefill = Command("prefill", flags["prefill"], own.prefill_gpus)
    decode = Command("decode", flags["decode"], own.decode_gpus)
    if both := prefill.ports() & decode.ports():
        said = ", ".join(map(str, sorted(both)))
        raise StartError(
            f"disaggworker pair: both workers have port {said}; give each its own --port, and --kv-port with one port per rank."
        )
    return Settings(prefill, decode, env.get("POD_IP") or "127.0.0.1", own.ready_port)


def _words(argv: Sequence[str]) -> Iterator[int]:
    """Where words stand that are neither flags nor their values: a model may be served by the name `decode`."""
    switches, value = config.switches(), False
    for at, word in enumerate(argv):
        if value:
            value = False
        elif word.startswith("-"):
            value = "=" not in word and word not in switches
        else:
            yield at


def run(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT, or until one of the two has ended; the exit code. Raises `StartError`."""
    return asyncio.run(Pair(read(argv, os.environ)).main())


class Pair:
    """The two processes, and what is said of them together."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state: dict[str, Any] = {"status": "loading", "transport": None}

    async def main(self) -> int:
        """Start both, watch them, end both."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_PATIENCE_S)) as self._session:
            return await self._main()

    async def _main(self) -> int:
        settings, stopping = self._settings, asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        app = web.Application()
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/state", self._ready)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, settings.host, settings.ready_port).start()
        except OSError as e:
            raise StartError(
                f"Port {settings.host}:{settings.ready_port} cannot be bound: {e.strerror}."
            ) from None
        workers = {command.role: await _start(command) for command in settings.both}
        ends = {role: asyncio.create_task(worker.wait()) for role, worker in workers.items()}
        stop, check = asyncio.create_task(stopping.wait()), asyncio.create_task(self._check())
        await asyncio.wait([stop, *ends.values()], return_when=asyncio.FIRST_COMPLETED)
        check.cancel()
        self._state["status"] = "stopping"
        early = [role for role, end in ends.items() if end.done() and not stopping.is_set()]
        # One that failed has said why, and that is to stay the last word.
        for role in (role for role in early if ends[role].result() <= 0):
            print(
                f"The {role} worker of this pair ended with {ends[role].result()}; the pair ends with it.",
                file=sys.stderr,
            )
        for worker in workers.values():
            # Both drain: what decode has begun it finishes, and prefill holds its KV until then.
            with contextlib.suppress(ProcessLookupError):
                worker.terminate()
        codes = [await end for end in ends.values()]
        stop.cancel()
        await runner.cleanup()
        return 1 if early or any(codes) else 0

    async def _check(self) -> None:
        """Wait until both are ready, and see by which transport KV goes."""
        said = ""
        while self._state["transport"] is None:
            await asyncio.sleep(_LOOK_S)
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                for command in self._settings.both:
                    await self._get(command, "/ready")
                try:
                    self._state["transport"] = await self._transport()
                except (aiohttp.ClientError, TimeoutError, LookupError) as e:
                    if said != (why := f"No KV goes from prefill to decode in this pair: {e!r}."):
                        print(said := why, file=sys.stderr)
        if self._state["transport"] in ("zmq", "tcp"):
            print(
                "KV of this pair goes through sockets, not through shared memory: the workers cannot map each other's, or it is a GPU's.",
                file=sys.stderr,
            )
        self._state["status"] = "ready"

    async def _transport(self) -> str:
        """One request of one block through both, and the transport that it took."""
        prefill, decode = self._settings.both
        model = (await self._get(prefill, "/v1/models"))["data"][0]["id"]
        body = {"model": model, "prompt": [1] * 16, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        first = await self._post(
            prefill, {**body, "kv_transfer_params": {"do_remote_decode": True, "max_tokens": 2}}
        )
        before = (await self._get(decode, "/state"))["pulls"]
        await self._post(decode, {**body, "kv_transfer_params": first["kv_transfer_params"]})
        after = (await self._get(decode, "/state"))["pulls"]
        moved = [str(way) for way, count in after.items() if count > before.get(way, 0)]
        if not moved:
            raise LookupError("decode has answered and counts no pull")
        return moved[0]

    async def _ready(self, request: web.Request) -> web.Response:
        ready = self._state["status"] == "ready" or request.path == "/state"
        return web.json_response(self._state, status=200 if ready else 503)

    async def _health(self, _: web.Request) -> web.Response:
        """Whether both answer."""
        try:
            said = {command.role: await self._get(command, "/health") for command in self._settings.both}
        except (aiohttp.ClientError, TimeoutError) as e:
            return web.json_response({"status": str(e) or type(e).__name__}, status=503)
        return web.json_response({"status": "ok", **said})

    async def _metrics(self, _: web.Request) -> web.Response:
        texts = {}
        for command in self._settings.both:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with self._session.get(self._url(command, "/metrics")) as answer:
                    texts[command.role] = await answer.text()
        return web.Response(text=merged(texts), headers={"Content-Type": CONTENT_TYPE})

    async def _get(self, command: Command, path: str) -> Any:
        async with self._session.get(self._url(command, path)) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def _post(self, command: Command, body: Mapping[str, Any]) -> Any:
        async with self._session.post(self._url(command, "/v1/completions"), json=body) as answer:
            answer.raise_for_status()
            return await answer.json()

    def _url(self, command: Command, path: str) -> str:
        return f"http://{self._settings.host}:{command.port}{path}"


def merged(texts: Mapping[str, str]) -> str:
    """One exposition of what both workers expose, by role: each series with its worker's role, each family in one piece."""
    families: dict[str, list[str]] = {}
    for role, text in texts.items():
        series: list[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP "):
                series = families.setdefault(line, [])
            elif not line.startswith("#"):
                series.append(line if 'role="' in line else line.replace("{", f'{{role="{role}",', 1))
            elif not series:
                series.append(line)
    return "".join(f"{line}\n" for head, series in families.items() for line in (head, *series))


async def _start(command: Command) -> asyncio.subprocess.Process:
    env = dict(os.environ)
    if command.gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = command.gpus
    return await asyncio.create_subprocess_exec(*command.argv(), env=env, preexec_fn=_die_with_me)


def _die_with_me() -> None:
    """In a worker, before it begins: a pair that is killed leaves none behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

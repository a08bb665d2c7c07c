"""The worker's HTTP side: OpenAI's API in two steps, health, state and metrics. One event loop; torch is elsewhere."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import torch
import uvloop
from aiohttp import web

from disaggserve import metric_names as names
from disaggserve.protocol import Handoff
from disaggworker import config as configuration
from disaggworker import openai
from disaggworker.config import Config
from disaggworker.engine.engine import Engine, Event
from disaggworker.engine.runner import Runner
from disaggworker.engine.scheduler import Scheduler
from disaggworker.errors import RequestError, StartError, TransferError
from disaggworker.kv.blocks import BLOCK_TOKENS, BlockManager
from disaggworker.kv.pool import Pool, blocks_in_memory
from disaggworker.kv.pull import KVClient, Puller
from disaggworker.kv.serve import KVServer
from disaggworker.kv.shm import Shm
from disaggworker.load import Book
from disaggworker.metrics import CONTENT_TYPE, Metrics
from disaggworker.model.load import Model, load
from disaggworker.pace import Pace
from disaggworker.worker.decode import Decode
from disaggworker.worker.instance import Instance
from disaggworker.worker.prefill import Prefill
from disaggworker.worker.text import Text

_BATCH_TOKENS = 512  # L_m where no pace says another
_BODY_BYTES = 32 << 20

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[[web.Request, openai.Ask], Awaitable[web.StreamResponse]]


def run(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises `StartError`."""
    config = configuration.read(argv)
    code: int = uvloop.run(Worker(config).main())
    return code


def total_blocks(config: Config, pace: Pace | None, model: Model) -> int:
    """KV blocks of this instance: the real GPU's when paced, else what the flag or the memory says."""
    if config.kv_blocks:
        return config.kv_blocks
    if pace:
        return pace.blocks
    return blocks_in_memory(model.layers, model.kv_heads, model.head_dim, model.dtype, model.device)


class Worker:
    """One prefill or decode instance."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.pace = Pace.of(config)
        self.metrics = Metrics(config.served_name, config.role)
        self.book = Book(lambda: self._counts() | {"leased_blocks": self._leased_blocks()})
        self._instance: Instance | None = None  # None while it loads
        self._serve: Serve | None = None
        self._in_flight = 0
        self._fault: StartError | None = None
        self._kv_server: KVServer | None = None
        self._kv_client: KVClient | None = None

    # ------------------------------------------------------------------------------ life

    async def main(self) -> int:
        """Bind, load, serve, drain."""
        config = self.config
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._loaded = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopping.set)
        if config.role == "prefill":
            self._kv_server = KVServer(
                config.pod_ip, config.kv_port, config.pairing_key, config.lease_s, ways=[Shm()]
            )
        else:
            self._kv_client = KVClient(config.pairing_key)
        app = web.Application(client_max_size=_BODY_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/state", self._state)
        app.router.add_get("/load", self._load)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/release", self._release)
        app.router.add_post("/v1/completions", self._guarded(chat=False))
        app.router.add_post("/v1/chat/completions", self._guarded(chat=True))
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, config.pod_ip, config.port, backlog=1024).start()
        except OSError as e:
            raise StartError(f"Port {config.pod_ip}:{config.port} cannot be bound: {e.strerror}.") from None
        thread = threading.Thread(target=self._compute, name="engine", daemon=True)
        thread.start()
        await self._first(self._loaded.wait(), self._stopping.wait())
        if self._fault:
            await runner.cleanup()
            print(self._fault, file=sys.stderr)
            return 1
        await self._stopping.wait()
        await self._drain()
        self.book.close()
        if self._instance:
            self._instance.engine.close()
            await asyncio.to_thread(thread.join)
        await runner.cleanup()
        if self._kv_server:
            self._kv_server.close()
        if self._kv_client:
            await self._kv_client.close()
        return 0

    @staticmethod
    async def _first(*waits: Awaitable[Any]) -> None:
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def _drain(self) -> None:
        """Wait until everything in flight is answered and every hand-off is pulled or its lease has ended."""
        while self._in_flight or (self._kv_server and self._kv_server.leased):
            if self._in_flight:
                await self._quiet.wait()
            else:
                await asyncio.sleep(0.05)

    def _compute(self) -> None:
        """The engine's thread, from loading to the end."""
        config = self.config
        try:
            # The paced share two cores; and torch's own threads would have to wake for every small multiplication.
            if self.pace or not torch.cuda.is_available():
                torch.set_num_threads(1 if self.pace else torch.get_num_threads())
            with torch.inference_mode():
                model, ends = load(config.weights, config.dtype)
                blocks = total_blocks(config, self.pace, model)
                pool = Pool(
                    model.layers,
                    model.kv_heads,
                    model.head_dim,
                    blocks,
                    model.dtype,
                    model.device,
                    shared=config.kv_share,
                )
            longest = min(config.context_length or model.max_positions, model.max_positions)
            text = Text(config.weights, min(longest, blocks * BLOCK_TOKENS))
            scheduler = Scheduler(
                BlockManager(blocks),
                may_prefill=config.role == "prefill",
                may_decode=config.role == "decode",
                batch_tokens=self.pace.batch_tokens if self.pace else _BATCH_TOKENS,
                lanes=self.pace.times.pp if self.pace else 1,
            )
            engine = Engine(Runner(model, pool), scheduler, ends, self.pace, self._sink)
            with torch.inference_mode():
                engine.warm_up()
        except StartError as e:
            self._fault = e
            self._loop.call_soon_threadsafe(self._loaded.set)
            return
        except Exception as e:
            # tokenizers and torch raise plain Exceptions for unreadable files and for memory.
            self._fault = StartError(f"{config.weights} cannot be served: {e}")
            self._loop.call_soon_threadsafe(self._loaded.set)
            return
        instance = Instance(config, self.pace, engine, text, self.metrics, self.book, self._loop)
        if self._kv_server:
            self._serve = Prefill(instance, self._kv_server).serve
            self._kv_server.serve(pool)
        elif self._kv_client:
            self._kv_client.puller = Puller(
                config.pairing_key, pool, ways=[Shm()], checksum=config.kv_checksum
            )
            self._serve = Decode(instance, self._kv_client).serve
        self._instance = instance
        self._loop.call_soon_threadsafe(self._loaded.set)
        engine.run()

    # ------------------------------------------------------------------------------ from the engine's thread

    def _sink(self, events: list[Event]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, events)

    # ------------------------------------------------------------------------------ on the event loop

    def _deliver(self, events: list[Event]) -> None:
        now = time.monotonic()
        metrics = self.metrics
        for sequence, token, finish in events:
            if sequence.last_token_s:
                metrics.inter_token.observe(now - sequence.last_token_s)
            else:
                sequence.first_token_s = now
            sequence.last_token_s = now
            sequence.on_token(token, finish)

    def _guarded(self, *, chat: bool) -> Handler:
        """The role's handler with errors in OpenAI's shape."""

        async def handle(request: web.Request) -> web.StreamResponse:
            self._in_flight += 1
            self._quiet.clear()
            try:
                if self._stopping.is_set() or self._serve is None:
                    what = "is stopping" if self._stopping.is_set() else "is still loading"
                    raise RequestError(f"This worker {what}.", status=503)
                ask = openai.read(await request.read(), chat=chat)
                return await self._serve(request, ask)
            except RequestError as e:
                body = openai.error(str(e), e.status, e.param, e.code)
                return web.Response(status=e.status, body=body, content_type="application/json")
            except TransferError as e:
                body = openai.error(str(e), 502, None, e.code)
                return web.Response(status=502, body=body, content_type="application/json")
            finally:
                self._in_flight -= 1
                if not self._in_flight:
                    self._quiet.set()

        return handle

    # ------------------------------------------------------------------------------ about itself

    async def _health(self, _: web.Request) -> web.Response:
        """Liveness: the process answers."""
        return web.json_response(
            {"status": "ok", "role": self.config.role, "emulated": self.pace is not None}
        )

    async def _ready(self, _: web.Request) -> web.Response:
        if self._stopping.is_set():
            return web.json_response({"status": "stopping"}, status=503)
        if self._instance is None:
            return web.json_response({"status": "loading"}, status=503)
        return web.json_response({"status": "ready"})

    def _counts(self) -> dict[str, int]:
        if self._instance is None:
            return {"waiting": 0, "running": 0, "free_blocks": 0, "total_blocks": 0}
        engine = self._instance.engine
        scheduler = engine.scheduler
        return {
            "waiting": len(scheduler.waiting) + len(scheduler.preempted),
            "running": engine.running,
            "free_blocks": scheduler.blocks.free,
            "total_blocks": scheduler.blocks.total,
        }

    def _leased_blocks(self) -> int:
        return self._kv_server.leased_blocks if self._kv_server else 0

    async def _load(self, request: web.Request) -> web.StreamResponse:
        if self._instance is None:
            return web.json_response({"status": "loading"}, status=503)
        return await self.book.stream(request)

    async def _release(self, request: web.Request) -> web.Response:
        """A router that will not have a hand-off pulled gives it back."""
        try:
            handoff = msgspec.json.decode(await request.read(), type=Handoff)
        except msgspec.DecodeError as e:
            return web.Response(status=400, body=openai.error(f"This is no hand-off: {e}.", 400))
        if self._kv_server:
            self._kv_server.drop(handoff.handoff)
        return web.json_response({"status": "released"})

    async def _state(self, _: web.Request) -> web.Response:
        facts = {
            "role": self.config.role,
            **self._counts(),
            "leased_blocks": self._leased_blocks(),
            "pulls": dict(self.metrics.pulls),  # by transport
            "emulated": self.pace is not None,
        }
        return web.json_response(facts)

    async def _metrics(self, _: web.Request) -> web.Response:
        counts, engine = self._counts(), self._instance.engine if self._instance else None
        total = counts["total_blocks"]
        numbers: dict[str, float] = {
            names.WORKER_EMULATED: int(self.pace is not None),
            names.WORKER_STEPS: engine.steps if engine else 0,
            names.WORKER_LATE_STEPS: engine.late_steps if engine else 0,
        }
        if total:
            numbers |= {
                names.VLLM_RUNNING: counts["running"],
                names.VLLM_WAITING: counts["waiting"],
                names.VLLM_KV_USAGE: 1 - counts["free_blocks"] / total,
            }
        if engine and self.config.role == "decode":
            numbers[names.VLLM_PREEMPTIONS] = engine.scheduler.preemptions
        return web.Response(text=self.metrics.text(numbers), headers={"Content-Type": CONTENT_TYPE})

    async def _models(self, _: web.Request) -> web.Response:
        card = {
            "id": self.config.served_name,
            "object": "model",
            "owned_by": "disaggserve",
            "root": self.config.model,
            "max_model_len": self._instance.text.context if self._instance else None,
        }
        return web.json_response({"object": "list", "data": [card]})

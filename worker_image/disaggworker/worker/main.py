"""The worker's HTTP side: OpenAI's API, in two steps or one, role, health, state and metrics. One event loop; torch is elsewhere.

A worker always has both halves, so that its role is a word: which of them it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import torch
import uvloop
from aiohttp import web

from disaggserve import metric_names as names
from disaggserve.protocol import Given
from disaggworker import config as configuration
from disaggworker import openai
from disaggworker.config import Config
from disaggworker.engine.engine import Engine, Event
from disaggworker.engine.parallel.part import Part
from disaggworker.engine.parallel.rank import follow
from disaggworker.engine.parallel.ranks import Ranks
from disaggworker.engine.parallel.stage import lead, pool_of, total_blocks
from disaggworker.engine.runner import Runner, runner_for
from disaggworker.engine.scheduler import Scheduler
from disaggworker.errors import RequestError, StartError, TransferError, WorkerError
from disaggworker.kv.blocks import BLOCK_TOKENS, BlockManager
from disaggworker.kv.pull import KVClient, Puller
from disaggworker.kv.serve import KVServer
from disaggworker.kv.shm import Shm
from disaggworker.load import Book
from disaggworker.metrics import CONTENT_TYPE, Metrics
from disaggworker.model.load import load
from disaggworker.pace import Pace
from disaggworker.worker.decode import Decode
from disaggworker.worker.instance import Instance
from disaggworker.worker.prefill import Prefill
from disaggworker.worker.ranks import Attendant, Others, place_of
from disaggworker.worker.role import Duty, Kind, NotIdle, Turn
from disaggworker.worker.text import Text
from disaggworker.worker.whole import Whole

_BATCH_TOKENS = 512  # L_m where no pace says another
_ALONE_S = 5.0  # after a fault of the engine, until it is taken for its own
_BODY_BYTES = 32 << 20
_INTACT_S = 1.0  # how long the state waits for the engine's word on its blocks

T = TypeVar("T")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[[web.Request, openai.Ask], Awaitable[web.StreamResponse]]


def run(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises `StartError`."""
    config = configuration.read(argv)
    # They are forked: this process has one thread so far, and no GPU.
    body = functools.partial(follow, config, attend=functools.partial(Attendant, config))
    ranks = Ranks(config.ranks - 1, body) if config.ranks > 1 else None
    try:
        code: int = uvloop.run(Worker(config, ranks).main())
        if ranks and ranks.ended.is_set():
            ranks.close()
            sys.stderr.flush()
            # The engine's thread may be in an all-reduce that never ends; nothing waits for it.
            os._exit(code)
        return code
    finally:
        if ranks:
            ranks.close()


class Worker:
    """One instance, in whatever role."""

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        self.config, self._ranks = config, ranks
        self.pace = Pace.of(config)
        self.metrics = Metrics(config.served_name)
        self.book = Book(lambda: self._counts() | {"leased_blocks": self._leased_blocks()})
        self._instance: Instance | None = None  # None while it loads
        self.duty = Duty(config.role, config.chunk)
        self._serve: dict[Kind, Serve] = {}
        self._in_flight = 0
        self._fault: WorkerError | None = None

    # ------------------------------------------------------------------------------ life

    async def main(self) -> int:
        """Bind, load, serve, drain."""
        config = self.config
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._failed = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.stop)
        self._kv_server = KVServer(
            config.pod_ip, config.kv_port, config.pairing_key, config.lease_s, ways=[Shm()], streams=True
        )
        self._kv_client = KVClient(config.pairing_key)
        app = web.Application(client_max_size=_BODY_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/state", self._state)
        app.router.add_get("/load", self._load)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/release", self._release)
        app.router.add_post("/role", self._role)
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
        await self._first(self._stopping.wait(), self._failed.wait())
        await self._first(self._drain(), self._failed.wait())
        if self._fault:
            print(self._fault, file=sys.stderr)
            return 1
        self.book.close()
        if self._instance:
            self._instance.engine.close()
            await asyncio.to_thread(thread.join)
        await runner.cleanup()
        self._kv_server.close()
        await self._kv_client.close()
        return 0

    def stop(self) -> None:
        """Drain and end `main`; as SIGTERM does."""
        self._stopping.set()

    @staticmethod
    async def _first(*waits: Awaitable[Any]) -> None:
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def _drain(self) -> None:
        """Wait until everything in flight is answered and every hand-off is pulled or its lease has ended."""
        while self._in_flight or self._kv_server.leased:
            if self._in_flight:
                await self._quiet.wait()
            else:
                await asyncio.sleep(0.05)

    def _compute(self) -> None:
        """The engine's thread, from loading to the end."""
        try:
            engine = self._prepare()
        except WorkerError as e:
            return self._fail(e)
        except Exception as e:
            # tokenizers and torch raise plain Exceptions for unreadable files and for memory.
            return self._fail(StartError(f"{self.config.weights} cannot be served: {e}"))
        try:
            engine.run()
        except Exception as e:
            # Where a rank has ended, an all-reduce may fail before it is known which one.
            if not (self._ranks and self._ranks.ended.wait(_ALONE_S)):
                self._fail(e if isinstance(e, WorkerError) else WorkerError(f"The engine failed: {e}"))

    def _prepare(self) -> Engine:
        """Raises `WorkerError`, and whatever torch and tokenizers raise."""
        config, pace = self.config, self.pace
        runner: Runner
        with torch.inference_mode():
            if self._ranks:
                self._ranks.on_end = self._lost
                self._ranks.listen()
                runner, ends = lead(config, self._ranks)
            else:
                runner, ends = self._alone()
        longest = min(config.context_length or runner.model.max_positions, runner.model.max_positions)
        text = Text(config.weights, min(longest, runner.pool.limit * BLOCK_TOKENS))
        scheduler = Scheduler(
            BlockManager(runner.pool.limit, cache=config.prefix_cache),
            batch_tokens=pace.batch_tokens if pace else _BATCH_TOKENS,
            chunk=config.chunk,
            lanes=pace.times.pp if pace else runner.stages,
        )
        engine = Engine(runner, scheduler, ends, pace, self._sink)
        with torch.inference_mode():
            engine.warm_up()
        instance = Instance(config, pace, engine, text, self.metrics, self.book, self._loop)
        place = place_of(Part.of(runner.model, runner.pool))
        self._kv_server.serve(runner.pool, place)
        self._kv_client.puller = Puller(
            config.pairing_key, runner.pool, place, ways=[Shm()], streams=True, checksum=config.kv_checksum
        )
        others = self._kv_client.others = Others(self._ranks, self._loop) if self._ranks else None
        self._serve = {
            "prefill": Prefill(instance, self._kv_server, others).serve,
            "decode": Decode(instance, self._kv_client).serve,
            "whole": Whole(instance).serve,
        }
        self._instance = instance
        return engine

    def _alone(self) -> tuple[Runner, frozenset[int]]:
        """The whole model in this process. Raises `StartError`."""
        if self.pace:
            # The paced share two cores; and torch's own threads would have to wake for every small multiplication.
            torch.set_num_threads(1)
        model, ends = load(self.config.weights, self.config.dtype)
        blocks = total_blocks(self.config, self.pace, model)
        return runner_for(model, pool_of(self.config, model, blocks)), ends

    def _fail(self, fault: WorkerError) -> None:
        """End the worker, from any thread. Of several faults the first is told."""
        self._fault = self._fault or fault
        self._loop.call_soon_threadsafe(self._failed.set)

    def _lost(self) -> None:
        """In the thread that listens to the ranks: one has ended."""
        assert self._ranks
        self._fail(self._ranks.lost())

    # ------------------------------------------------------------------------------ from the engine's thread

    def _sink(self, events: list[Event]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, events)

    # ------------------------------------------------------------------------------ on the event loop

    def _deliver(self, events: list[Event]) -> None:
        now = time.monotonic()
        metrics = self.metrics
        for sequence, token, finish in events:
            if (gap_s := sequence.deliver(token, finish, now)) is not None:
                metrics.inter_token.observe(gap_s)

    def _guarded(self, *, chat: bool) -> Handler:
        """The handler of what is asked for, with errors in OpenAI's shape."""

        async def handle(request: web.Request) -> web.StreamResponse:
            self._in_flight += 1
            self._quiet.clear()
            try:
                if self._stopping.is_set() or self._instance is None:
                    what = "is stopping" if self._stopping.is_set() else "is still loading"
                    raise RequestError(f"This worker {what}.", status=503)
                ask = openai.read(await request.read(), chat=chat)
                with self.duty.holding(ask) as kind:
                    return await self._serve[kind](request, ask)
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
        return web.json_response({"status": "ok", "role": self.duty.role, "emulated": self.pace is not None})

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
            "waiting": engine.waiting,
            "running": engine.running,
            "free_blocks": scheduler.blocks.free,
            "total_blocks": scheduler.blocks.total,
        }

    def _leased_blocks(self) -> int:
        return self._kv_server.leased_blocks if self._instance else 0

    async def _load(self, request: web.Request) -> web.StreamResponse:
        if self._instance is None:
            return web.json_response({"status": "loading"}, status=503)
        return await self.book.stream(request)

    async def _release(self, request: web.Request) -> web.Response:
        """A router that will not have a hand-off pulled gives it back."""
        try:
            given = msgspec.json.decode(await request.read(), type=Given)
        except msgspec.DecodeError as e:
            return web.Response(status=400, body=openai.error(f"This is no hand-off: {e}.", 400))
        self._kv_server.drop(given.handoff)
        return web.json_response({"status": "released"})

    async def _role(self, request: web.Request) -> web.Response:
        """Another role, where nothing of the old one is held."""
        instance = self._instance
        if instance is None:
            return web.json_response({"status": "loading"}, status=503)
        try:
            turn = msgspec.json.decode(await request.read(), type=Turn)
        except msgspec.DecodeError as e:
            return web.Response(status=400, body=openai.error(f"This names no role: {e}.", 400))
        if turn.chunk and turn.role != "mixed":
            return web.Response(
                status=400, body=openai.error("Only a mixed worker has a chunk.", 400, "chunk")
            )

        async def held() -> dict[str, int]:
            return await self._ask_engine(self._held) or {}

        try:
            await self.duty.take(turn, held)
        except NotIdle as e:
            facts = {**self._facts(), **e.counts, "error": {"message": str(e), "type": "conflict"}}
            return web.json_response(facts, status=409)
        scheduler, chunk = instance.engine.scheduler, turn.chunk or 0
        await self._ask_engine(lambda: setattr(scheduler, "chunk", chunk))
        return web.json_response(self._facts())

    def _held(self) -> dict[str, int]:
        """In the engine's thread, after everything that was submitted before."""
        assert self._instance
        engine = self._instance.engine
        return {"queued": engine.waiting, "running": engine.running, "leased": self._kv_server.leased}

    async def _ask_engine(self, question: Callable[[], T]) -> T:
        """What the engine's thread says between two steps."""
        assert self._instance
        answer: asyncio.Future[T] = self._loop.create_future()

        def give(said: T) -> None:
            if not answer.done():
                answer.set_result(said)

        def act() -> None:
            said = question()
            self._loop.call_soon_threadsafe(give, said)

        self._instance.engine.post(act)
        return await answer

    def _facts(self) -> dict[str, Any]:
        return {
            "role": self.duty.role,
            "epoch": self.duty.epoch,
            "chunk": self.duty.chunk,
            **self._counts(),
            "leased_blocks": self._leased_blocks(),
        }

    async def _state(self, _: web.Request) -> web.Response:
        facts = {
            **self._facts(),
            "pulls": dict(self.metrics.pulls),  # by transport
            "emulated": self.pace is not None,
            "intact": None,  # not known: it loads, or a step takes long
        }
        if self._instance:
            with contextlib.suppress(TimeoutError):
                facts["intact"] = await asyncio.wait_for(self._ask_engine(self._intact), _INTACT_S)
        return web.json_response(facts)

    def _intact(self) -> bool:
        """Whether every block is where it is said to be. In the engine's thread."""
        assert self._instance
        try:
            self._instance.engine.scheduler.blocks.check_integrity()
        except AssertionError as e:
            print(f"KV blocks are not intact: {e}", file=sys.stderr)
            return False
        return True

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
        if engine:
            scheduler = engine.scheduler
            numbers[names.VLLM_PREEMPTIONS] = scheduler.preemptions
            numbers[names.VLLM_CACHE_QUERIES] = scheduler.looked_up
            numbers[names.VLLM_CACHE_HITS] = scheduler.found
        return web.Response(
            text=self.metrics.text(numbers, self.duty.role), headers={"Content-Type": CONTENT_TYPE}
        )

    async def _models(self, _: web.Request) -> web.Response:
        card = {
            "id": self.config.served_name,
            "object": "model",
            "owned_by": "disaggserve",
            "root": self.config.model,
            "max_model_len": self._instance.text.context if self._instance else None,
        }
        return web.json_response({"object": "list", "data": [card]})

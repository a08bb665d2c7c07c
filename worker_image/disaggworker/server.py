"""The worker's HTTP side: OpenAI's API in two steps, health, state and metrics. One event loop; torch is elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import signal
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import torch
import uvloop
from aiohttp import web
from tokenizers import Tokenizer

from disaggserve import metric_names as names
from disaggserve.protocol import Handoff, Layout
from disaggserve.wire import VERSION
from disaggworker import config as configuration
from disaggworker import openai
from disaggworker.chat import ChatTemplate
from disaggworker.config import Config
from disaggworker.engine.detokenize import TextStream, token_bytes
from disaggworker.engine.engine import Engine, Event
from disaggworker.engine.scheduler import Scheduler
from disaggworker.engine.sequence import Sequence, Token
from disaggworker.errors import RequestError, StartError, TransferError
from disaggworker.kv.blocks import BLOCK_TOKENS, BlockManager, blocks_for
from disaggworker.kv.pool import Pool, blocks_in_memory
from disaggworker.kv.pull import KVClient
from disaggworker.kv.serve import KVServer
from disaggworker.metrics import CONTENT_TYPE, Metrics
from disaggworker.model.load import Model, load
from disaggworker.pace import Pace

_BATCH_TOKENS = 512  # L_m where no pace says another
_BODY_BYTES = 32 << 20

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


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
        self.engine: Engine | None = None
        self.context = 0
        self._in_flight = 0
        self._fault: StartError | None = None
        self._kv_server: KVServer | None = None
        self._kv_client: KVClient | None = None
        self._handoffs: dict[Sequence, tuple[str, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------ life

    async def main(self) -> int:
        """Bind, load, serve, drain."""
        config = self.config
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._loaded = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._pulls = asyncio.Lock()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopping.set)
        if config.role == "prefill":
            self._kv_server = KVServer(config.pod_ip, config.kv_port, config.pairing_key, config.lease_s)
        else:
            self._kv_client = KVClient(config.pairing_key)
        app = web.Application(client_max_size=_BODY_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/state", self._state)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
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
        if self.engine:
            self.engine.close()
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
                pool = Pool(model.layers, model.kv_heads, model.head_dim, blocks, model.dtype, model.device)
            self._tokenizer = Tokenizer.from_file(str(config.weights / "tokenizer.json"))
            self._bytes = token_bytes(self._tokenizer)
            self._template = ChatTemplate(config.weights)
            longest = min(config.context_length or model.max_positions, model.max_positions)
            self.context = min(longest, blocks * BLOCK_TOKENS)
            scheduler = Scheduler(
                BlockManager(blocks),
                may_prefill=config.role == "prefill",
                may_decode=config.role == "decode",
                batch_tokens=self.pace.batch_tokens if self.pace else _BATCH_TOKENS,
                lanes=self.pace.times.pp if self.pace else 1,
            )
            engine = Engine(model, pool, scheduler, ends, self.pace, self._sink)
            engine.hold = self._hold
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
        if self._kv_server:
            self._kv_server.serve(pool)
        self.engine = engine
        self._loop.call_soon_threadsafe(self._loaded.set)
        engine.run()

    # ------------------------------------------------------------------------------ from the engine's thread

    def _call_soon(self, action: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(action)

    def _sink(self, events: list[Event]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, events)

    def _hold(self, sequence: Sequence) -> None:
        assert self._kv_server
        assert self.engine
        assert sequence.kv
        engine, handoff = self.engine, uuid.uuid4().hex
        self._handoffs[sequence] = handoff, sequence.kv.generation
        self._kv_server.hold(
            handoff,
            sequence.kv.generation,
            sequence.kv.blocks,
            sequence.prompt,
            lambda: engine.release(sequence),
        )

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
        serve = self._serve_prefill if self.config.role == "prefill" else self._serve_decode

        async def handle(request: web.Request) -> web.StreamResponse:
            self._in_flight += 1
            self._quiet.clear()
            try:
                if self._stopping.is_set() or self.engine is None:
                    what = "is stopping" if self._stopping.is_set() else "is still loading"
                    raise RequestError(f"This worker {what}.", status=503)
                ask = openai.read(await request.read(), chat=chat)
                return await serve(request, ask)
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

    def _identity(self, request: web.Request, ask: openai.Ask) -> str:
        given = request.headers.get("X-Request-Id") or uuid.uuid4().hex
        return ("chatcmpl-" if ask.chat else "cmpl-") + given

    def _spelling(self, token: int) -> bytes:
        spelt = self._bytes[token] if token < len(self._bytes) else b""
        return spelt or (self._tokenizer.id_to_token(token) or "").encode()

    def _prompt(self, ask: openai.Ask) -> list[int]:
        if ask.chat:
            text = self._template.render(ask.body.get("messages"))
            tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        else:
            prompt = ask.body.get("prompt")
            if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
                prompt = prompt[0]
            if isinstance(prompt, str):
                tokens = self._tokenizer.encode(prompt).ids
            elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
                tokens = prompt
            else:
                raise RequestError(
                    "prompt must be one string or one list of token ids; send several prompts as several requests.",
                    param="prompt",
                )
        param = "messages" if ask.chat else "prompt"
        if not tokens:
            raise RequestError("The prompt has no tokens.", param=param)
        if not all(0 <= token < len(self._bytes) for token in tokens):
            raise RequestError(
                f"The prompt holds token ids outside 0 to {len(self._bytes) - 1}.", param=param
            )
        if len(tokens) >= self.context:
            raise RequestError(
                f"The prompt has {len(tokens)} tokens; with at least one token of answer it must stay within the context of {self.context}.",
                param=param,
                code="context_length_exceeded",
            )
        return tokens

    def _limit(self, ask: openai.Ask, prompt_tokens: int) -> int:
        room = self.context - prompt_tokens
        return room if ask.max_tokens is None else min(ask.max_tokens, room)

    async def _serve_prefill(self, request: web.Request, ask: openai.Ask) -> web.StreamResponse:
        assert self.engine
        assert self._kv_server
        config, engine = self.config, self.engine
        if not ask.params.get("do_remote_decode"):
            raise RequestError(
                "kv_transfer_params.do_remote_decode must be true: this is a prefill worker.",
                param="kv_transfer_params",
            )
        prompt = self._prompt(ask)
        seed = ask.seed if ask.seed is not None else secrets.randbits(62)
        first: asyncio.Future[tuple[Token, str | None]] = self._loop.create_future()

        def on_token(token: Token, finish: str | None) -> None:
            if not first.done():
                first.set_result((token, finish))

        sequence = Sequence(
            prompt, dataclasses.replace(ask.sampling, seed=seed), self._limit(ask, len(prompt)), on_token
        )
        engine.submit(sequence)
        try:
            token, finish = await first
        except asyncio.CancelledError:
            engine.abort(sequence)
            # The abort may have come after the prefill: then a lease has begun.
            engine.post(lambda: self._drop(sequence))
            raise
        handoff, generation = self._handoffs.pop(sequence, ("", 0))
        piece = _shown(TextStream(self._bytes, ask.stops), token, finish)
        if piece.finish and handoff:
            self._kv_server.drop(handoff)
        metrics = self.metrics
        metrics.ttft.observe(sequence.first_token_s - sequence.arrived_s)
        metrics.queue.observe(sequence.scheduled_s - sequence.arrived_s)
        metrics.prefill.observe(sequence.first_token_s - sequence.scheduled_s)
        metrics.prompt_tokens.observe(len(prompt))
        given = Handoff(
            done=piece.finish is not None,
            first_token_id=token.id,
            first_logprobs=token.logprobs,
            text=piece.text,
            prompt_tokens=len(prompt),
            host=config.pod_ip,
            port=config.kv_port,
            handoff=handoff,
            generation=generation,
            pairing_key=config.pairing_key,
            seed=seed,
            gpu=self.pace.gpu.product if self.pace else "",
            rdma=self.pace.rdma if self.pace else False,
        )
        body = openai.answer(
            ask,
            self._identity(request, ask),
            int(time.time()),
            config.served_name,
            [piece],
            self._spelling,
            prompt_tokens=len(prompt),
            more={"kv_transfer_params": msgspec.to_builtins(given)},
        )
        return web.Response(body=body, content_type="application/json")

    def _drop(self, sequence: Sequence) -> None:
        handoff, _ = self._handoffs.pop(sequence, ("", 0))
        if handoff and self._kv_server:
            self._kv_server.drop(handoff)

    async def _serve_decode(self, request: web.Request, ask: openai.Ask) -> web.StreamResponse:
        assert self.engine
        engine = self.engine
        try:
            handoff = msgspec.convert(ask.params, Handoff)
        except msgspec.ValidationError as e:
            raise RequestError(
                f"kv_transfer_params is not what a prefill worker gave: {e}.", param="kv_transfer_params"
            ) from None
        if handoff.version != VERSION:
            raise RequestError(
                f"kv_transfer_params is of version {handoff.version}, not {VERSION}.",
                param="kv_transfer_params",
            )
        limit = self._limit(ask, handoff.prompt_tokens)
        if handoff.done or limit < 2 or handoff.prompt_tokens < 1:
            raise RequestError(
                "Nothing is left to decode: the first token ends this request.", param="kv_transfer_params"
            )
        if ask.sampling.logprobs is not None and handoff.first_logprobs is None:
            raise RequestError(
                "kv_transfer_params lacks the first token's logprobs: prefill was not asked for them.",
                param="kv_transfer_params",
            )
        reply = _Reply(self._bytes, ask, Token(handoff.first_token_id, handoff.first_logprobs))
        admitted: asyncio.Future[None] = self._loop.create_future()

        def admit() -> None:
            if not admitted.done():
                admitted.set_result(None)

        sequence = Sequence(
            [0] * handoff.prompt_tokens,
            dataclasses.replace(ask.sampling, seed=handoff.seed),
            limit,
            reply.on_token,
            output=[handoff.first_token_id],
            on_admitted=lambda: self._call_soon(admit),
        )
        engine.submit(sequence)
        try:
            await self._pull(handoff, sequence, admitted)
            identity, created = self._identity(request, ask), int(time.time())
            if ask.stream:
                frames = openai.Frames(ask, identity, created, self.config.served_name, self._spelling)
                return await self._stream(request, reply, frames, handoff)
            while not reply.finish:
                await reply.wait()
            body = openai.answer(
                ask,
                identity,
                created,
                self.config.served_name,
                reply.pieces,
                self._spelling,
                prompt_tokens=handoff.prompt_tokens,
            )
            return web.Response(body=body, content_type="application/json")
        finally:
            # Ended or not: a stop string ends what the engine would go on with, and so does a client that left.
            engine.abort(sequence)
            if reply.finish:
                self._observe(sequence, reply.tokens)

    def _observe(self, sequence: Sequence, tokens: int) -> None:
        metrics = self.metrics
        span = sequence.last_token_s - sequence.first_token_s
        metrics.queue.observe(sequence.scheduled_s - sequence.arrived_s)
        metrics.decode.observe(span)
        metrics.generation_tokens.observe(tokens)
        if tokens > 2:
            # The first token here is the answer's second.
            metrics.tpot.observe(span / (tokens - 2))

    async def _pull(self, handoff: Handoff, sequence: Sequence, admitted: asyncio.Future[None]) -> None:
        """Wait for blocks, fetch the KV into them, and tell the prefill worker. Raises `TransferError`."""
        assert self.engine
        assert self._kv_client
        client, engine = self._kv_client, self.engine
        renewing = self._loop.create_task(self._renew(handoff))
        try:
            waits: set[asyncio.Future[None]] = {admitted, renewing}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if renewing.done():
                await renewing
            await admitted
            # One transfer at a time into one instance, as its link has it.
            async with self._pulls:
                begun = self._loop.time()
                layout, frames = await client.pull(handoff)
                self._fits(layout, handoff)
                if self.pace and handoff.gpu:
                    whole_s = self.pace.transfer_s(handoff.prompt_tokens, handoff.gpu, handoff.rdma)
                    await asyncio.sleep(begun + whole_s - self._loop.time())
            engine.pulled(sequence, layout.tokens, frames)
        finally:
            renewing.cancel()
            # Arrived, or not wanted any more: the prefill worker needs its blocks either way.
            self._background(client.release(handoff))

    async def _renew(self, handoff: Handoff) -> None:
        """Keep the lease while the request waits here. Raises `TransferError`."""
        assert self._kv_client
        await asyncio.sleep(0.02)  # most requests are admitted at once, and need no word
        while True:
            await self._kv_client.renew(handoff)
            await asyncio.sleep(self.config.lease_s / 3)

    def _background(self, work: Awaitable[None]) -> None:
        async def quietly() -> None:
            # A prefill worker that is gone needs no release; one that did not hear it has its lease's end.
            with contextlib.suppress(TransferError):
                await work

        task = self._loop.create_task(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _fits(self, layout: Layout, handoff: Handoff) -> None:
        assert self.engine
        pool = self.engine.pool
        mine = (
            pool.layers,
            pool.kv_heads,
            pool.head_dim,
            BLOCK_TOKENS,
            str(pool.dtype).removeprefix("torch."),
        )
        theirs = (layout.layers, layout.kv_heads, layout.head_dim, layout.block_tokens, layout.dtype)
        tokens = len(layout.tokens)
        if mine != theirs or tokens != handoff.prompt_tokens or layout.blocks != blocks_for(tokens):
            raise TransferError(
                f"The prefill worker's KV is {theirs} for {tokens} tokens; this worker's is {mine} for {handoff.prompt_tokens}."
            )

    async def _stream(
        self, request: web.Request, reply: _Reply, frames: openai.Frames, handoff: Handoff
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        while not reply.finish:
            await reply.wait()
            data = b"".join([frames.token(piece) for piece in reply.take()])
            if reply.finish:
                data += frames.end(handoff.prompt_tokens, reply.tokens)
            await response.write(data)
        await response.write_eof()
        return response

    # ------------------------------------------------------------------------------ about itself

    async def _health(self, _: web.Request) -> web.Response:
        """Liveness: the process answers."""
        return web.json_response(
            {"status": "ok", "role": self.config.role, "emulated": self.pace is not None}
        )

    async def _ready(self, _: web.Request) -> web.Response:
        if self._stopping.is_set():
            return web.json_response({"status": "stopping"}, status=503)
        if self.engine is None:
            return web.json_response({"status": "loading"}, status=503)
        return web.json_response({"status": "ready"})

    def _counts(self) -> dict[str, int]:
        if self.engine is None:
            return {"waiting": 0, "running": 0, "free_blocks": 0, "total_blocks": 0}
        scheduler = self.engine.scheduler
        return {
            "waiting": len(scheduler.waiting) + len(scheduler.preempted),
            "running": self.engine.running,
            "free_blocks": scheduler.blocks.free,
            "total_blocks": scheduler.blocks.total,
        }

    async def _state(self, _: web.Request) -> web.Response:
        server = self._kv_server
        facts = {
            "role": self.config.role,
            **self._counts(),
            "leased_blocks": server.leased_blocks if server else 0,
            "emulated": self.pace is not None,
        }
        return web.json_response(facts)

    async def _metrics(self, _: web.Request) -> web.Response:
        counts, engine = self._counts(), self.engine
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
            "max_model_len": self.context or None,
        }
        return web.json_response({"object": "list", "data": [card]})


def _shown(stream: TextStream, token: Token, finish: str | None) -> openai.Piece:
    """What one more token shows. The engine's own "stop" is a token's, whose text is no part of the answer."""
    offset = stream.length
    text = "" if finish == "stop" else stream.push(token.id)
    if stream.stopped:
        finish = "stop"
    elif finish:
        text += stream.finish()
    return openai.Piece(token, text, offset, finish)


class _Reply:
    """A decode answer as it grows, on the event loop. It begins with the prefill worker's token."""

    def __init__(self, table: list[bytes], ask: openai.Ask, first: Token) -> None:
        self._stream = TextStream(table, ask.stops)
        self._waiter: asyncio.Future[None] | None = None
        begun = _shown(self._stream, first, None)
        # The router has streamed the first token.
        self.pieces = [] if ask.stream else [begun]
        self._streams = ask.stream
        self.tokens = 1
        self.finish: str | None = None

    def on_token(self, token: Token, finish: str | None) -> None:
        """One more token; none after the last."""
        if self.finish:
            return
        piece = _shown(self._stream, token, finish)
        self.tokens += 1
        self.finish = piece.finish
        self.pieces.append(piece)
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until there is something to take, or the end."""
        if not (self._streams and self.pieces) and not self.finish:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def take(self) -> list[openai.Piece]:
        """What came since the last time."""
        pieces, self.pieces = self.pieces, []
        return pieces

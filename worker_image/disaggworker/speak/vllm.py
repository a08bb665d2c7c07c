"""`disaggworker --speak vllm serve MODEL …`: our engine behind vLLM's front (NixlConnector, `kv_both`; REFERENCE § 7).

Faithful where a router or an operator depends on it, in the bad as well: KV that is fetched after its lease gives wrong tokens
and HTTP 200, a prompt that is longer than what was prefilled ends the server, and /health says 200 while it drains.

What it does not do: prefix caching, chunked prefill, what our engine refuses (`openai.read`), chat with tools.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence as Many
from typing import Any

import msgspec
import torch
import uvloop
from aiohttp import web

from disaggserve import metric_names as names
from disaggserve.protocol import Handoff
from disaggworker import openai
from disaggworker.engine.detokenize import TextStream
from disaggworker.engine.engine import Engine, Event
from disaggworker.engine.parallel.stage import total_blocks
from disaggworker.engine.runner import Runner
from disaggworker.engine.scheduler import Scheduler
from disaggworker.engine.sequence import Sequence, Token
from disaggworker.errors import HandoffGone, RequestError, StartError, TransferError, WorkerError
from disaggworker.kv.blocks import BLOCK_TOKENS, BlockManager, blocks_for
from disaggworker.kv.pool import Pool
from disaggworker.kv.pull import KVClient, Puller
from disaggworker.kv.serve import KVServer
from disaggworker.metrics import CONTENT_TYPE
from disaggworker.model.load import load
from disaggworker.pace import Pace
from disaggworker.speak import flags
from disaggworker.speak.figures import Figures
from disaggworker.speak.flags import Settings
from disaggworker.worker.instance import Instance
from disaggworker.worker.text import Text, shown

_BODY_BYTES = 32 << 20
_RENEWALS = 6  # in one lease, as the real one has it
_KINDS = {400: "BadRequestError", 404: "NotFoundError"}
_FAILED = "Internal server error"
_REMOTE = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids")


def main() -> int:
    """As `vllm`, for whoever starts a container whose program that is."""
    try:
        return run(sys.argv[1:])
    except WorkerError as e:
        print(e, file=sys.stderr)
        return 1


def run(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises `StartError`."""
    code: int = uvloop.run(Server(flags.read(argv)).main())
    return code


class _Failed(Exception):
    """vLLM says no more than that."""


class _Answer:
    """Tokens of one request as they come, on the event loop."""

    def __init__(self, table: list[bytes], ask: openai.Ask) -> None:
        self._stream = TextStream(table, ask.stops)
        self._new = asyncio.Event()
        self._pieces: list[openai.Piece] = []
        self.all: list[openai.Piece] = []
        self.finish: str | None = None

    def on_token(self, token: Token, finish: str | None) -> None:
        """One more token; none after the last."""
        if not self.finish:
            piece = shown(self._stream, token, finish)
            self.finish = piece.finish
            self._pieces.append(piece)
            self.all.append(piece)
            self._new.set()

    async def take(self) -> list[openai.Piece]:
        """What came since the last time, at least one."""
        await self._new.wait()
        self._new.clear()
        pieces, self._pieces = self._pieces, []
        return pieces


class Server:
    """One instance."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._config = settings, settings.worker
        self._pace = Pace.of(self._config)
        self._figures = Figures(self._config.served_name)
        self._id = str(uuid.uuid4())
        self._engine: Engine | None = None
        self._fault: StartError | None = None
        self._in_flight = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._handoffs: dict[Sequence, str] = {}
        self._failed_pulls = 0

    # ------------------------------------------------------------------------------ life

    async def main(self) -> int:
        """Load, bind, serve, drain. As with the real one, nothing listens before the model is there."""
        config = self._config
        self._loop = asyncio.get_running_loop()
        self._stopping, loaded = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopping.set)
        host, port = self._settings.side_channel
        self._kv_server = KVServer(host, port, self._settings.fingerprint, config.lease_s)
        self._kv_client = KVClient(self._settings.fingerprint)
        self._pulls = asyncio.Lock()
        thread = threading.Thread(target=self._compute, args=(loaded,), name="engine", daemon=True)
        thread.start()
        await loaded.wait()
        if self._fault:
            raise self._fault
        app = web.Application(client_max_size=_BODY_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", lambda r: self._handle(r, chat=False))
        app.router.add_post("/v1/chat/completions", lambda r: self._handle(r, chat=True))
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, self._settings.host, config.port, backlog=1024).start()
        await self._stopping.wait()
        if self._settings.shutdown_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.shutdown_s):
                    await self._quiet.wait()
                    while self._kv_server.leased:
                        await asyncio.sleep(0.05)
        await runner.cleanup()
        assert self._engine
        self._engine.close()
        await asyncio.to_thread(thread.join)
        self._kv_server.close()
        await self._kv_client.close()
        return 0

    def _compute(self, loaded: asyncio.Event) -> None:
        """The engine's thread, from loading to the end."""
        config = self._config
        try:
            torch.set_num_threads(1)
            with torch.inference_mode():
                model, ends = load(config.weights, config.dtype)
                blocks = total_blocks(config, self._pace, model)
                pool = Pool(model.layers, model.kv_heads, model.head_dim, blocks, model.dtype, model.device)
                longest = min(config.context_length or model.max_positions, model.max_positions)
                self._text = Text(config.weights, min(longest, blocks * BLOCK_TOKENS))
                self._scheduler = Scheduler(
                    BlockManager(blocks),
                    batch_tokens=self._settings.batch_tokens,
                    lanes=self._pace.times.pp if self._pace else 1,
                )
                engine = Engine(Runner(model, pool), self._scheduler, ends, self._pace, self._sink)
                engine.hold = self._keep
                engine.warm_up()
        except StartError as e:
            self._fault = e
        except Exception as e:
            # tokenizers and torch raise plain Exceptions for unreadable files and for memory.
            self._fault = StartError(f"{config.weights} cannot be served: {e}")
        else:
            self._kv_server.serve(pool)
            self._kv_client.puller = Puller(self._settings.fingerprint, pool)
            self._engine = engine
        self._loop.call_soon_threadsafe(loaded.set)
        if self._engine:
            self._engine.run()

    def _sink(self, events: list[Event]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[Event]) -> None:
        now = time.monotonic()
        for sequence, token, finish in events:
            if (gap_s := sequence.deliver(token, finish, now)) is not None:
                self._figures.times[names.VLLM_INTER_TOKEN].observe(gap_s)

    def _keep(self, sequence: Sequence) -> None:
        """In the engine's thread: the prompt is computed, and its blocks wait for a pull."""
        assert sequence.kv
        assert self._engine
        engine, handoff = self._engine, f"{uuid.uuid4().hex}"
        self._handoffs[sequence] = handoff
        self._kv_server.hold(
            handoff, 0, sequence.kv.blocks, sequence.prompt, lambda: engine.release(sequence)
        )

    # ------------------------------------------------------------------------------ requests

    async def _handle(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        self._in_flight += 1
        self._quiet.clear()
        try:
            ask, params = self._read(await request.read(), chat=chat)
            if self._stopping.is_set():
                return await self._let_go(request, ask)
            if params.get("do_remote_decode"):
                return await self._for_another(request, ask)
            if params.get("do_remote_prefill") and params.get("remote_block_ids"):
                if not all(params.get(k) is not None for k in _REMOTE):
                    params = {}  # a warning in the log, and the prompt is computed here
            else:
                params = {}
            return await self._whole(request, ask, params)
        except RequestError as e:
            param = "input_tokens" if e.code == "context_length_exceeded" else e.param
            return _refused(str(e), e.status, param)
        except (_Failed, TransferError):
            return _refused(_FAILED, 500, None)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._quiet.set()

    def _read(self, data: bytes, *, chat: bool) -> tuple[openai.Ask, dict[str, Any]]:
        try:
            body = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise RequestError(f"The body is not JSON: {e}.") from None
        if not isinstance(body, dict):
            raise RequestError("The body must be a JSON object.")
        params = body.get("kv_transfer_params")
        if params is not None and not isinstance(params, dict):
            raise RequestError("kv_transfer_params must be an object.", param="kv_transfer_params")
        ask = openai.read(msgspec.json.encode({**body, "kv_transfer_params": {}}), chat=chat)
        model = body.get("model")
        if model is not None and model != self._config.served_name:
            raise RequestError(f"The model `{model}` does not exist.", status=404, param="model")
        return ask, params or {}

    async def _for_another(self, request: web.Request, ask: openai.Ask) -> web.StreamResponse:
        """One token, and the KV kept for whoever asks for it within the lease."""
        assert self._engine
        engine, text = self._engine, self._text
        prompt, answer = text.prompt(ask), _Answer(text.bytes, ask)
        # The first token must not end it, whatever it is: the KV is wanted all the same.
        sampling = dataclasses.replace(ask.seeded(), ignore_eos=True, stop_ids=frozenset())
        sequence = Sequence(
            prompt, sampling, 2, lambda token, _: answer.on_token(token, "length"), hand_off=True
        )
        engine.submit(sequence)
        try:
            pieces = await answer.take()
        except asyncio.CancelledError:
            engine.abort(sequence)
            engine.post(lambda: self._kv_server.drop(self._handoffs.pop(sequence, "")))
            raise
        handoff = self._handoffs.pop(sequence)
        self._observe(sequence, len(prompt), 1)
        self._figures.local_tokens += len(prompt)
        host, port = self._settings.side_channel
        given: dict[str, Any] = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(blocks_for(len(prompt))))],
            "remote_engine_id": self._id,
            "remote_request_id": handoff,
            "remote_host": host,
            "remote_port": port,
            "tp_size": self._config.tp,
            "dcp_size": 1,
            "pp_size": self._config.pp,
            "remote_num_tokens": len(prompt),
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": 0,
        }
        if self._pace:
            given["emulated"] = {"gpu": self._pace.gpu.product, "rdma": self._pace.rdma}
        return self._answered(request, ask, sequence, pieces, len(prompt), given)

    async def _whole(
        self, request: web.Request, ask: openai.Ask, params: dict[str, Any]
    ) -> web.StreamResponse:
        """A whole answer; `params`: where the prompt's KV is, empty to compute it."""
        assert self._engine
        engine, text = self._engine, self._text
        prompt, answer = text.prompt(ask), _Answer(text.bytes, ask)
        limit = text.limit(ask, len(prompt))
        if not params:
            sequence = Sequence(prompt, ask.seeded(), limit, answer.on_token)
            engine.submit(sequence)
            fetched = None
        else:
            if blocks_for(len(prompt)) > len(params["remote_block_ids"][0]):
                print(
                    "The prompt has more blocks than were prefilled: vLLM's engine dies of it.",
                    file=sys.stderr,
                )
                os._exit(1)
            admitted: asyncio.Future[None] = self._loop.create_future()

            def admit() -> None:
                self._loop.call_soon_threadsafe(_resolve, admitted)

            # All but the last token's KV is fetched; that one is computed here, which gives the answer's first.
            sequence = Sequence(
                prompt[:-1],
                ask.seeded(),
                limit + 1,
                answer.on_token,
                output=[prompt[-1]],
                on_admitted=admit,
            )
            engine.submit(sequence)
            fetched = self._fetch(params, sequence, admitted)
        try:
            if ask.stream:
                return await self._stream(request, ask, sequence, answer, len(prompt), fetched)
            if fetched:
                await fetched
            while not answer.finish:
                await answer.take()
            return self._answered(request, ask, sequence, answer.all, len(prompt), None)
        finally:
            engine.abort(sequence)
            if fetched:
                fetched.close()
            if answer.finish:
                self._observe(sequence, len(prompt), len(answer.all))
            if answer.all and not params:
                self._figures.local_tokens += len(prompt)

    async def _fetch(
        self, params: dict[str, Any], sequence: Sequence, admitted: asyncio.Future[None]
    ) -> None:
        """Raises `_Failed`."""
        assert self._engine
        engine, client = self._engine, self._kv_client
        said = params.get("emulated") or {}
        handoff = Handoff(
            done=False,
            first_token_id=0,
            text="",
            prompt_tokens=sequence.length,
            host=str(params["remote_host"]),
            port=int(params["remote_port"]),
            handoff=str(params["remote_request_id"]),
            generation=0,
            pairing_key="",
            seed=0,
            lease_s=self._config.lease_s,
        )
        prompt: list[int] | None = None
        renewing = self._loop.create_task(self._renew(handoff))
        try:
            await admitted
            async with self._pulls:
                begun = self._loop.time()
                assert sequence.kv is not None
                await client.pull(handoff, sequence.kv.blocks[: blocks_for(sequence.length)])
                if self._pace and said:
                    whole_s = self._pace.transfer_s(sequence.length, said["gpu"], said["rdma"])
                    await asyncio.sleep(begun + whole_s - self._loop.time())
            prompt = sequence.prompt
            self._figures.pulled_tokens += sequence.length
        except HandoffGone:
            # vLLM reads the blocks all the same, whoever has them by now.
            prompt = sequence.prompt
            self._figures.pulled_tokens += sequence.length
        except TransferError as e:
            self._failed_pulls += 1
            print(f"A pull failed: {e}", file=sys.stderr)
            raise _Failed from e
        finally:
            renewing.cancel()
            engine.pulled(sequence, prompt)
            self._kv_client.release_soon(handoff)

    async def _renew(self, handoff: Handoff) -> None:
        with contextlib.suppress(TransferError):
            while True:
                await asyncio.sleep(self._config.lease_s / _RENEWALS)
                await self._kv_client.renew(handoff)

    # ------------------------------------------------------------------------------ answers

    def _answered(
        self,
        request: web.Request,
        ask: openai.Ask,
        sequence: Sequence,
        pieces: Many[openai.Piece],
        prompt_tokens: int,
        given: dict[str, Any] | None,
    ) -> web.Response:
        first_ms = 1e3 * (sequence.first_token_s - sequence.arrived_s)
        body = openai.answer(
            ask,
            Instance.identity(request, ask),
            int(time.time()),
            self._config.served_name,
            pieces,
            self._text.spelling,
            prompt_tokens=prompt_tokens,
            more={"kv_transfer_params": given, "metrics": {"time_to_first_token_ms": first_ms}},
        )
        return web.Response(body=body, content_type="application/json")

    async def _let_go(self, request: web.Request, ask: openai.Ask) -> web.StreamResponse:
        """What a server that drains says to a new request."""
        prompt = self._text.prompt(ask)
        if not ask.stream:
            gone = openai.Piece(Token(0), "", 0, "abort")
            body = msgspec.json.decode(
                openai.answer(
                    dataclasses.replace(ask, token_ids=False),
                    Instance.identity(request, ask),
                    int(time.time()),
                    self._config.served_name,
                    [gone],
                    self._text.spelling,
                    prompt_tokens=len(prompt),
                    more={"kv_transfer_params": None},
                )
            )
            body["usage"] = openai.usage(len(prompt), 0)
            return web.json_response(body)
        frames = openai.Frames(
            ask,
            Instance.identity(request, ask),
            int(time.time()),
            self._config.served_name,
            self._text.spelling,
        )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await response.write(frames.end(len(prompt), 0))
        await response.write_eof()
        return response

    async def _stream(
        self,
        request: web.Request,
        ask: openai.Ask,
        sequence: Sequence,
        answer: _Answer,
        prompt_tokens: int,
        fetched: Any,
    ) -> web.StreamResponse:
        """Headers at once: what fails after them is a frame."""
        frames = openai.Frames(
            ask,
            Instance.identity(request, ask),
            int(time.time()),
            self._config.served_name,
            self._text.spelling,
        )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        try:
            if fetched:
                await fetched
            while not answer.finish:
                data = b"".join([frames.token(piece) for piece in await answer.take()])
                if answer.finish:
                    data += frames.end(prompt_tokens, len(answer.all))
                await response.write(data)
        except _Failed:
            await response.write(b"data: " + _error(_FAILED, 500, None) + b"\n\ndata: [DONE]\n\n")
        await response.write_eof()
        return response

    def _observe(self, sequence: Sequence, prompt_tokens: int, tokens: int) -> None:
        times, lengths = self._figures.times, self._figures.lengths
        span = sequence.last_token_s - sequence.first_token_s
        times[names.VLLM_TTFT].observe(sequence.first_token_s - sequence.arrived_s)
        times[names.VLLM_QUEUE_TIME].observe(sequence.scheduled_s - sequence.arrived_s)
        times[names.VLLM_PREFILL_TIME].observe(sequence.first_token_s - sequence.scheduled_s)
        times[names.VLLM_DECODE_TIME].observe(span)
        lengths[names.VLLM_PROMPT_TOKENS].observe(prompt_tokens)
        lengths[names.VLLM_GENERATION_TOKENS].observe(tokens)
        if tokens > 1:
            times[names.VLLM_TPOT].observe(span / (tokens - 1))

    # ------------------------------------------------------------------------------ about itself

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, _: web.Request) -> web.Response:
        assert self._engine
        engine, scheduler, server = self._engine, self._scheduler, self._kv_server
        blocks = scheduler.blocks
        numbers: dict[str, float] = {
            names.VLLM_RUNNING: engine.running,
            names.VLLM_WAITING: engine.waiting,
            names.VLLM_KV_USAGE: 1 - blocks.free / blocks.total,
            names.VLLM_PREEMPTIONS: scheduler.preemptions,
            names.VLLM_KV_EXPIRED: server.leases.expired,
            names.VLLM_KV_LATE: server.late,
            names.VLLM_KV_FAILED: self._failed_pulls,
            names.WORKER_EMULATED: int(self._pace is not None),
            names.WORKER_STEPS: engine.steps,
            names.WORKER_LATE_STEPS: engine.late_steps,
        }
        return web.Response(text=self._figures.text(numbers), headers={"Content-Type": CONTENT_TYPE})

    async def _models(self, _: web.Request) -> web.Response:
        card = {
            "id": self._config.served_name,
            "object": "model",
            "owned_by": "vllm",
            "root": str(self._config.weights),
            "max_model_len": self._text.context,
        }
        return web.json_response({"object": "list", "data": [card]})


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _error(message: str, status: int, param: str | None) -> bytes:
    kind = _KINDS.get(status, "InternalServerError")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})


def _refused(message: str, status: int, param: str | None) -> web.Response:
    return web.Response(status=status, body=_error(message, status, param), content_type="application/json")

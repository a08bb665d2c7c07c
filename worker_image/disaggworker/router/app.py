"""The router's HTTP side: what is served where, and how one process starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from disaggserve import metric_names as names
from disaggworker.router import errors, metrics
from disaggworker.router.admission import Admission
from disaggworker.router.config import Config
from disaggworker.router.fleet import Fleet, Seen
from disaggworker.router.loads import Loads
from disaggworker.router.metrics import Metrics
from disaggworker.router.proxy import Proxy
from disaggworker.router.upstream import Upstreams

log = logging.getLogger(__name__)


class Router:
    """One router: its fleet, its figures and its routes. `update` is told who the instances are."""

    def __init__(self, config: Config, upstreams: Upstreams) -> None:
        self.config = config
        self.fleet = Fleet()
        self.loads = Loads(self.fleet, upstreams)
        self.admission = Admission(self.fleet, config.max_queued, config.queue_timeout_s)
        self.metrics = Metrics(
            names.resource_label(config.namespace, config.resource), config.ttft_s, config.tpot_s
        )
        self.proxy = Proxy(config, self.fleet, self.admission, self.metrics, upstreams)
        self._created_s = int(time.time())

    def update(self, view: Iterable[Seen]) -> None:
        before = self.fleet.lacking()
        self.fleet.update(view)
        self.loads.update()
        after = self.fleet.lacking()
        if before != after:
            log.info("%s", f"not ready: {after}" if after else "ready")
        self.admission.wake()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=self.config.max_body_bytes, middlewares=[_openai_errors])
        app.add_routes(
            [
                web.post("/v1/completions", self.proxy.completions),
                web.post("/v1/chat/completions", self.proxy.chat),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{id:.+}", self._model),
                web.get("/drain", self._drain),
                web.get("/ready", self._ready),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
            ]
        )
        return app

    async def finish(self) -> None:
        """After SIGTERM: new requests are still taken while endpoints lag behind, then what is in flight ends."""
        self.proxy.closing = True
        await asyncio.sleep(self.config.linger_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.grace_s):
                await self.proxy.idle()

    async def _models(self, _: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._card()]})

    async def _model(self, http: web.Request) -> web.Response:
        asked = http.match_info["id"]
        if asked != self.config.model_name:
            raise errors.UnknownModel(
                f"model {asked!r} is not served here; {self.config.model_name!r} is", "model"
            )
        return _json(self._card())

    def _card(self) -> dict[str, object]:
        return {
            "id": self.config.model_name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "disaggserve",
            "max_model_len": self.config.context_length,
        }

    async def _drain(self, _: web.Request) -> web.Response:
        return _json({"instances": self.fleet.drain_view()})

    async def _ready(self, _: web.Request) -> web.Response:
        why = "the router is shutting down" if self.proxy.closing else self.fleet.lacking()
        return _json({"ready": why is None, "reason": why}, 200 if why is None else 503)

    async def _health(self, _: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def _metrics(self, _: web.Request) -> web.Response:
        text = self.metrics.expose(self.fleet.instances(), self.admission.queued)
        return web.Response(body=text, headers={"Content-Type": metrics.CONTENT_TYPE})


@contextlib.asynccontextmanager
async def serving(config: Config) -> AsyncIterator[Router]:
    """A router that listens; the block's end stops it at once (call `finish` before)."""
    upstreams = Upstreams(config.connect_timeout_s, uuid.uuid4().hex)
    router = Router(config, upstreams)
    runner = web.AppRunner(router.app(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, config.host, config.port, backlog=1024).start()
        log.info("listening on %s:%d", config.host, config.port)
        yield router
    finally:
        router.loads.close()
        await runner.cleanup()
        upstreams.close()


def settle() -> None:
    """For a process that does nothing else. What is loaded by now stays: no collection need walk it again (60,000 objects, 40 ms)
    while every stream waits."""
    gc.collect()
    gc.freeze()


@web.middleware
async def _openai_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refusals by path (no such path, wrong method, other model) in OpenAI's shape."""
    try:
        return await handler(request)
    except errors.ApiError as error:
        return error.response()
    except web.HTTPException as error:
        if error.status < 400:
            raise
        message = f"{request.method} {request.path}: {error.reason}"
        return errors.response(error.status, errors.error_body(message, errors.ApiError.kind))


def _json(value: object, status: int = 200) -> web.Response:
    return errors.response(status, msgspec.json.encode(value))

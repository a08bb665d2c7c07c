"""The hand-off: a request goes to prefill, its first token to the client, the rest from decode to the client.

Two steps, as vLLM's disaggregated serving has them (REFERENCE § 7). An instance that fails before the client has more than
the first token costs the request time and nothing else: it is tried again elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from disaggserve import metric_names as names
from disaggworker.router import errors, frames, vllm
from disaggworker.router.admission import Admission
from disaggworker.router.config import Config
from disaggworker.router.fleet import Fleet, Hold, Instance
from disaggworker.router.metrics import Metrics
from disaggworker.router.request import Request, request_id

log = logging.getLogger(__name__)

ATTEMPTS = 4
_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class Lost(Exception):
    """An attempt came to nothing, and not by the request's fault.

    `instance` failed it (None: there was none), by what it `answered`, or without a whole answer.
    """

    def __init__(self, instance: Instance | None, why: str, *, answered: bool = False) -> None:
        self.instance, self.answered = instance, answered
        super().__init__(why)


class ClientGone(Exception):
    """The client closed its connection."""


class Proxy:
    """Serves requests; one per process."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        admission: Admission,
        metrics: Metrics,
        session: aiohttp.ClientSession,
    ) -> None:
        self.config, self.fleet, self.admission = config, fleet, admission
        self.metrics, self.session = metrics, session
        self.clock = asyncio.get_running_loop().time
        self.active: set[str] = set()
        self.closing = False  # SIGTERM has come: connections are not kept alive
        self._idle = asyncio.Event()
        self._idle.set()

    async def completions(self, http: web.Request) -> web.StreamResponse:
        return await self._serve(http, chat=False)

    async def chat(self, http: web.Request) -> web.StreamResponse:
        return await self._serve(http, chat=True)

    async def idle(self) -> None:
        """Until no request is in flight."""
        await self._idle.wait()

    async def _serve(self, http: web.Request, *, chat: bool) -> web.StreamResponse:
        arrived_s = self.clock()
        id = request_id(http.headers.get("X-Request-Id"))
        if id in self.active:
            id = request_id(None)  # engines know a request by its id: two of one id would meet there
        try:
            request = Request(await self._read(http), chat=chat, model_name=self.config.model_name, id=id)
        except errors.ApiError as error:
            self.metrics.end(names.REJECTED)
            return self.headed(error.response(), id)
        self.metrics.arrive(arrived_s)
        try:
            self.admission.enter()
        except errors.QueueFull as error:
            self.metrics.end(names.REFUSED)
            return self.headed(error.response(), id)
        self.active.add(id)
        self._idle.clear()
        exchange = Exchange(self, http, request, arrived_s)
        try:
            return await exchange.answer()
        finally:
            self.active.discard(id)
            if not self.active:
                self._idle.set()
            exchange.end()

    async def _read(self, http: web.Request) -> bytes:
        most = self.config.max_body_bytes
        if (http.content_length or 0) > most:
            raise errors.TooLarge(f"the body has {http.content_length} bytes; at most {most} are taken")
        try:
            return await http.read()
        except web.HTTPRequestEntityTooLarge:
            raise errors.TooLarge(f"the body has more than {most} bytes") from None
        except (web.RequestPayloadError, aiohttp.ClientPayloadError) as error:
            raise errors.WrongRequest(f"the body did not come whole: {error}") from None

    def headed(self, response: web.Response, id: str) -> web.Response:
        response.headers["X-Request-Id"] = id
        if self.closing:
            response.force_close()
        return response


class Exchange:
    """One request on its way, over as many attempts as it takes."""

    def __init__(self, proxy: Proxy, http: web.Request, request: Request, arrived_s: float) -> None:
        self._proxy, self._http, self._request = proxy, http, request
        self._fleet, self._clock = proxy.fleet, proxy.clock
        self._arrived_s = arrived_s
        self._first_s = self._last_s = 0.0
        self._queued = True
        self._client: web.StreamResponse | None = None  # once its stream has begun
        self._sent: object = None  # the first token that the client has
        self._uncached = 0
        self._output_tokens = 0
        self.outcome = names.FAILED

    async def answer(self) -> web.StreamResponse:
        """What the client gets, errors included."""
        try:
            try:
                return await self._run()
            except errors.Passed as refused:
                if self._client is None:
                    self.outcome = names.REJECTED
                return await self._fail(errors.response(refused.status, refused.body), refused.body)
            except errors.ApiError as error:
                log.warning("request %s failed: %s", self._request.id, error)
                if isinstance(error, errors.NoInstance) and self._client is None:
                    self.outcome = names.REFUSED
                response = error.response()
                return await self._fail(response, error.body())
        except ClientGone:
            self._cancelled()
            return self._client or web.Response(status=499)  # to nobody
        except asyncio.CancelledError:
            self._cancelled()
            raise

    def end(self) -> None:
        """Into the metrics; once, whatever happened."""
        self._leave_queue()
        metrics = self._proxy.metrics
        if self.outcome != names.OK:
            metrics.end(self.outcome)
            return
        metrics.uncached_tokens += self._uncached
        metrics.answer(
            self._request.input_tokens,
            self._output_tokens,
            self._first_s - self._arrived_s,
            self._last_s - self._first_s,
        )

    def _cancelled(self) -> None:
        if self.outcome != names.OK:  # a client may hang up as soon as it has read the last frame
            self.outcome = names.CANCELLED

    def _leave_queue(self) -> None:
        if self._queued:
            self._queued = False
            self._proxy.admission.leave()

    async def _fail(self, response: web.Response, body: bytes) -> web.StreamResponse:
        """The error as the answer, or as the last frames of a stream that has begun."""
        if self._client is None:
            return self._proxy.headed(response, self._request.id)
        with contextlib.suppress(ClientGone):  # it failed before the client went
            await self._write(self._client, b"data: " + body + b"\n\n" + frames.DONE)
            await self._finish(self._client)
        return self._client

    async def _run(self) -> web.StreamResponse:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._attempt()
            except Lost as lost:
                log.warning("request %s, attempt %d: %s", self._request.id, attempt, lost)
                if lost.instance is not None:
                    self._fault(lost.instance, answered=lost.answered)
                if self._client is not None and not self._request.repeatable:
                    raise errors.InstanceFailed(
                        f"an instance failed after the first token of an answer that is sampled anew each time: {lost}"
                    ) from lost
                why = str(lost)
        raise errors.InstanceFailed(f"{ATTEMPTS} attempts failed, the last one so: {why}")

    # ------------------------------------------------------------------------------------- one attempt

    async def _attempt(self) -> web.StreamResponse:
        instance = await self._proxy.admission.prefill()
        speaks_vllm = instance.seen.engine == vllm.NAME
        hold = Hold(instance, queued_tokens=self._request.input_tokens)
        try:
            if speaks_vllm:
                vllm.refuse(self._request.body)
            answer = await self._prefill(instance)
            hold.answered()
            self._take(instance, answer, first=not speaks_vllm)
            params = answer["kv_transfer_params"]
            if speaks_vllm:
                return await self._decode_vllm(hold, params)
            done = params.get("done") is True
            if self._request.stream:
                await self._send_first(answer, done)
            if done:
                return await self._end_at_first(answer)
            return await self._decode(hold, params)
        finally:
            hold.end()

    async def _prefill(self, instance: Instance) -> dict[str, Any]:
        try:
            request = self._request
            speaks_vllm = instance.seen.engine == vllm.NAME
            body = vllm.for_prefill(request.body, chat=request.chat) if speaks_vllm else request.for_prefill()
            async with self._post(instance, body) as upstream:
                data = await upstream.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Lost(instance, f"{instance} failed: {_said(error)}") from error
        self._judge(instance, upstream.status, data)
        try:
            answer = msgspec.json.decode(data)
            choice = answer["choices"][0]
            _ = choice["message"]["content"] if self._request.chat else choice["text"]
            if type(answer["usage"]["prompt_tokens"]) is not int:
                raise TypeError("usage.prompt_tokens is no number")
            if not isinstance(answer["kv_transfer_params"], dict):
                raise TypeError("kv_transfer_params is no object")
        except (msgspec.DecodeError, LookupError, TypeError) as error:
            raise Lost(
                instance,
                f"{instance} answered with no first token and KV parameters: {error!r}",
                answered=True,
            ) from error
        return answer  # type: ignore[no-any-return]

    def _take(self, instance: Instance, answer: dict[str, Any], *, first: bool) -> None:
        """Prefill's answer is here: the `first` token, unless decode's own is, and the truth about the prompt's length."""
        self._fleet.worked(instance)
        self._leave_queue()
        if first and not self._first_s:
            self._first_s = self._last_s = self._clock()
        usage = answer["usage"]
        self._request.input_tokens = usage["prompt_tokens"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self._uncached = max(0, usage["prompt_tokens"] - cached)

    async def _send_first(self, answer: dict[str, Any], done: bool) -> None:
        """The first token, at once; after a failure, only the assurance that it is the one that was sent."""
        request = self._request
        choice = answer["choices"][0]
        token = choice.get("token_ids") or (choice["message"]["content"] if request.chat else choice["text"])
        if self._client is not None:
            if (token, done) != self._sent:
                raise errors.InstanceFailed(
                    "an instance failed after the first token, and sampling it again gave another"
                )
            return
        client = self._client = await self._begin()
        self._sent = token, done
        await self._write(
            client,
            frames.first(
                answer,
                chat=request.chat,
                finish=done,
                usage=request.include_usage,
                token_ids=request.wants_token_ids,
            ),
        )

    async def _end_at_first(self, answer: dict[str, Any]) -> web.StreamResponse:
        request = self._request
        self._output_tokens = 1
        if self._client is not None:
            end = frames.last(answer, chat=request.chat, usage=request.include_usage)
            await self._write(self._client, end)
            self.outcome = names.OK
            return await self._finish(self._client)
        self.outcome = names.OK
        del answer["kv_transfer_params"]
        if not request.wants_token_ids:
            answer["choices"][0].pop("token_ids", None)
        return self._proxy.headed(errors.response(200, msgspec.json.encode(answer)), request.id)

    async def _decode(self, lease: Hold, params: dict[str, Any]) -> web.StreamResponse:
        key = lease.instance.seen.pairing_key
        body = self._request.for_decode(params)
        while True:
            instance = self._fleet.decode(key, self._clock())
            if instance is None:
                raise Lost(None, f"no decode instance of pairing key {key} is ready")
            hold = Hold(instance, kv_tokens=self._request.input_tokens + 1)
            try:
                async with self._post(instance, body) as upstream:
                    if upstream.status != 200:
                        self._judge(instance, upstream.status, await upstream.read())
                    lease.end()  # headers come only after the pull
                    if self._client is None:
                        return await self._pass_answer(instance, upstream)
                    return await self._pass_stream(self._client, instance, upstream, hold)
            except aiohttp.ClientConnectorError as error:
                # It never saw the request, so the KV is still on prefill, for another decode.
                log.warning("request %s: %s", self._request.id, _said(error))
                self._fault(instance)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise Lost(instance, f"{instance} failed: {_said(error)}") from error
            finally:
                hold.end()

    async def _decode_vllm(self, lease: Hold, params: dict[str, Any]) -> web.StreamResponse:
        """The rest of vLLM's two steps. Until decode's first token is here, whatever fails costs the client only time."""
        prefill, request = lease.instance, self._request
        key, answered_s = prefill.seen.pairing_key, self._clock()
        body = vllm.for_decode(request.body, params)
        while True:
            if vllm.late(self._clock() - answered_s):
                raise Lost(None, f"no decode instance took the request before {prefill} let go of its KV")
            instance = self._fleet.decode(key, self._clock())
            if instance is None:
                raise Lost(None, f"no decode instance of pairing key {key} is ready")
            hold = Hold(instance, kv_tokens=request.input_tokens + 1)
            sent_s = self._clock()
            try:
                async with self._post(instance, body) as upstream:
                    if upstream.status != 200:
                        self._judge(instance, upstream.status, await upstream.read())
                    if request.stream:
                        return await self._vllm_stream(lease, hold, upstream, answered_s)
                    data = await upstream.read()
                try:
                    answer = msgspec.json.decode(data)
                    self._output_tokens = int(answer["usage"]["completion_tokens"])
                    own_s = vllm.first_token_s(answer)
                except (msgspec.DecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
                    raise Lost(
                        instance, f"{instance} answered without usage: {error!r}", answered=True
                    ) from error
                if vllm.aborted(answer):
                    raise Lost(instance, f"{instance} is ending, and let go of the request", answered=True)
                self._last_s = self._clock()
                # One that does not say when its first token came may have had it as late as its last.
                self._first_s = self._last_s if own_s is None else sent_s + own_s
                if vllm.late(self._first_s - answered_s):
                    raise Lost(None, f"{instance} came for its KV after {prefill} had let go of it")
                self._fleet.worked(instance)
                self.outcome = names.OK
                return self._proxy.headed(errors.response(200, data), request.id)
            except aiohttp.ClientConnectorError as error:
                # It never saw the request, so the KV is still on prefill, for another decode.
                log.warning("request %s: %s", request.id, _said(error))
                self._fault(instance)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise Lost(instance, f"{instance} failed: {_said(error)}") from error
            finally:
                hold.end()

    async def _vllm_stream(
        self, lease: Hold, hold: Hold, upstream: aiohttp.ClientResponse, answered_s: float
    ) -> web.StreamResponse:
        """The headers come before the pull, and say nothing; the first token does."""
        instance, request = hold.instance, self._request
        stream = vllm.Frames(keep_usage=request.include_usage)
        seen = 0
        try:
            async with asyncio.timeout_at(answered_s + vllm.LATE_S) as patience:
                async for chunk in upstream.content.iter_any():
                    whole = stream.feed(chunk)
                    if stream.begun and self._client is None:
                        patience.reschedule(None)
                        lease.end()
                        self._first_s = self._clock()
                        self._client = await self._begin()
                    if stream.error is not None:
                        break
                    if stream.tokens > seen:
                        self._last_s = self._clock()
                        hold.grow(stream.tokens - seen)
                        seen = stream.tokens
                    if whole and self._client is not None:
                        await self._write(self._client, whole)
                    if stream.done and stream.begun:
                        self._output_tokens = stream.tokens
                        self.outcome = names.OK
        except TimeoutError as error:
            if self._client is None:
                why = f"{instance} gave no token before {lease.instance} let go of its KV"
                raise Lost(instance, why, answered=True) from error
            raise
        except (aiohttp.ClientError, OSError) as error:
            if self._client is None:
                raise Lost(instance, f"{instance} failed: {_said(error)}") from error
            self._fault(instance)
            raise errors.InstanceFailed(
                f"the decode instance failed in mid-stream: {_said(error)}"
            ) from error
        if self._client is None:
            said = (stream.error or b"nothing")[:200].decode("utf-8", "replace")
            raise Lost(instance, f"{instance} answered no token but {said}", answered=True)
        if not stream.done:
            self._fault(instance, answered=stream.error is not None)
            raise errors.InstanceFailed("the decode instance failed in mid-stream")
        self._fleet.worked(instance)
        return await self._finish(self._client)

    async def _begin(self) -> web.StreamResponse:
        """The client's stream."""
        client = web.StreamResponse(headers={**_STREAM_HEADERS, "X-Request-Id": self._request.id})
        if self._proxy.closing:
            client.force_close()
        try:
            await client.prepare(self._http)
        except ConnectionError as error:
            raise ClientGone from error
        return client

    async def _pass_answer(self, instance: Instance, upstream: aiohttp.ClientResponse) -> web.Response:
        body = await upstream.read()
        try:
            self._output_tokens = int(msgspec.json.decode(body)["usage"]["completion_tokens"])
        except (msgspec.DecodeError, LookupError, TypeError, ValueError) as error:
            raise Lost(instance, f"{instance} answered without usage: {error!r}", answered=True) from error
        self._last_s = self._clock()
        self._fleet.worked(instance)
        self.outcome = names.OK
        return self._proxy.headed(errors.response(200, body), self._request.id)

    async def _pass_stream(
        self,
        client: web.StreamResponse,
        instance: Instance,
        upstream: aiohttp.ClientResponse,
        hold: Hold,
    ) -> web.StreamResponse:
        stream = frames.Frames()
        seen = 0
        try:
            async for chunk in upstream.content.iter_any():
                whole = stream.feed(chunk)
                if stream.tokens != seen:
                    self._last_s = self._clock()
                    hold.grow(stream.tokens - seen)
                    seen = stream.tokens
                if whole:
                    await self._write(client, whole)
                if stream.done and not stream.error:
                    self._output_tokens = 1 + seen
                    self.outcome = names.OK
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if not stream.done:
                self._fault(instance)
                raise errors.InstanceFailed(
                    f"the decode instance failed in mid-stream: {_said(error)}"
                ) from error
        if not stream.done and not stream.error:
            raise errors.InstanceFailed("the decode instance ended its stream before the answer's end")
        if self.outcome == names.OK:
            self._fleet.worked(instance)
        return await self._finish(client)

    # ------------------------------------------------------------------------------------- wires

    def _post(self, instance: Instance, body: bytes) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        path = "/v1/chat/completions" if self._request.chat else "/v1/completions"
        return self._proxy.session.post(
            instance.seen.url + path,
            data=body,
            headers={"Content-Type": "application/json", "X-Request-Id": self._request.id},
        )

    def _judge(self, instance: Instance, status: int, body: bytes) -> None:
        """Raises Lost for what another instance may do better, Passed for what is the request's own fault."""
        if status >= 500 or status == 429:
            said = body[:200].decode("utf-8", "replace")
            raise Lost(instance, f"{instance} answered {status}: {said}", answered=True)
        if status != 200:
            raise errors.Passed(status, body)

    def _fault(self, instance: Instance, *, answered: bool = False) -> None:
        self._fleet.fault(instance, self._clock(), answered=answered)
        self._proxy.metrics.retries[instance.seen.role] += 1

    async def _write(self, client: web.StreamResponse, data: bytes) -> None:
        try:
            await client.write(data)
        except ConnectionError as error:
            raise ClientGone from error

    async def _finish(self, client: web.StreamResponse) -> web.StreamResponse:
        try:
            await client.write_eof()
        except ConnectionError as error:
            raise ClientGone from error
        return client


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__

"""The hand-off: a request goes to prefill, its first token to the client, the rest from decode to the client.

Two steps, as vLLM's disaggregated serving has them (REFERENCE § 7). An instance that fails costs the request time and nothing
else. Before the first token it is tried again elsewhere. After it, another prefill instance computes the prompt and the tokens
that the client has, draws the next one as it would have been drawn (the same seed, the same place in the answer), and the
stream goes on. vLLM takes no such place: it gives the whole answer again, if it is greedy or has a seed, and what the client
has is not passed on twice. What cannot go on either way ends with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from disaggserve import metric_names as names
from disaggserve.protocol import Resume
from disaggworker.router import errors, frames, vllm
from disaggworker.router.admission import Admission
from disaggworker.router.config import Config
from disaggworker.router.fleet import Fleet, Hold, Instance
from disaggworker.router.metrics import Metrics
from disaggworker.router.request import Request, request_id
from disaggworker.router.upstream import Broken, Reply, Unreachable, UpstreamError, Upstreams

log = logging.getLogger(__name__)

ATTEMPTS = 4  # in a row that brought the answer no further
_RELEASE_S = 5.0
# What the client has not taken yet, in bytes: above the one decode is not read from, below the other it is again.
_MOST_UNSENT, _LEAST_UNSENT, _LOOK_AGAIN_S = 256 * 1024, 64 * 1024, 0.01
_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class Lost(Exception):
    """An attempt came to nothing, and not by the request's fault.

    `instance` failed it (None: there was none), by what it `answered`, or without a whole answer; `further`: not without
    having brought the answer further.
    """

    def __init__(
        self, instance: Instance | None, why: str, *, answered: bool = False, further: bool = False
    ) -> None:
        self.instance, self.answered, self.further = instance, answered, further
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
        upstreams: Upstreams,
    ) -> None:
        self.config, self.fleet, self.admission = config, fleet, admission
        self.metrics, self.upstreams = metrics, upstreams
        self.clock = asyncio.get_running_loop().time
        self.active: set[str] = set()
        self.closing = False  # SIGTERM has come: connections are not kept alive
        self._releases: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def completions(self, http: web.Request) -> web.StreamResponse:
        return await self._serve(http, chat=False)

    async def chat(self, http: web.Request) -> web.StreamResponse:
        return await self._serve(http, chat=True)

    async def idle(self) -> None:
        """Until no request is in flight."""
        await self._idle.wait()

    def release(self, instance: Instance, params: dict[str, Any]) -> None:
        """Nobody will pull this KV: say so, in the background. Where that is not heard, or no door for it, its lease ends it."""
        if "handoff" in params:
            task = asyncio.create_task(self._release(instance, params))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def _release(self, instance: Instance, params: dict[str, Any]) -> None:
        with contextlib.suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(_RELEASE_S):
                body = msgspec.json.encode(params)
                with contextlib.closing(
                    await self.upstreams.post(instance.seen.url, "/release", body)
                ) as reply:
                    await reply.read()

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
        self._key: str | None = None  # pairing key of the instances that answer
        self._tokens = 0  # of the answer so far
        self._answered: list[int] = []  # which they are, where the engine says so
        self._seed: int | None = None  # with which they are drawn, where the engine says so
        self._said: str | None = None  # its text so far, where the same request gives it again (vLLM)
        self._uncached = 0
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
            self._tokens,
            self._first_s - self._arrived_s,
            self._last_s - self._first_s,
        )

    def _cancelled(self) -> None:
        if self.outcome != names.OK:  # a client may hang up as soon as it has read the last frame
            self.outcome = names.CANCELLED

    def _leave_queue(self, *, served: bool = False) -> None:
        if self._queued:
            self._queued = False
            self._proxy.admission.leave(served=served)

    async def _fail(self, response: web.Response, body: bytes) -> web.StreamResponse:
        """The error as the answer, or as the last frames of a stream that has begun."""
        if self._client is None:
            return self._proxy.headed(response, self._request.id)
        with contextlib.suppress(ClientGone):  # it failed before the client went
            await self._write(self._client, b"data: " + body + b"\n\n" + frames.DONE)
            await self._finish(self._client)
        return self._client

    async def _run(self) -> web.StreamResponse:
        failures = 0
        while True:
            try:
                return await self._attempt()
            except Lost as lost:
                failures = 1 if lost.further else failures + 1
                log.warning("request %s, %d in a row: %s", self._request.id, failures, lost)
                if lost.instance is not None:
                    self._fault(lost.instance, answered=lost.answered)
                if self._client is not None and not self._can_go_on:
                    why = "the answer cannot go on elsewhere: its engine names neither tokens nor seed, and does not repeat it"
                    raise errors.InstanceFailed(f"{lost}; {why}") from lost
                if failures == ATTEMPTS:
                    raise errors.InstanceFailed(
                        f"{failures} attempts failed, the last one so: {lost}"
                    ) from lost

    @property
    def _can_go_on(self) -> bool:
        return self._said is not None or self._resumable

    @property
    def _resumable(self) -> bool:
        return self._seed is not None and len(self._answered) == self._tokens

    def _goes_on_at(self, instance: Instance) -> bool:
        """Of the same key, since other weights would go on otherwise, and in the way in which the answer was begun."""
        whole = instance.seen.role == "mixed" or instance.seen.engine == vllm.NAME
        return instance.seen.pairing_key == self._key and (
            self._said is not None if whole else self._resumable
        )

    # ------------------------------------------------------------------------------------- one attempt

    async def _attempt(self) -> web.StreamResponse:
        request, resume = self._request, None
        if self._client is None:
            self._tokens, self._answered = 0, []
        elif self._seed is not None:
            resume = Resume(answered=self._answered, seed=self._seed)
        begun = self._client is not None
        instance = await self._proxy.admission.prefill(request, self._goes_on_at if begun else None)
        self._key = instance.seen.pairing_key
        hold = Hold(instance, queued_tokens=request.uncached_tokens + len(self._answered))
        params: dict[str, Any] = {}
        try:
            if instance.seen.role == "mixed":
                return await self._whole(hold)
            if instance.seen.engine == vllm.NAME:
                vllm.refuse(request.body)
                answer = await self._prefill(instance, vllm.for_prefill(request.body, chat=request.chat))
                hold.answered()
                self._take(instance, answer)
                return await self._decode_vllm(hold, answer["kv_transfer_params"])
            name = uuid.uuid4().hex
            answer = await self._prefill(instance, request.for_prefill(name, resume), name)
            hold.answered()
            params = answer["kv_transfer_params"]
            self._take(instance, answer, resumed=resume is not None)
            self._take_token(answer)
            done = params.get("done") is True
            if request.stream:
                await self._send_token(answer, done)
            if done:
                hold.end()
                return await self._end_at_first(answer)
            return await self._decode(hold, answer)
        finally:
            if hold.leased:
                self._proxy.release(instance, params)
            hold.end()

    async def _prefill(self, instance: Instance, asked: bytes, handoff: str | None = None) -> dict[str, Any]:
        """Its answer. `handoff`: by name, what is given back where that is not read, though it may have been on its way."""
        try:
            with contextlib.closing(await self._post(instance, asked)) as reply:
                body = await reply.read()
        except (UpstreamError, asyncio.CancelledError) as error:
            if handoff:
                self._proxy.release(instance, {"handoff": handoff})
            if isinstance(error, UpstreamError):
                raise Lost(instance, f"{instance} failed: {error}") from error
            raise
        self._judge(instance, reply.status, body)
        try:
            answer = msgspec.json.decode(body)
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

    def _take(self, instance: Instance, answer: dict[str, Any], *, resumed: bool = False) -> None:
        """Prefill's answer is here, and with it the truth about the prompt's length."""
        self._fleet.generated(instance)
        self._fleet.worked(instance)
        self._leave_queue(served=True)
        usage = answer["usage"]
        self._request.input_tokens = usage["prompt_tokens"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        self._fleet.cached(instance, cached)
        if resumed:
            self._proxy.metrics.continuations += 1
        else:
            self._uncached = max(0, usage["prompt_tokens"] - (cached or 0))

    def _take_token(self, answer: dict[str, Any]) -> None:
        """Prefill's own token is the answer's next one."""
        self._last_s = self._clock()
        if not self._first_s:
            self._first_s = self._last_s
        self._tokens += 1
        self._answered += answer["choices"][0].get("token_ids") or ()
        seed = answer["kv_transfer_params"].get("seed")
        self._seed = seed if type(seed) is int else None

    async def _send_token(self, answer: dict[str, Any], done: bool) -> None:
        """Prefill's token, at once: the first of the answer, or the next of one that goes on."""
        request, begins = self._request, self._client is None
        client = self._client = self._client or await self._begin()
        frame = frames.token(
            answer,
            chat=request.chat,
            begins=begins,
            finish=done,
            usage=request.include_usage,
            ids=request.wants_token_ids,
        )
        await self._write(client, frame)

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

    async def _end_at_first(self, answer: dict[str, Any]) -> web.StreamResponse:
        if self._client is not None:
            return await self._end_stream(self._client, answer)
        self.outcome = names.OK
        del answer["kv_transfer_params"]
        if not self._request.wants_token_ids:
            answer["choices"][0].pop("token_ids", None)
        return self._proxy.headed(errors.response(200, msgspec.json.encode(answer)), self._request.id)

    async def _end_stream(self, client: web.StreamResponse, answer: dict[str, Any]) -> web.StreamResponse:
        """The frames after the last token."""
        request = self._request
        usage = (request.input_tokens, self._tokens) if request.include_usage else None
        await self._write(client, frames.end(answer, chat=request.chat, usage=usage))
        self.outcome = names.OK
        return await self._finish(client)

    async def _decode(self, lease: Hold, answer: dict[str, Any]) -> web.StreamResponse:
        within = lease.instance.seen.within
        body = self._request.for_decode(answer["kv_transfer_params"], token_ids=self._resumable)
        while True:
            instance = self._fleet.decode(within, self._clock())
            if instance is None:
                raise Lost(None, f"no decode instance of pairing key {within} is ready")
            hold = Hold(instance, kv_tokens=self._request.input_tokens + self._tokens)
            try:
                with contextlib.closing(await self._post(instance, body)) as reply:
                    if reply.status != 200:
                        self._judge(instance, reply.status, await reply.read())
                    lease.end()  # headers come only after the pull
                    if self._client is None:
                        return await self._pass_answer(instance, reply)
                    return await self._pass_stream(self._client, answer, reply, hold)
            except Unreachable as error:
                # It never saw the request, so the KV is still on prefill, for another decode.
                log.warning("request %s: %s", self._request.id, error)
                self._fault(instance)
            except UpstreamError as error:
                raise Lost(instance, f"{instance} failed: {error}") from error
            finally:
                hold.end()

    async def _pass_answer(self, instance: Instance, reply: Reply) -> web.Response:
        body = await reply.read()
        try:
            self._tokens = int(msgspec.json.decode(body)["usage"]["completion_tokens"])
        except (msgspec.DecodeError, LookupError, TypeError, ValueError) as error:
            raise Lost(instance, f"{instance} answered without usage: {error!r}", answered=True) from error
        self._last_s = self._clock()
        return self._end_answer(instance, body)

    async def _pass_stream(
        self, client: web.StreamResponse, answer: dict[str, Any], reply: Reply, hold: Hold
    ) -> web.StreamResponse:
        stream = frames.Frames(hide=not self._request.wants_token_ids)
        why = await self._relay(reply, stream, hold)
        self._tokens += stream.tokens
        self._answered += stream.ids
        if stream.done:
            self._fleet.worked(hold.instance)
            self.outcome = names.OK
            return await self._finish(client)
        if stream.finished:  # all that it had to say
            return await self._end_stream(client, answer)
        raise Lost(hold.instance, why, answered=bool(stream.error), further=stream.tokens > 0)

    async def _relay(self, reply: Reply, stream: frames.Frames | vllm.Frames, hold: Hold) -> str:
        """Decode's frames, from its socket to the client's without a task in between; why it was not done at the end."""
        instance, clock = hold.instance, self._clock
        transport, chunked = self._http.transport, self._http.version >= (1, 1)
        seen = 0

        def sink(piece: bytes) -> None:
            nonlocal seen
            whole = stream.feed(piece)
            if stream.tokens > seen:
                if not seen:
                    self._fleet.generated(instance)
                self._last_s = clock()
                hold.grow(stream.tokens - seen)
                seen = stream.tokens
            if whole:
                if transport is None or transport.is_closing():
                    raise ClientGone
                transport.write(b"%x\r\n%b\r\n" % (len(whole), whole) if chunked else whole)
                if transport.get_write_buffer_size() > _MOST_UNSENT:
                    reply.pause()
                    _resume_later(reply, transport)
            if stream.error:
                raise Broken(stream.error[:200].decode("utf-8", "replace").strip().removeprefix("data: "))

        try:
            sink(b"")  # what has been read before may say an error
            await reply.stream(sink)
        except UpstreamError as error:
            return f"{instance} failed in mid-stream: {error}"
        return f"{instance} ended its stream before the answer's end"

    # ------------------------------------------------------------------------------------- an answer of one instance

    async def _whole(self, hold: Hold) -> web.StreamResponse:
        """A mixed instance does both: it is sent what the client asked, and there is nothing to hand over."""
        instance, request, sent_s = hold.instance, self._request, self._clock()
        try:
            with contextlib.closing(await self._post(instance, vllm.for_decode(request.body, None))) as reply:
                if reply.status != 200:
                    self._judge(instance, reply.status, await reply.read())
                if request.stream:
                    return await self._own_stream(hold, reply)
                data = await reply.read()
        except UpstreamError as error:
            raise Lost(instance, f"{instance} failed: {error}") from error
        self._count_prompt(self._read_answer(instance, data, sent_s))
        return self._end_answer(instance, data)

    def _read_answer(self, instance: Instance, data: bytes, sent_s: float) -> dict[str, Any]:
        """Tokens and times of an answer in one piece; its usage. Raises Lost."""
        try:
            answer = msgspec.json.decode(data)
            usage: dict[str, Any] = answer["usage"]
            self._tokens = int(usage["completion_tokens"])
            own_s = vllm.first_token_s(answer)
        except (msgspec.DecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise Lost(instance, f"{instance} answered without usage: {error!r}", answered=True) from error
        if vllm.aborted(answer):
            raise Lost(instance, f"{instance} is ending, and let go of the request", answered=True)
        self._last_s = self._clock()
        # One that does not say when its first token came may have had it as late as its last.
        self._first_s = self._last_s if own_s is None else sent_s + own_s
        return usage

    def _count_prompt(self, usage: dict[str, Any]) -> None:
        """What a mixed instance says of the prompt; prefill's answer says it elsewhere."""
        self._leave_queue(served=True)
        said = usage.get("prompt_tokens")
        if type(said) is int:
            self._request.input_tokens = said
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self._uncached = max(0, self._request.input_tokens - cached)

    def _end_answer(self, instance: Instance, data: bytes) -> web.Response:
        self._fleet.generated(instance)
        self._fleet.worked(instance)
        self.outcome = names.OK
        return self._proxy.headed(errors.response(200, data), self._request.id)

    # ------------------------------------------------------------------------------------- vLLM's second step

    async def _decode_vllm(self, lease: Hold, params: dict[str, Any]) -> web.StreamResponse:
        """The rest of vLLM's two steps. Until decode's first token is here, whatever fails costs the client only time."""
        prefill, request = lease.instance, self._request
        within, answered_s = prefill.seen.within, self._clock()
        body = vllm.for_decode(request.body, params)
        # A stream shows its first token; an answer in one piece says at its end when that was.
        until_s = answered_s + vllm.LATE_S if request.stream else None
        while True:
            if vllm.late(self._clock() - answered_s):
                raise Lost(None, f"no decode instance took the request before {prefill} let go of its KV")
            instance = self._fleet.decode(within, self._clock())
            if instance is None:
                raise Lost(None, f"no decode instance of pairing key {within} is ready")
            hold = Hold(instance, kv_tokens=request.input_tokens + 1)
            sent_s = self._clock()
            try:
                async with asyncio.timeout_at(until_s) as patience:
                    # Once: what it has fetched is gone from prefill, and asking again would be too late.
                    with contextlib.closing(await self._post(instance, body, once=True)) as reply:
                        if reply.status != 200:
                            self._judge(instance, reply.status, await reply.read())
                        if request.stream:
                            return await self._own_stream(hold, reply, lease, patience)
                        data = await reply.read()
                self._read_answer(instance, data, sent_s)
                if vllm.late(self._first_s - answered_s):
                    raise Lost(None, f"{instance} came for its KV after {prefill} had let go of it")
                return self._end_answer(instance, data)
            except Unreachable as error:
                # It never saw the request, so the KV is still on prefill, for another decode.
                log.warning("request %s: %s", request.id, error)
                self._fault(instance)
            except UpstreamError as error:
                raise Lost(instance, f"{instance} failed: {error}") from error
            except TimeoutError as error:
                why = f"{instance} gave no token before {prefill} let go of its KV"
                raise Lost(instance, why, answered=True) from error
            finally:
                hold.end()

    async def _own_stream(
        self, hold: Hold, reply: Reply, lease: Hold | None = None, patience: asyncio.Timeout | None = None
    ) -> web.StreamResponse:
        """A stream that is all the instance's own. Its headers come before its first token, and say nothing; that one does, for
        which there is so much patience where KV is leased."""
        instance = hold.instance
        request, again = self._request, self._client is not None
        stream = vllm.Frames(
            keep_usage=request.include_usage, note=vllm.repeatable(request.body), after=self._said or ""
        )
        begun = b""
        while not stream.begun and stream.error is None and (piece := await reply.piece()):
            begun += stream.feed(piece)
        if patience is not None:
            patience.reschedule(None)
        if not stream.begun:
            said = (stream.error or b"nothing")[:200].decode("utf-8", "replace")
            raise Lost(instance, f"{instance} answered no token but {said}", answered=True)
        if lease is not None:
            lease.end()
        else:
            self._leave_queue(served=True)
            hold.decodes(request.input_tokens)
        if again:
            self._proxy.metrics.continuations += 1
        else:
            self._first_s = self._last_s = self._clock()
        client = self._client = self._client or await self._begin()
        if begun:
            await self._write(client, begun)
        why = await self._relay(reply, stream, hold)
        self._tokens = stream.tokens
        if lease is None:
            self._count_prompt(stream.usage)
        if not stream.done:
            further = stream.said != self._said
            self._said = stream.said
            raise Lost(instance, why, answered=stream.error is not None, further=further)
        self._fleet.worked(instance)
        self.outcome = names.OK
        return await self._finish(client)

    # ------------------------------------------------------------------------------------- wires

    async def _post(self, instance: Instance, body: bytes, *, once: bool = False) -> Reply:
        path = "/v1/chat/completions" if self._request.chat else "/v1/completions"
        return await self._proxy.upstreams.post(instance.seen.url, path, body, self._request.id, once=once)

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


def _resume_later(reply: Reply, transport: asyncio.WriteTransport) -> None:
    """Read on when the client has taken what it was sent; one that is gone ends the exchange by itself."""

    def look() -> None:
        if transport.is_closing() or transport.get_write_buffer_size() < _LEAST_UNSENT:
            reply.resume()
        else:
            loop.call_later(_LOOK_AGAIN_S, look)

    loop = asyncio.get_running_loop()
    loop.call_later(_LOOK_AGAIN_S, look)

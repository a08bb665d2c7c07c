"""Any server of OpenAI's completions over HTTP, measured from outside, by what its streams show.

Prefill: the time to the first token of one stream that asks for one, after a prompt that no cache has seen. It leaves in
what lies between: HTTP, tokenising, the queue's turn, the way through a router. Several prompts are in one step where all
of them wait for another one, as long as they are together: the time from its token to theirs, if those come together.

Decode: the times between tokens of `batch` streams that began together, while all of them decode: from where each has its
second token, so that neither a prefill nor a hand-off is among them. It leaves in the scheduler's and HTTP's share of
a step. Streams grow while they are watched, and the row says how long they were.

The server must be idle and keep a batch together: one instance, or one of each role behind a router. It must send every
token in a frame of its own, and needs no key. Prompts are ids from 10 to 255, which every vocabulary has; a model of
experts may route them otherwise than text.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec

from disaggworker.errors import StartError
from disaggworker.profiling.grid import Cell, LeftOut, Timing

STEPS = 16  # decode steps that every stream is watched for, at least
_PROBES = 3  # a server that is late for once sends two tokens in one frame
_TRIES = 5  # to have several prompts in one step
_TOGETHER = 0.25  # of that step: so far apart may their tokens come
_TOKENS = range(10, 256)
_CONNECT_S, _SILENCE_S = 5.0, 120.0
_KEEPALIVE_S = 4.0  # below the engines' own: a POST on a connection that they close is lost
_SETTLE_S = 0.25  # after streams were let go: a server notices between two steps


@dataclasses.dataclass
class _Stream:
    """When the tokens of one answer came, in seconds of one clock."""

    at_s: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0  # by the server's own count, at its end
    ended: bool = False


class OverHTTP:
    """A server's address, and a client of it. Use as a context manager."""

    def __init__(self, url: str, model: str, context: int) -> None:
        """`context` 0: what the server says. Raises `StartError`."""
        self._url, self._model = url.rstrip("/"), model
        self._random = random.SystemRandom()  # no prompt twice, not over runs either: servers cache prefixes
        self._runner = asyncio.Runner()
        try:
            self._session = self._runner.run(self._open())
            self.context = self._runner.run(self._card(context))
            self._runner.run(self._probe())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OverHTTP:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all connections."""
        if hasattr(self, "_session"):
            self._runner.run(self._session.close())
        self._runner.close()

    def time(self, cell: Cell) -> Timing:
        """One measurement. Raises `LeftOut` where the server refuses or ends too soon, `StartError` where it is gone."""
        try:
            if cell.phase == "prefill":
                measured = self._first_token if cell.batch == 1 else self._tokens_behind_another
                return self._runner.run(measured(cell))
            return self._runner.run(self._between_tokens(cell))
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as e:
            raise self._lost(e) from None

    async def _open(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
        return aiohttp.ClientSession(timeout=timeout, connector=connector)

    def _lost(self, error: Exception) -> StartError:
        why = str(error) or type(error).__name__
        return StartError(f"--url {self._url} cannot be measured: {why}.")

    async def _card(self, context: int) -> int:
        """The context length, once the server is there and has the model."""
        at = f"--url {self._url}: /models answers HTTP"
        try:
            async with self._session.get(f"{self._url}/models") as answer:
                data, status = await answer.read(), answer.status
        except (aiohttp.ClientError, TimeoutError) as e:
            raise self._lost(e) from None
        try:
            listed = {str(card["id"]): card for card in msgspec.json.decode(data)["data"]}
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise StartError(
                f"{at} {status} and no list of models; give the address that ends in /v1."
            ) from None
        if self._model not in listed:
            known = ", ".join(listed) or "none"
            raise StartError(f"--model {self._model} is not served at {self._url}; it serves {known}.")
        said = listed[self._model].get("max_model_len")
        if not context and not isinstance(said, int):
            raise StartError(
                f"{self._url} does not say how long its context is (max_model_len); give --context-length."
            )
        return min(context or said, said) if isinstance(said, int) else context

    async def _probe(self) -> None:
        """A short answer: are its tokens sent one by one?"""
        for _ in range(_PROBES):
            stream = _Stream()
            try:
                await self._read(self._body(8, 8), stream, asyncio.Event())
            except LeftOut as e:
                raise StartError(f"--url {self._url}: /completions answers {e}.") from None
            except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as e:
                raise self._lost(e) from None
            if stream.at_s and len(stream.at_s) >= stream.tokens:
                return
        raise StartError(
            f"--url {self._url}: /completions streams {stream.tokens} tokens in {len(stream.at_s)} frames; times between "
            "tokens can be seen only where every token has its own."
        )

    def _body(self, prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": self._random.choices(_TOKENS, k=prompt_tokens),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _read(self, body: dict[str, Any], stream: _Stream, came: asyncio.Event) -> None:
        async with self._session.post(f"{self._url}/completions", json=body) as answer:
            if answer.status != 200:
                raise LeftOut(
                    f"HTTP {answer.status} to a prompt of {len(body['prompt'])} tokens: {_message(await answer.read())}"
                )
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    frame = msgspec.json.decode(line[6:])
                    if "error" in frame:
                        raise LeftOut(f"a stream broke off: {_message(line[6:])}")
                    if frame.get("usage"):
                        stream.tokens = frame["usage"]["completion_tokens"]
                    if frame.get("choices"):
                        stream.at_s.append(time.perf_counter())
                        came.set()
        stream.ended = True
        came.set()

    async def _first_token(self, cell: Cell) -> Timing:
        body = self._body(cell.length, 1)
        begun = time.perf_counter()
        return Timing(await self._token(body) - begun, 0)

    async def _tokens_behind_another(self, cell: Cell) -> Timing:
        whole = min(cell.batch * cell.length, self.context)

        def other() -> int:
            # About as long, and not as long: a step of as many tokens as one lately is faster.
            return whole - self._random.randint(1, max(1, whole // 4))

        alone = await self._first_token(Cell("prefill", 1, other()))
        for _ in range(_TRIES):
            bodies = [self._body(n, 1) for n in (other(), *[cell.length] * cell.batch)]
            ahead = asyncio.create_task(self._token(bodies[0]))
            await asyncio.sleep(alone.seconds / 4)  # it is computed now, and will be for a while
            before, *came = await asyncio.gather(ahead, *map(self._token, bodies[1:]))
            step = max(came) - before
            if max(came) - min(came) < _TOGETHER * step:
                return Timing(step, 0)
        raise LeftOut(f"they were not taken into one step in {_TRIES} tries")

    async def _token(self, body: dict[str, Any]) -> float:
        """When the one that it asks for came."""
        stream = _Stream()
        await self._read(body, stream, asyncio.Event())
        if not stream.at_s:
            raise LeftOut("no token came")
        return stream.at_s[0]

    async def _between_tokens(self, cell: Cell) -> Timing:
        streams = [_Stream() for _ in range(cell.batch)]
        came = asyncio.Event()
        # As long as may be, and let go of when enough was seen: streams that began first must not end before the last decodes.
        bodies = [self._body(cell.length, self.context - cell.length) for _ in streams]
        tasks = [
            asyncio.create_task(self._read(body, stream, came))
            for body, stream in zip(bodies, streams, strict=True)
        ]
        try:
            while True:
                came.clear()
                for task in tasks:
                    if task.done():
                        task.result()
                if min(len(stream.at_s) for stream in streams) >= STEPS + 2:
                    window = together([stream.at_s for stream in streams], cell.length)
                    if window:
                        return window
                if any(stream.ended for stream in streams):
                    raise LeftOut(
                        f"a stream ended before all {cell.batch} had decoded {STEPS} steps together"
                        if cell.batch > 1
                        else f"the stream ended before {STEPS} steps"
                    )
                waits = [asyncio.ensure_future(came.wait()), *(t for t in tasks if not t.done())]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                waits[0].cancel()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(_SETTLE_S)


def together(arrivals: Sequence[Sequence[float]], prompt_tokens: int) -> Timing | None:
    """The mean time between tokens while all streams decode, None before each has shown `STEPS` of them.

    `arrivals` are the times of every stream's tokens, at least two each, in seconds. The step that makes the token after
    the k-th has prompt + k − 1 tokens in the cache: the k-th itself is not in it yet.
    """
    begin = max(times[1] for times in arrivals)
    gaps: list[float] = []
    contexts: list[float] = []
    for times in arrivals:
        inside = [k for k in range(1, len(times)) if times[k - 1] >= begin]
        if len(inside) < STEPS:
            return None
        gaps += [times[k] - times[k - 1] for k in inside]
        contexts.append(statistics.mean(prompt_tokens + k - 1 for k in inside))
    return Timing(statistics.mean(gaps), round(sum(contexts)))


def _message(data: bytes) -> str:
    """What an error's body says, on one line."""
    try:
        error = msgspec.json.decode(data)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return " ".join(data.decode(errors="replace").split())[:200] or "nothing"

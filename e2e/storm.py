"""Requests whose right answers are known, sent whatever happens to those that serve them, and what became of each.

Greedy or sampled from a seed of their own, so that an answer is right or wrong token by token. `learn` asks everything once in
calm weather; greedy ones of which two next tokens are nearly as likely are left out: a batch of another size may round them the
other way.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import aiohttp

Json = dict[str, Any]
Outcome = Literal["ok", "cancelled", "failed", "refused", "lost"]

_NEAR = 1e-4  # between logarithms of shares, which float32 has to six digits
_ANSWER_S = 120.0


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request. `leave_after`: the client goes when it has so many tokens; None: it stays to the end."""

    number: int
    due_s: float
    prompt: tuple[int, ...]
    tokens: int
    stream: bool
    leave_after: int | None = None
    seed: int | None = None  # sampled; None: greedy


@dataclasses.dataclass(frozen=True)
class End:
    """How one request ended. lost: the connection to the router died after the request was sent."""

    ask: Ask
    outcome: Outcome
    tokens: tuple[int, ...]
    said: str = ""  # of an error
    router: str = ""  # the URL that it went to


def draw(
    seed: int, count: int, over_s: float, *, prompt: tuple[int, int], tokens: tuple[int, int], leave: float
) -> list[Ask]:
    """Arrivals and lengths uniform; most are streams, of which the share `leave` goes early; a third are sampled."""
    rng = random.Random(seed)
    asks = []
    for number in range(count):
        wanted = rng.randint(*tokens)
        stream = rng.random() < 0.75
        early = rng.randrange(wanted) if stream and rng.random() < leave else None
        words = tuple(rng.choices(range(4, 256), k=rng.randint(*prompt)))
        sampled = number if rng.random() < 1 / 3 else None
        asks.append(Ask(number, rng.uniform(0, over_s), words, wanted, stream, early, sampled))
    return sorted(asks, key=lambda ask: ask.due_s)


class Storm:
    """A client of one or more routers."""

    def __init__(
        self, session: aiohttp.ClientSession, model: str, routers: Callable[[], Sequence[str]]
    ) -> None:
        """`routers`: the URLs that one would be balanced over now. One that refuses the connection is passed over."""
        self._session, self._model, self._routers = session, model, routers
        self._rng = random.Random(0)
        self.right: dict[int, tuple[int, ...]] = {}

    async def learn(self, asks: Sequence[Ask]) -> list[Ask]:
        """Asks for all answers; returns those asks whose answer leaves no doubt. Raises AssertionError when one fails."""
        answers = await asyncio.gather(*(self._learn(ask) for ask in asks))
        sure = [ask for ask, answer in zip(asks, answers, strict=True) if answer is not None]
        self.right = {ask.number: a for ask, a in zip(asks, answers, strict=True) if a is not None}
        return sure

    async def _learn(self, ask: Ask) -> tuple[int, ...] | None:
        body = {**self._body(ask), "stream": False, "logprobs": 2}
        async with self._session.post(self._routers()[0] + "/v1/completions", json=body) as answer:
            text = await answer.text()
            assert answer.status == 200, text
        (choice,) = json.loads(text)["choices"]
        for top in choice["logprobs"]["top_logprobs"]:
            first, second, *_ = sorted(top.values(), reverse=True) if len(top) > 1 else (1.0, 0.0)
            if ask.seed is None and first - second < _NEAR:
                return None
        return tuple(choice["token_ids"])

    async def run(self, asks: Sequence[Ask]) -> list[End]:
        """Sends each when it is due; how they ended, in the order of `asks`."""
        clock = asyncio.get_running_loop().time
        began_s = clock()

        async def one(ask: Ask) -> End:
            await asyncio.sleep(began_s + ask.due_s - clock())
            async with asyncio.timeout(_ANSWER_S):
                return await self._send(ask)

        return list(await asyncio.gather(*(one(ask) for ask in asks)))

    def wrong(self, end: End) -> str:
        """What is wrong with the tokens of an answer or of the part of it that came; empty: nothing."""
        right = self.right[end.ask.number]
        wanted = right if end.outcome == "ok" else right[: len(end.tokens)]
        return "" if end.tokens == wanted else f"request {end.ask.number} got {end.tokens}, not {wanted}"

    def _body(self, ask: Ask) -> Json:
        return {
            "model": self._model,
            "prompt": list(ask.prompt),
            "max_tokens": ask.tokens,
            "temperature": 0 if ask.seed is None else 1,
            "seed": ask.seed,
            "ignore_eos": True,
            "stream": ask.stream,
            "return_token_ids": True,
        }

    async def _send(self, ask: Ask) -> End:
        urls = list(self._routers())
        self._rng.shuffle(urls)
        for url in urls:
            got: list[int] = []
            try:
                async with self._session.post(url + "/v1/completions", json=self._body(ask)) as answer:
                    if answer.status != 200:
                        outcome: Outcome = "refused" if answer.status in (429, 503) else "failed"
                        return End(ask, outcome, (), f"{answer.status}: {await answer.text()}", url)
                    if ask.stream:
                        outcome, said = await self._stream(ask, answer, got)
                        return End(ask, outcome, tuple(got), said, url)
                    (choice,) = (await answer.json())["choices"]
                    return End(ask, "ok", tuple(choice["token_ids"]), "", url)
            except aiohttp.ClientConnectorError:
                continue
            except (aiohttp.ClientError, OSError) as error:
                return End(ask, "lost", tuple(got), repr(error), url)
        return End(ask, "refused", (), "no router takes a connection")

    async def _stream(self, ask: Ask, answer: aiohttp.ClientResponse, got: list[int]) -> tuple[Outcome, str]:
        """Reads a stream to its end, or to where the client goes. An answer that ends twice is a failure."""
        finished: list[str] = []
        ended = 0
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            if ended:
                return "failed", f"after [DONE] came {line!r}"
            if line == b"data: [DONE]\n":
                ended += 1
                continue
            frame = json.loads(line[6:])
            if "error" in frame:
                return "failed", json.dumps(frame["error"])
            for choice in frame["choices"]:
                if finished:
                    return "failed", f"after finish_reason {finished} came {choice}"
                got += choice["token_ids"]
                if choice["finish_reason"]:
                    finished.append(choice["finish_reason"])
            if ask.leave_after is not None and len(got) > ask.leave_after:
                answer.close()
                return "cancelled", ""
        if not ended or finished != ["length"]:
            return "failed", f"the stream ended with {ended} [DONE] and finish_reason {finished}"
        return "ok", ""

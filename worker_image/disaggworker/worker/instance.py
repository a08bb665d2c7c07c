"""What a loaded worker serves with; both halves of an answer are given it."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Callable

from aiohttp import web

from disaggworker import openai
from disaggworker.config import Config
from disaggworker.engine.engine import Engine
from disaggworker.engine.sequence import Sequence
from disaggworker.load import Book
from disaggworker.metrics import Metrics
from disaggworker.pace import Pace
from disaggworker.worker.text import Text


@dataclasses.dataclass(frozen=True)
class Instance:
    """One copy of the model and its surroundings. `loop` is where everything but the engine runs."""

    config: Config
    pace: Pace | None
    engine: Engine
    text: Text
    metrics: Metrics
    book: Book
    loop: asyncio.AbstractEventLoop

    def call_soon(self, action: Callable[[], None]) -> None:
        """Do this on the event loop; called from the engine's thread."""
        self.loop.call_soon_threadsafe(action)

    def observe_prefill(self, sequence: Sequence) -> None:
        """Count a prompt that was computed here."""
        metrics = self.metrics
        metrics.ttft.observe(sequence.first_token_s - sequence.arrived_s)
        metrics.queue.observe(sequence.scheduled_s - sequence.arrived_s)
        metrics.prefill.observe(sequence.first_token_s - sequence.scheduled_s)
        metrics.prompt_tokens.observe(len(sequence.prompt))

    def observe_decode(self, sequence: Sequence, tokens: int, gaps: int) -> None:
        """Count an answer of so many tokens, between so many of which time was measured here."""
        span = sequence.last_token_s - sequence.first_token_s
        self.metrics.decode.observe(span)
        self.metrics.generation_tokens.observe(tokens)
        if gaps > 0:
            self.metrics.tpot.observe(span / gaps)

    @staticmethod
    def identity(request: web.Request, ask: openai.Ask) -> str:
        """The id of an answer, from the router's or one of our own."""
        given = request.headers.get("X-Request-Id") or uuid.uuid4().hex
        return ("chatcmpl-" if ask.chat else "cmpl-") + given

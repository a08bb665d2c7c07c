"""An answer of one worker alone: it prefills and decodes, and nothing is handed off."""

from __future__ import annotations

from aiohttp import web

from disaggworker import openai
from disaggworker.engine.sequence import Sequence
from disaggworker.worker.instance import Instance
from disaggworker.worker.respond import respond
from disaggworker.worker.text import Reply


class Whole:
    """Answers plain requests, as OpenAI's clients send them."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    async def serve(self, request: web.Request, ask: openai.Ask) -> web.StreamResponse:
        """Raises `RequestError`."""
        instance = self._instance
        prompt = instance.text.prompt(ask)
        reply = Reply(instance.text.bytes, ask)
        sequence = Sequence(
            prompt,
            ask.seeded(),
            instance.text.limit(ask, len(prompt)),
            reply.on_token,
        )
        instance.engine.submit(sequence)
        try:
            with instance.book.whole(request, len(prompt), lambda: reply.tokens):
                await reply.begun()
                return await respond(instance, request, ask, reply, len(prompt), sequence.found)
        finally:
            # Ended or not: a stop string ends what the engine would go on with, and so does a client that left.
            instance.engine.abort(sequence)
            if reply.finish:
                instance.observe_prefill(sequence)
                instance.observe_decode(sequence, reply.tokens, reply.tokens - 1)

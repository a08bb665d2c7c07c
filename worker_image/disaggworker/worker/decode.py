"""The second half of an answer: pull the prompt's KV and generate the rest."""

from __future__ import annotations

import asyncio
import dataclasses

import msgspec
from aiohttp import web

from disaggserve.protocol import Handoff
from disaggserve.wire import VERSION
from disaggworker import openai
from disaggworker.engine.sequence import Sequence, Token
from disaggworker.errors import RequestError
from disaggworker.kv.blocks import blocks_for
from disaggworker.kv.pull import KVClient
from disaggworker.worker.instance import Instance
from disaggworker.worker.respond import respond
from disaggworker.worker.text import Reply


class Decode:
    """Answers requests that bring a prefill worker's `kv_transfer_params`."""

    def __init__(self, instance: Instance, client: KVClient) -> None:
        self._instance, self._client = instance, client
        self._pulls = asyncio.Lock()  # one transfer at a time into one instance, as its link has it

    async def serve(self, request: web.Request, ask: openai.Ask) -> web.StreamResponse:
        """Raises `RequestError`, `TransferError`."""
        instance = self._instance
        engine, text = instance.engine, instance.text
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
        limit = text.limit(ask, handoff.prompt_tokens)
        answered = handoff.answered
        if handoff.done or limit < 2 + len(answered) or handoff.prompt_tokens < 1:
            raise RequestError(
                "Nothing is left to decode: the first token ends this request.", param="kv_transfer_params"
            )
        if ask.sampling.logprobs is not None and handoff.first_logprobs is None:
            raise RequestError(
                "kv_transfer_params lacks the first token's logprobs: prefill was not asked for them.",
                param="kv_transfer_params",
            )
        reply = Reply(text.bytes, ask, Token(handoff.first_token_id, handoff.first_logprobs), answered)
        admitted: asyncio.Future[None] = self._instance.loop.create_future()

        def admit() -> None:
            if not admitted.done():
                admitted.set_result(None)

        sequence = Sequence(
            [0] * handoff.prompt_tokens,
            dataclasses.replace(ask.sampling, seed=handoff.seed),
            limit,
            reply.on_token,
            output=[*answered, handoff.first_token_id],
            on_admitted=lambda: instance.call_soon(admit),
        )
        engine.submit(sequence)
        try:
            with instance.book.decoding(request, lambda: handoff.prompt_tokens + reply.tokens):
                await self._pull(handoff, sequence, admitted)
                return await respond(
                    instance, request, ask, reply, handoff.prompt_tokens, handoff.cached_tokens
                )
        finally:
            # Ended or not: a stop string ends what the engine would go on with, and so does a client that left.
            engine.abort(sequence)
            if reply.finish:
                instance.metrics.queue.observe(sequence.scheduled_s - sequence.arrived_s)
                # The engine's first token here is the answer's second.
                tokens = reply.tokens - len(answered)
                instance.observe_decode(sequence, tokens, tokens - 2)

    async def _pull(self, handoff: Handoff, sequence: Sequence, admitted: asyncio.Future[None]) -> None:
        """Wait for blocks, fetch the KV into them, and tell the prefill worker. Raises `TransferError`."""
        client, engine, pace = self._client, self._instance.engine, self._instance.pace
        renewing = self._instance.loop.create_task(self._renew(handoff))
        prompt: list[int] | None = None
        try:
            waits: set[asyncio.Future[None]] = {admitted, renewing}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if renewing.done():
                await renewing
            await admitted
            async with self._pulls:
                begun = self._instance.loop.time()
                assert sequence.kv is not None
                pulled = await client.pull(handoff, sequence.kv.blocks[: blocks_for(handoff.kv_tokens)])
                if pace and handoff.gpu:
                    # Memory is shared in a low-affinity pair only, and there KV takes the link inside the node.
                    inside = set(pulled.ways) == {"shm"}
                    whole_s = pace.transfer_s(handoff.kv_tokens, handoff.gpu, handoff.rdma, inside=inside)
                    await asyncio.sleep(begun + whole_s - self._instance.loop.time())
            for way in pulled.ways:
                self._instance.metrics.pulls[way] += 1
            prompt = pulled.tokens[: handoff.prompt_tokens]
        finally:
            renewing.cancel()
            engine.pulled(sequence, prompt)
            # Arrived, or not wanted any more: the prefill worker needs its blocks either way.
            client.release_soon(handoff)

    async def _renew(self, handoff: Handoff) -> None:
        """Keep the lease while the request waits here. Raises `TransferError`."""
        await asyncio.sleep(0.02)  # most requests are admitted at once, and need no word
        while True:
            await self._client.renew(handoff)
            await asyncio.sleep(handoff.lease_s / 3)

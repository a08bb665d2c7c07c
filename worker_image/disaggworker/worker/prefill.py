"""The first half of an answer: compute the prompt, give its first token, and keep its KV until it is pulled."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid

import msgspec
from aiohttp import web

from disaggserve.protocol import Handoff, Resume
from disaggworker import openai
from disaggworker.engine.detokenize import TextStream
from disaggworker.engine.sequence import Sequence, Token
from disaggworker.errors import RequestError
from disaggworker.kv.serve import KVServer
from disaggworker.worker.instance import Instance
from disaggworker.worker.ranks import Others
from disaggworker.worker.text import shown

_LONGEST_NAME = 64


class Prefill:
    """Answers requests whose `kv_transfer_params` ask for a hand-off."""

    def __init__(self, instance: Instance, server: KVServer, others: Others | None = None) -> None:
        """`others`: the ranks beside this one."""
        self._instance, self._server, self._others = instance, server, others
        # The hand-offs that are asked for: name, and of those that are held their blocks' generation.
        self._handoffs: dict[Sequence, tuple[str, int | None]] = {}
        instance.engine.hold = self._hold

    def _hold(self, sequence: Sequence) -> None:
        """In the engine's thread: the prompt is computed, and its blocks wait for a pull."""
        assert sequence.kv
        engine, others, (handoff, _) = self._instance.engine, self._others, self._handoffs[sequence]

        def end() -> None:
            if others:
                others.drop(handoff)
            engine.scheduler.free(sequence)

        if others:
            others.hold(handoff, sequence.kv.generation, sequence.kv.blocks)
        self._handoffs[sequence] = handoff, sequence.kv.generation
        self._server.hold(
            handoff,
            sequence.kv.generation,
            sequence.kv.blocks,
            [*sequence.prompt, *sequence.output[:-1]],  # the last token is not in the cache yet
            lambda: engine.post(end),
        )

    async def serve(self, request: web.Request, ask: openai.Ask) -> web.StreamResponse:
        """Raises `RequestError`."""
        config, engine, pace = self._instance.config, self._instance.engine, self._instance.pace
        text = self._instance.text
        prompt = text.prompt(ask)
        limit = text.limit(ask, len(prompt))
        name, resume = self._name(ask), _resume(ask, limit, len(text.bytes))
        answered = resume.answered if resume else []
        sampling = dataclasses.replace(ask.sampling, seed=resume.seed) if resume else ask.seeded()
        first: asyncio.Future[tuple[Token, str | None]] = self._instance.loop.create_future()

        def on_token(token: Token, finish: str | None) -> None:
            if not first.done():
                first.set_result((token, finish))

        sequence = Sequence(
            prompt,
            sampling,
            limit,
            on_token,
            output=list(answered),
            hand_off=True,
        )
        self._handoffs[sequence] = name, None
        engine.submit(sequence)
        try:
            with self._instance.book.queued(request, sequence.length):
                token, finish = await first
        except asyncio.CancelledError:
            engine.abort(sequence)
            # The abort may have come after the prefill: then a lease has begun.
            engine.post(lambda: self._drop(sequence))
            raise
        handoff, generation = self._held(sequence)
        piece = shown(TextStream(text.bytes, ask.stops, answered), token, finish)
        if piece.finish and handoff:
            self._server.drop(handoff)
        self._instance.observe_prefill(sequence)
        # Of an answer that goes on, what was found says nothing of how the prompt was computed when it began.
        cached = 0 if answered else sequence.found
        given = Handoff(
            done=piece.finish is not None,
            first_token_id=token.id,
            first_logprobs=token.logprobs,
            text=piece.text,
            prompt_tokens=len(prompt),
            cached_tokens=cached,
            host=config.pod_ip,
            port=config.kv_port,
            ranks=1 + (self._others.count if self._others else 0),
            lease_s=config.lease_s,
            handoff=handoff,
            generation=generation,
            pairing_key=config.pairing_key,
            seed=sampling.seed,
            answered=answered,
            gpu=pace.gpu.product if pace else "",
            rdma=pace.rdma if pace else False,
        )
        body = openai.answer(
            ask,
            self._instance.identity(request, ask),
            int(time.time()),
            config.served_name,
            [piece],
            text.spelling,
            prompt_tokens=len(prompt),
            cached_tokens=cached,
            more={"kv_transfer_params": msgspec.to_builtins(given)},
        )
        return web.Response(body=body, content_type="application/json")

    def _name(self, ask: openai.Ask) -> str:
        """What the hand-off is called: as the router says, who can then give back what it never heard of; by a name of our own
        where it says none, or one that is taken. Raises `RequestError`."""
        said = ask.params.get("handoff")
        if said is None:
            return uuid.uuid4().hex
        if not isinstance(said, str) or not 0 < len(said) <= _LONGEST_NAME:
            raise RequestError(
                f"kv_transfer_params.handoff must be a name of 1 to {_LONGEST_NAME} characters.",
                param="kv_transfer_params",
            )
        asked = [
            name for name, _ in list(self._handoffs.values())
        ]  # the engine's thread takes some out meanwhile
        return uuid.uuid4().hex if said in asked or said in self._server.leases else said

    def _held(self, sequence: Sequence) -> tuple[str, int]:
        """Forget the sequence; name and generation of the hand-off that is held of it, if one is."""
        name, generation = self._handoffs.pop(sequence)
        return ("", 0) if generation is None else (name, generation)

    def _drop(self, sequence: Sequence) -> None:
        handoff, _ = self._held(sequence)
        if handoff:
            self._server.drop(handoff)


def _resume(ask: openai.Ask, limit: int, vocabulary: int) -> Resume | None:
    """The answer that is to go on, if one is. Raises `RequestError`."""
    said = ask.params.get("resume")
    if said is None:
        return None
    try:
        resume = msgspec.convert(said, Resume)
    except msgspec.ValidationError as e:
        raise RequestError(
            f"kv_transfer_params.resume is not what a router says: {e}.", param="kv_transfer_params"
        ) from None
    if not all(0 <= token < vocabulary for token in resume.answered):
        raise RequestError(
            f"kv_transfer_params.resume holds token ids outside 0 to {vocabulary - 1}.",
            param="kv_transfer_params",
        )
    if not 0 < len(resume.answered) < limit:
        raise RequestError(
            f"kv_transfer_params.resume has {len(resume.answered)} tokens of an answer of at most {limit}; it needs one and must leave one.",
            param="kv_transfer_params",
        )
    return resume

"""From a growing reply to an HTTP answer: whole, or a stream of its tokens."""

from __future__ import annotations

import time

from aiohttp import web

from disaggworker import openai
from disaggworker.worker.instance import Instance
from disaggworker.worker.text import Reply


async def respond(
    instance: Instance, request: web.Request, ask: openai.Ask, reply: Reply, prompt_tokens: int, cached: int
) -> web.StreamResponse:
    """Answer until the reply's end. `cached`: prompt tokens that were found in a prefix cache."""
    identity, created = instance.identity(request, ask), int(time.time())
    name, spelling = instance.config.served_name, instance.text.spelling
    if not ask.stream:
        while not reply.finish:
            await reply.wait()
        body = openai.answer(
            ask,
            identity,
            created,
            name,
            reply.pieces,
            spelling,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached,
        )
        return web.Response(body=body, content_type="application/json")
    frames = openai.Frames(ask, identity, created, name, spelling)
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    )
    await response.prepare(request)
    ended = False
    while not ended:  # the reply may have come to its end before this began
        await reply.wait()
        data = b"".join([frames.token(piece) for piece in reply.take()])
        if ended := reply.finish is not None:
            data += frames.end(prompt_tokens, reply.tokens, cached)
        await response.write(data)
    await response.write_eof()
    return response

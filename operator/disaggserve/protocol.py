"""Every byte between routers and workers: what a hand-off is, the messages of a KV pull, and what workers say of their load.

A pull is pyzmq multipart: frame 0 is one message in msgpack, tagged by `type`; a `Layout` is followed by raw
frames, two per layer (keys, values), each `blocks × block_tokens × kv_heads × head_dim` elements of `dtype`.
The decode worker asks, the prefill worker answers; every question has exactly one answer with the same `ask`.

A message of another `version` is refused, never guessed at.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from disaggserve.wire import VERSION

RefusalCode = Literal["expired", "pairing", "version", "malformed"]


class Logprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Natural logarithms of tokens' shares at one place, before temperature and filters."""

    chosen: float
    top: list[tuple[int, float]]  # token id and logarithm, the likeliest first


class Handoff(msgspec.Struct, frozen=True, kw_only=True):
    """`kv_transfer_params` of the prefill worker's answer: opaque to a router, except `done` and `seed`."""

    done: bool  # the first token already ends the request: there is nothing to pull
    first_token_id: int
    text: str  # what the first token shows; empty while a character or a stop string is incomplete
    prompt_tokens: int
    host: str  # where the prefill worker's KV socket is
    port: int
    handoff: str  # id of this hand-off, unique in the prefill worker's life
    generation: int  # of the blocks' allocation: blocks that were reused have another one
    pairing_key: str
    seed: int  # of sampling, drawn by the prefill worker where the client gave none
    answered: list[
        int
    ] = []  # tokens of the answer before the first one here: it goes on after another worker's end
    first_logprobs: Logprobs | None = None  # of the first token, where the client asks for them
    gpu: str = ""  # facts of a paced prefill worker, for the link's speed; "" = not paced
    rdma: bool = False
    version: int = VERSION


class Resume(msgspec.Struct, frozen=True, kw_only=True):
    """`resume` in `kv_transfer_params` of a question to a prefill worker: the answer was begun elsewhere and goes on."""

    answered: list[int]  # the tokens that it has
    seed: int  # with which they were drawn


class Renew(msgspec.Struct, frozen=True, tag="renew", kw_only=True):
    """I wait for this hand-off: keep its blocks for another lease."""

    ask: int
    handoff: str
    generation: int
    pairing_key: str
    version: int = VERSION


class Pull(msgspec.Struct, frozen=True, tag="pull", kw_only=True):
    """Send the KV of this hand-off."""

    ask: int
    handoff: str
    generation: int
    pairing_key: str
    version: int = VERSION


class Release(msgspec.Struct, frozen=True, tag="release", kw_only=True):
    """The KV has arrived, or nobody wants it any more: free its blocks."""

    ask: int
    handoff: str
    generation: int
    pairing_key: str
    version: int = VERSION


class Layout(msgspec.Struct, frozen=True, tag="layout", kw_only=True):
    """Answer to `Pull`: what the frames after it are."""

    ask: int
    tokens: list[int]  # the prompt, for recomputing after preemption
    layers: int
    blocks: int
    block_tokens: int
    kv_heads: int
    head_dim: int
    dtype: str  # "float16" | "bfloat16" | "float32"
    version: int = VERSION


class Done(msgspec.Struct, frozen=True, tag="done", kw_only=True):
    """Answer to `Renew` and `Release`."""

    ask: int
    version: int = VERSION


class Refused(msgspec.Struct, frozen=True, tag="refused", kw_only=True):
    """Answer to a question that cannot be granted; `reason` is a sentence for people."""

    ask: int
    code: RefusalCode
    reason: str
    version: int = VERSION


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `GET /load`, a stream of JSON lines to one router: a worker's load but for that router's own requests.

    What the router itself has here it knows better, and sooner.
    """

    queued_tokens: int  # prefill: prompt tokens that wait or are being computed
    kv_tokens: int  # decode: prompt and generated tokens of the requests here
    waiting: int  # requests of everybody
    running: int
    free_blocks: int
    total_blocks: int
    leased_blocks: int
    version: int = VERSION


Question = Renew | Pull | Release
Answer = Layout | Done | Refused

_encoder = msgspec.msgpack.Encoder()
_questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Question | Answer) -> bytes:
    """Frame 0 of a message."""
    return _encoder.encode(message)


def question(frame: bytes) -> Question:
    """Read a question. Raises `msgspec.DecodeError` (`ValidationError`) where it is none."""
    return _questions.decode(frame)


def answer(frame: bytes) -> Answer:
    """Read an answer. Raises `msgspec.DecodeError` (`ValidationError`) where it is none."""
    return _answers.decode(frame)

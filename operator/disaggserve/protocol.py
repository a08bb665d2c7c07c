"""Every byte between routers and workers: what a hand-off is, the messages by which its KV is pulled, and workers' loads.

Messages are pyzmq multipart: frame 0 is one message in msgpack, tagged by `type`. The decode worker asks, the prefill worker
answers; answers carry their question's `ask`. `Renew` and `Release` have one answer, and go to the prefill instance's rank 0.
`Pull` goes to every rank of it, and is answered by

* `Granted`, then every piece that `pieces` cuts it into: a `Piece` each, followed by one raw frame. No more of them are on
  their way than the puller has asked for, by `Pull.credit` and `More`; or
* `Stream`: ask again on a TCP connection to that port; or
* `Granted` with the `memory` of that rank's KV, which the puller then reads itself, and asks by `Renew` whether the hand-off
  was still held when it had read: what was not, was not read; or
* `Refused`, which may also come in place of a piece.

On a TCP connection each message goes after its length, 4 bytes, the highest first. `Pull` is answered by `Granted`, the bytes
of each layer as in a `Cut` of that layer and all blocks, and `Done`, which says that it was held until then; or by `Refused`.

A message of another `version` is refused, never guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec

from disaggserve.wire import VERSION

RefusalCode = Literal["expired", "pairing", "version", "malformed"]
Way = Literal[
    "zmq", "shm", "cuda_ipc", "nixl", "tcp"
]  # how the bytes go: in messages, read by the puller from the other's memory, or in a stream


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
    cached_tokens: int = 0  # of them, found in the prefill worker's prefix cache
    host: str  # where the prefill worker's KV socket is
    port: int  # of rank 0; rank r's is r higher
    ranks: int = 1  # processes that hold parts of the KV: tensor ranks × pipeline stages
    lease_s: float  # how long it is held after each word from the decode worker
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

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV is handed over: all but the first one here."""
        return self.prompt_tokens + len(self.answered)


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """A hand-off that is given back unpulled: all of `Handoff`, or the name alone that it was asked for under, where no answer came."""

    handoff: str


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
    """Give me what you hold of these layers and KV heads of this hand-off, both numbered as in the whole model."""

    ask: int
    handoff: str
    generation: int
    pairing_key: str
    layers: tuple[int, int]  # from … up to, without the last
    heads: tuple[int, int]
    ways: list[Way]  # that I can take, the best first
    credit: int  # bytes that may be on their way, at least 1; a piece that is more than what is left of it still goes
    checksum: bool = False
    version: int = VERSION


class More(msgspec.Struct, frozen=True, tag="more", kw_only=True):
    """So many bytes of that pull have been taken; it has no answer of its own."""

    ask: int  # the pull's
    credit: int
    version: int = VERSION


class Release(msgspec.Struct, frozen=True, tag="release", kw_only=True):
    """The KV has arrived, or nobody wants it any more: free its blocks."""

    ask: int
    handoff: str
    generation: int
    pairing_key: str
    version: int = VERSION


class SharedMemory(msgspec.Struct, frozen=True, tag="shm", kw_only=True):
    """A pool in memory that a process of the same host may map: `/proc/PID/fd/FD`, whose last bytes are `token`."""

    pid: int
    fd: int
    token: bytes
    blocks: int
    layers: tuple[int, int]  # of the pool, and `heads` alike: what stands where
    heads: tuple[int, int]


class CudaMemory(msgspec.Struct, frozen=True, tag="cuda_ipc", kw_only=True):
    """A pool on a GPU that a process of the same host may open."""

    token: bytes  # another one for every pool
    handles: list[bytes]  # keys, values of each layer
    blocks: int
    layers: tuple[int, int]
    heads: tuple[int, int]


class NixlMemory(msgspec.Struct, frozen=True, tag="nixl", kw_only=True):
    """A pool that is registered with NIXL."""

    agent: str
    metadata: bytes
    addresses: list[int]  # of keys, values of each layer
    device: int  # GPU; of no meaning on a CPU
    blocks: int
    layers: tuple[int, int]
    heads: tuple[int, int]


Memory = SharedMemory | CudaMemory | NixlMemory


class Granted(msgspec.Struct, frozen=True, tag="granted", kw_only=True):
    """Answer to `Pull`: what there is of what was asked for, and how it comes."""

    ask: int
    way: Way
    tokens: list[int]  # the prompt, for recomputing after preemption; empty where a rank does not know it
    layers: tuple[
        int, int
    ]  # of those that were asked for; and so `heads`. Both are empty where it holds none of them
    heads: tuple[int, int]
    blocks: int
    block_tokens: int
    head_dim: int
    dtype: str  # "float16" | "bfloat16" | "float32"
    memory: Memory | None = None
    ids: list[int] = []  # of the blocks in `memory`
    sums: list[int] = []  # of each layer, where checksums were asked for and it does not come in pieces
    version: int = VERSION


class Piece(msgspec.Struct, frozen=True, tag="piece", kw_only=True):
    """The frame after it is the next of `pieces`."""

    ask: int
    checksum: int | None = None  # zlib.crc32 of the frame
    version: int = VERSION


class Stream(msgspec.Struct, frozen=True, tag="stream", kw_only=True):
    """Answer to `Pull`: it is better asked for on a TCP connection to this port of the same host."""

    ask: int
    port: int
    version: int = VERSION


class Done(msgspec.Struct, frozen=True, tag="done", kw_only=True):
    """Answer to `Renew` and `Release`, and the end of a `Pull`'s answer on a TCP connection."""

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


Question = Renew | Pull | More | Release
Answer = Granted | Piece | Stream | Done | Refused

PIECE_BYTES = (
    1 << 23
)  # at most. A piece costs a few hundred µs beside its bytes: Python out of a cold cache, and threads that wake
_PIECES = 16  # of a transfer where none is then smaller than a quarter of that: one is gathered while others are sent and written


class Cut(NamedTuple):
    """What one piece holds: of layers `from … to - 1`, `blocks` of the hand-off's blocks from the `first` on.

    As bytes it is `[layers, 2 (keys, values), blocks, heads, block_tokens, head_dim]`.
    """

    layers: range
    first: int
    blocks: int


def pieces(layers: tuple[int, int], blocks: int, block_bytes: int) -> Iterator[Cut]:
    """How a transfer is cut: layer by layer, long layers by blocks, short ones together. `block_bytes` = one block's keys and values
    in one layer, of the heads that are sent."""
    start, stop = layers
    if not blocks or not block_bytes:
        return
    whole = (stop - start) * blocks * block_bytes
    size = min(PIECE_BYTES, max(PIECE_BYTES // 4, whole // _PIECES))
    together = size // (blocks * block_bytes)
    if together:
        for layer in range(start, stop, together):
            yield Cut(range(layer, min(layer + together, stop)), 0, blocks)
        return
    count = max(1, size // block_bytes)
    for layer in range(start, stop):
        for first in range(0, blocks, count):
            yield Cut(range(layer, layer + 1), first, min(count, blocks - first))


_encoder = msgspec.msgpack.Encoder()
_questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Question | Answer) -> bytes:
    """Frame 0 of a message."""
    return _encoder.encode(message)


def question(frame: bytes | bytearray | memoryview) -> Question:
    """Read a question. Raises `msgspec.DecodeError` (`ValidationError`) where it is none."""
    return _questions.decode(frame)


def answer(frame: bytes | bytearray | memoryview) -> Answer:
    """Read an answer. Raises `msgspec.DecodeError` (`ValidationError`) where it is none."""
    return _answers.decode(frame)

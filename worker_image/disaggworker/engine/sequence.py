"""One request as the engine sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from disaggserve.protocol import Logprobs
from disaggworker.kv.blocks import BLOCK_TOKENS, Allocation, chain


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, what is said of it, and which one is the last. `temperature` 0 = the likeliest."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    seed: int = 0
    ignore_eos: bool = False
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None  # of the chosen token, and of so many of the likeliest; None = of none


class Token(NamedTuple):
    """One token of an answer."""

    id: int
    logprobs: Logprobs | None = None


@dataclasses.dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it. Only the engine's thread changes it."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int  # at least 1
    on_token: Callable[[Token, str | None], None]  # token, finish reason; called on the event loop
    output: list[int] = dataclasses.field(default_factory=list)
    kv: Allocation | None = None
    computed: int = 0  # tokens whose keys and values are in `kv`, those of a step in flight too
    hand_off: bool = False  # another instance decodes it: its blocks are held after prefill
    on_admitted: Callable[[], None] | None = None  # prefilled elsewhere: `kv` is there to pull into
    aborted: bool = False
    in_flight: int = 0  # steps that hold it and whose time is not over
    pulling: bool = False  # somebody writes to its blocks from outside the engine: they must not be freed
    lane: int = 0  # decode with pipeline stages
    found: int = 0  # prompt tokens that the prefix cache had
    keys: list[bytes] = dataclasses.field(default_factory=list)  # of its full blocks, as far as asked for
    arrived_s: float = 0.0  # monotonic
    scheduled_s: float = 0.0  # its first step's start; 0 = none yet
    last_token_s: float = 0.0  # 0 = none yet
    first_token_s: float = 0.0

    def deliver(self, token: Token, finish: str | None, now_s: float) -> float | None:
        """Hand a token over, on the event loop; seconds since the one before it, None for the first."""
        gap_s = now_s - self.last_token_s if self.last_token_s else None
        self.first_token_s = self.first_token_s or now_s
        self.last_token_s = now_s
        self.on_token(token, finish)
        return gap_s

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def owed(self) -> int:
        """Tokens before its last one that are not computed: 0 where it decodes and was not put back."""
        return self.length - 1 - self.computed

    def tokens(self, start: int, end: int) -> list[int]:
        """Those at these places of prompt and output."""
        split = len(self.prompt)
        if start >= split:
            return self.output[start - split : end - split]
        return self.prompt[start:end] + self.output[: max(0, end - split)]

    def keys_to(self, tokens: int) -> list[bytes]:
        """Keys of the blocks that its first so many tokens fill."""
        full, known = tokens // BLOCK_TOKENS, len(self.keys)
        if known < full:
            chain(self.keys, self.tokens(known * BLOCK_TOKENS, full * BLOCK_TOKENS))
        return self.keys[:full]

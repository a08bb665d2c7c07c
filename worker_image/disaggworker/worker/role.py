"""What a worker does at present: its role, who gave it, and what is in flight of each kind. On the event loop."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Annotated, Literal

import msgspec

from disaggworker import openai
from disaggworker.config import Role
from disaggworker.errors import RequestError

Kind = Literal["prefill", "decode", "whole"]  # halves of an answer, and both in one

KINDS: Mapping[Role, frozenset[Kind]] = {
    "prefill": frozenset({"prefill"}),
    "decode": frozenset({"decode"}),
    "mixed": frozenset({"prefill", "decode", "whole"}),
}


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /role`. `epoch` never falls: who asked last wins, and asking again changes nothing."""

    role: Role
    epoch: Annotated[int, msgspec.Meta(ge=0)]
    chunk: Annotated[int, msgspec.Meta(ge=1)] | None = (
        None  # tokens of a step of a mixed worker; None: whole prompts
    )


class NotIdle(Exception):
    """The role stays: a sentence, and what is still held."""

    def __init__(self, message: str, counts: Mapping[str, int]) -> None:
        super().__init__(message)
        self.counts = counts


def kind(ask: openai.Ask) -> Kind:
    """Which half of an answer is asked for, or all of it."""
    if ask.whole:
        return "whole"
    return "prefill" if ask.params.get("do_remote_decode") else "decode"


class Duty:
    """A role, the epoch that gave it, and how prompts are cut."""

    def __init__(self, role: Role, chunk: int) -> None:
        self.role, self.chunk, self.epoch = role, chunk, 0
        self.in_flight: Counter[Kind] = Counter()
        self._closed: frozenset[Kind] = frozenset()  # while it is found out whether nothing of them is held

    @contextlib.contextmanager
    def holding(self, ask: openai.Ask) -> Iterator[Kind]:
        """Count the request while it lasts. Raises `RequestError` where it is none of this role's."""
        asked = kind(ask)
        if asked not in KINDS[self.role] - self._closed:
            raise self._refusal(ask, asked)
        self.in_flight[asked] += 1
        try:
            yield asked
        finally:
            self.in_flight[asked] -= 1

    def _refusal(self, ask: openai.Ask, asked: Kind) -> RequestError:
        if asked in self._closed:
            return RequestError("This worker is taking another role.", status=503)
        if asked == "whole":
            return RequestError(
                "kv_transfer_params is missing: this worker serves one half of a request; send requests to the router.",
                param="kv_transfer_params",
            )
        if asked == "decode" and "handoff" not in ask.params:
            return RequestError(
                f"kv_transfer_params.do_remote_decode must be true: this is a {self.role} worker.",
                param="kv_transfer_params",
            )
        # A router whose view is old: it may try elsewhere.
        return RequestError(f"This is a {self.role} worker, and does not {asked}.", status=503)

    async def take(self, turn: Turn, held: Callable[[], Awaitable[Mapping[str, int]]]) -> None:
        """Take another role where nothing of the kinds that it does not serve is held. Raises `NotIdle`.

        `held`: what the engine and the leases hold, counted after everything that was submitted so far.
        """
        now, chunk = (self.role, self.chunk), turn.chunk or 0
        if turn.epoch < self.epoch or (turn.epoch == self.epoch and now != (turn.role, chunk)):
            raise NotIdle(
                f"Epoch {self.epoch} made this a {self.role} worker; {turn.epoch} is not after it.", {}
            )
        if self._closed:
            raise NotIdle("Another change of role is under way.", {})
        self._closed = lost = KINDS[self.role] - KINDS[turn.role]
        try:
            counts = dict(await held()) if lost else {}
            counts["requests"] = sum(self.in_flight[asked] for asked in lost)
            # What a mixed worker holds may be of the kind that it keeps; of that the requests say enough.
            binding = {"requests"} if self.role == "mixed" else set(counts) - {"leased"}
            if any(counts[name] for name in binding) or ("prefill" in lost and counts["leased"]):
                words = ", ".join(f"{n} {name}" for name, n in counts.items())
                raise NotIdle(f"This {self.role} worker is not idle: {words}.", counts)
        finally:
            self._closed = frozenset()
        self.role, self.chunk, self.epoch = turn.role, chunk, turn.epoch

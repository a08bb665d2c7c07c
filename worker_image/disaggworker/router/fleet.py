"""The instances that the router knows, what is held on each, and the choice among them.

A load is this router's own requests, exactly, plus what the instance says of all others' (`loads`). One that has stopped saying
so is unknown, not idle: it is passed over while others are known.

Pure data: no clock, no network; `now_s` is any rising clock. Not thread-safe, and need not be: one event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from disaggserve.dispatch import choose_decode, choose_prefill, until_first_token
from disaggserve.protocol import Load
from disaggworker.router.prefixes import Prefixes
from disaggworker.router.request import Request

Role = Literal["prefill", "decode", "mixed"]
Phase = Literal["prefill", "decode"]

BAR_FIRST_S, BAR_MOST_S = 0.5, 10.0
BAR_ANSWERED_S = 0.25
WARM_AFTER = 32  # answers: until then a new instance is given one request more than it has answered, and no more at a time


@dataclass(frozen=True)
class Seen:
    """One instance as discovery sees it."""

    uid: str
    name: str
    role: Role
    pairing_key: str
    url: str  # http://ADDRESS:PORT
    ready: bool  # passes its readiness probe and is not terminating
    draining: bool = False  # the operator wants it empty: no new requests
    engine: str = "torch"  # whose dialect it speaks
    pair: str = ""  # uid of the pod that it shares with the other half of a low-affinity pair

    @property
    def within(self) -> str:
        """Who can read its KV: all of its pairing key, or of a pair the other half alone (what the plan reckons with)."""
        return f"{self.pairing_key} of {self.pair}" if self.pair else self.pairing_key


class Instance:
    """One instance and what is held there."""

    __slots__ = (
        "answered",
        "barred_until_s",
        "caches",
        "faults",
        "in_flight",
        "known",
        "kv_tokens",
        "leased",
        "lost",
        "others",
        "prefixes",
        "queued_tokens",
        "seen",
    )

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.known = True  # in the latest view
        self.in_flight = 0  # requests sent and not answered (decode: not answered in full)
        self.leased = 0  # prefill: answered requests whose KV no decode has confirmed to have
        self.queued_tokens = 0  # prefill: prompt tokens of the requests in flight
        self.kv_tokens = 0  # decode: prompt and generated tokens of the requests in flight
        self.faults = 0  # in a row
        self.barred_until_s = 0.0
        self.answered = 0  # requests, since it came up; counted to WARM_AFTER
        self.others: Load | None = (
            None  # what it said last of its load but for ours; None where it says nothing
        )
        self.lost = False  # it says so, as a rule, and does not now
        self.prefixes = Prefixes()
        self.caches = False  # it has a prefix cache, and says what it found there

    def does(self, phase: Phase) -> bool:
        return self.seen.role in (phase, "mixed")

    @property
    def admitting(self) -> bool:
        return self.known and self.seen.ready and not self.seen.draining

    @property
    def all_queued_tokens(self) -> int:
        return self.queued_tokens + (self.others.queued_tokens if self.others else 0)

    @property
    def all_kv_tokens(self) -> int:
        return self.kv_tokens + (self.others.kv_tokens if self.others else 0)

    @property
    def has_room(self) -> bool:
        """Slow start: caches, connections and compiled code of a new one are cold, and whether it works is to be seen."""
        return self.answered >= WARM_AFTER or self.in_flight <= self.answered

    def uncached_tokens(self, request: Request) -> int:
        """Of its prompt, as far as the router knows: at least the last one is computed."""
        known = self.prefixes.known_tokens(request.prefix) if self.caches else 0
        return max(1, request.input_tokens - known)

    def __repr__(self) -> str:
        return f"{self.seen.role} {self.seen.name} at {self.seen.url}"


class Hold:
    """What one request holds of one instance, from sending it to the end; `end` may be called again."""

    __slots__ = ("_in_flight", "_kv_tokens", "_leased", "_queued_tokens", "instance")

    def __init__(self, instance: Instance, *, queued_tokens: int = 0, kv_tokens: int = 0) -> None:
        self.instance = instance
        self._in_flight, self._leased = 1, 0
        self._queued_tokens, self._kv_tokens = queued_tokens, kv_tokens
        instance.in_flight += 1
        instance.queued_tokens += queued_tokens
        instance.kv_tokens += kv_tokens

    @property
    def leased(self) -> bool:
        return self._leased > 0

    def answered(self) -> None:
        """Prefill has answered: from now on the request only leases KV there."""
        self._drop()
        self._leased = 1
        self.instance.leased += 1

    def decodes(self, kv_tokens: int) -> None:
        """A mixed instance has prefilled it, and goes on with it."""
        self.instance.queued_tokens -= self._queued_tokens
        self.instance.kv_tokens += kv_tokens
        self._queued_tokens, self._kv_tokens = 0, self._kv_tokens + kv_tokens

    def grow(self, tokens: int) -> None:
        """So many tokens more were generated."""
        self._kv_tokens += tokens
        self.instance.kv_tokens += tokens

    def end(self) -> None:
        self._drop()
        self.instance.leased -= self._leased
        self._leased = 0

    def _drop(self) -> None:
        self.instance.in_flight -= self._in_flight
        self.instance.queued_tokens -= self._queued_tokens
        self.instance.kv_tokens -= self._kv_tokens
        self._in_flight = self._queued_tokens = self._kv_tokens = 0


def _preferred(instances: Iterable[Instance]) -> list[Instance]:
    """Those whose load is known and that are not too new, while there are any: what is left out serves when all are so."""
    found = list(instances)
    found = [i for i in found if not i.lost] or found
    return [i for i in found if i.has_room] or found


class Fleet:
    """All instances of one resource."""

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}

    def update(self, view: Iterable[Seen]) -> None:
        """Takes the whole latest view. An instance that left it is forgotten when nothing is held there any more."""
        seen = {s.uid: s for s in view}
        for uid, instance in list(self._instances.items()):
            instance.known = uid in seen
            if not instance.known and not instance.in_flight and not instance.leased:
                del self._instances[uid]
        for uid, s in sorted(seen.items(), key=lambda item: item[1].name):
            instance = self._instances.setdefault(uid, Instance(s))
            if s.ready and not instance.seen.ready:  # it came up anew
                instance.faults, instance.barred_until_s, instance.answered = 0, 0.0, 0
                instance.prefixes = Prefixes()
            instance.seen = s

    def prefill(
        self,
        now_s: float,
        request: Request | None = None,
        goes_on: Callable[[Instance], bool] | None = None,
    ) -> Instance | None:
        """The fewest tokens until the first one of `request`, among those whose KV some decode can read. Of pairs alike in that
        the one whose decode is the least loaded: it is settled with the prefill.

        `goes_on` says of an answer that was begun where it can go on; there draining ones take it, too, where no other can.
        """
        if goes_on is None:
            keys = {i.seen.within for i in self._admitting("decode", now_s)}
            found = _preferred(i for i in self._admitting("prefill", now_s) if i.seen.within in keys)
        else:
            able = [i for i in self._able("prefill", now_s) if goes_on(i)]
            able = [i for i in able if self.decode(i.seen.within, now_s) is not None]
            found = _preferred(i for i in able if i.admitting) or able
        if not found:
            return None
        if any(i.seen.pair for i in found):
            # Ties go to the first.
            found.sort(key=lambda i: self._beside(i).all_kv_tokens if i.seen.pair else 0)
        queued = [i.all_queued_tokens for i in found]
        if request is None:
            return found[choose_prefill(queued)]
        uncached = [i.uncached_tokens(request) for i in found]
        k = choose_prefill(until_first_token(queued, uncached))
        request.uncached_tokens = uncached[k]
        found[k].prefixes.note(request.prefix)
        return found[k]

    def decode(self, within: str, now_s: float) -> Instance | None:
        """The least loaded by KV tokens, of those that can read this KV (`Seen.within`).

        Requests that are through prefill may go to a draining one when no other has their key: their KV fits nowhere else.
        """
        able = [i for i in self._able("decode", now_s) if i.seen.within == within]
        found = _preferred(i for i in able if i.admitting) or able
        return found[choose_decode([i.all_kv_tokens for i in found])] if found else None

    def fault(self, instance: Instance, now_s: float, *, answered: bool = False) -> None:
        """It failed a request: nothing is sent there for a while, twice as long each time in a row.

        A dead instance has the shortest queue of all, and the view may not know of its death for a long time. One that
        answered (5xx) lives; the request may be what it cannot bear, so it is left alone only shortly.
        """
        if answered:
            bar_s = BAR_ANSWERED_S
        else:
            instance.faults += 1
            bar_s = min(BAR_MOST_S, BAR_FIRST_S * 2.0 ** min(instance.faults - 1, 10))
        instance.barred_until_s = max(instance.barred_until_s, now_s + bar_s)

    def generated(self, instance: Instance) -> None:
        """It gave a request its first token there."""
        instance.answered = min(WARM_AFTER, instance.answered + 1)

    def worked(self, instance: Instance) -> None:
        """It answered a request in full."""
        instance.faults = 0

    def next_chance_s(self, now_s: float) -> float | None:
        """When the next barred instance may be tried again; None when none is barred."""
        return min(
            (i.barred_until_s for i in self._instances.values() if i.barred_until_s > now_s), default=None
        )

    def lacking(self) -> str | None:
        """Why no request could be served now, or None when one could."""
        phases: tuple[Phase, ...] = ("prefill", "decode")
        keys = {
            phase: {i.seen.within for i in self._instances.values() if i.does(phase) and i.admitting}
            for phase in phases
        }
        if keys["prefill"] & keys["decode"]:
            return None
        missing = [phase for phase in phases if not keys[phase]]
        if missing:
            return f"no {' and no '.join(missing)} instance is ready"
        return "no ready prefill instance has the pairing key of a ready decode instance"

    def drain_view(self) -> dict[str, dict[str, Any]]:
        """Per pod of the latest view, by uid, what the operator must know before it deletes it; of a pair what both hold.

        The last decode instances of a pairing key are also needed by whatever prefill instances of that key still hold.
        """
        out: dict[str, dict[str, Any]] = {}
        for uid, i in self._instances.items():
            if not i.known:
                continue
            in_flight, within = i.in_flight, i.seen.within
            leased_blocks = i.others.leased_blocks if i.others and not i.lost else None
            if i.seen.pair and (half := out.get(i.seen.pair)):
                half["in_flight"] += in_flight
                half["leased"] += i.leased
                blocks = (half["leased_blocks"], leased_blocks)
                half["leased_blocks"] = None if None in blocks else sum(blocks)
                continue
            if i.seen.role == "decode" and not any(d.admitting for d in self._of("decode", within)):
                in_flight += sum(p.in_flight + p.leased for p in self._of("prefill", within))
            out[i.seen.pair or uid] = {
                "name": i.seen.name,
                "admitting": i.admitting,
                "in_flight": in_flight,
                "leased": i.leased,
                "leased_blocks": leased_blocks,
            }
        return out

    def instances(self) -> Sequence[Instance]:
        return tuple(self._instances.values())

    def check_integrity(self) -> None:
        """Raises AssertionError when something is held although every request has ended."""
        for i in self._instances.values():
            held = (i.in_flight, i.leased, i.queued_tokens, i.kv_tokens)
            assert held == (0, 0, 0, 0), f"{i} still holds (in flight, leased, queued, KV tokens) {held}"

    def cached(self, instance: Instance, tokens: int | None) -> None:
        """It found so many tokens of a prompt in its prefix cache; None where it does not say."""
        if tokens is not None:  # some say so only where they found something
            instance.caches = True

    def _of(self, phase: Phase, within: str) -> list[Instance]:
        return [i for i in self._instances.values() if i.does(phase) and i.seen.within == within]

    def _beside(self, half: Instance) -> Instance:
        """The decode instance of its pair."""
        return self._instances[f"{half.seen.pair}/decode"]

    def _able(self, phase: Phase, now_s: float) -> list[Instance]:
        """Those that serve, draining ones included."""
        return [
            i
            for i in self._instances.values()
            if i.does(phase) and i.known and i.seen.ready and now_s >= i.barred_until_s
        ]

    def _admitting(self, phase: Phase, now_s: float) -> list[Instance]:
        return [i for i in self._able(phase, now_s) if i.admitting]

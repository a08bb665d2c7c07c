"""The next step from what stands to what is wanted, from observed facts alone.

Create, re-plan, heal, upgrade and roll back are all the same difference of two multisets of instances; there is no phase and
no memory. Drain is the only state, and it is read from the routers.

Rules, checked by property tests:

* never more GPUs than the larger of both plans + `max_surge_gpus`, and none on a node that has none free;
* an instance that both plans want is left alone;
* an instance that serves is drained only when the rest carries its role's share of the traffic;
* an instance is deleted only when every router says that nothing is in flight or leased on it, or after the drain timeout;
* a predecessor that failed, terminates or sits on a lost node is capacity nowhere, and its successor has the next attempt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from disaggserve.api.plan import Slot

Identity = tuple[str, int, int, int]


def identity(slot: Slot) -> Identity:
    """What names an instance, but for the attempt: pairing key, shape, slot number."""
    return (slot.pairing_key, slot.tp, slot.pp, slot.slot)


@dataclass(frozen=True)
class Load:
    """What all routers together say of one instance. Unknown is `None` in its place, never a zero."""

    admitting: bool
    in_flight: int
    leased: int

    @property
    def drained(self) -> bool:
        return not self.admitting and self.in_flight == 0 and self.leased == 0


@dataclass(frozen=True)
class Instance:
    """One pod as it stands. Ages are seconds; `drain_age_s` is None when it is not draining."""

    name: str
    uid: str
    slot: Slot
    attempt: int
    ready: bool = False
    failed: bool = False
    terminating: bool = False
    lost: bool = False
    drain_age_s: float | None = None
    load: Load | None = None
    age_s: float = 0.0
    scheduled: bool = True
    unscheduled_reason: str = ""

    @property
    def alive(self) -> bool:
        return not (self.failed or self.terminating or self.lost)

    @property
    def serves(self) -> bool:
        return self.alive and self.ready and self.drain_age_s is None


@dataclass(frozen=True)
class Limits:
    """`free`: GPUs free on each node now, after everything that stands there."""

    free: Mapping[str, int]
    max_surge_gpus: int
    drain_timeout_s: float


@dataclass(frozen=True)
class Create:
    slot: Slot
    attempt: int


@dataclass(frozen=True)
class Step:
    """What may be done now; empty and `done` when what stands is what is wanted."""

    create: tuple[Create, ...] = ()
    admit: tuple[Instance, ...] = ()
    drain: tuple[Instance, ...] = ()
    delete: tuple[Instance, ...] = ()
    waiting: str = ""
    blocked_by: str = ""
    done: bool = False

    @property
    def acts(self) -> bool:
        return bool(self.create or self.admit or self.drain or self.delete)


def _gpus(slots: Sequence[Slot]) -> int:
    return sum(s.gpus for s in slots)


def _share(
    role: str, serving: Sequence[Instance], wanted: Mapping[Identity, Slot], current: Sequence[Slot]
) -> float:
    """How much of the traffic the serving instances of a role carry: 1 is a whole plan, the old or the new."""
    new_n = sum(s.role == role for s in wanted.values())
    old_n = max(1, sum(s.role == role for s in current))
    share = 0.0
    for i in serving:
        if i.slot.role == role:
            share += 1 / new_n if _matches(i.slot, wanted) else 1 / old_n
    return share


def _matches(slot: Slot, wanted: Mapping[Identity, Slot]) -> bool:
    return wanted.get(identity(slot)) == slot


def _drainable(
    old: Sequence[Instance], serving: Sequence[Instance], target: Sequence[Slot], current: Sequence[Slot]
) -> list[Instance]:
    """Old instances whose share the rest already carries, in a fixed order."""
    wanted = {identity(s): s for s in target}
    ready = {identity(i.slot) for i in serving if _matches(i.slot, wanted)}
    complete = ready == set(wanted)
    keys = {s.pairing_key for s in target}
    left, out = list(serving), []
    for i in sorted(old, key=lambda i: i.name):
        rest = [x for x in left if x.name != i.name]
        # KV of another pairing key cannot be read, so old and new do not add up: the new must be whole first.
        adds_up = i.slot.pairing_key in keys
        enough = complete or (adds_up and _share(i.slot.role, rest, wanted, current) >= 1 - 1e-9)
        if enough:
            out.append(i)
            left = rest
    return out


def next_step(
    observed: Sequence[Instance], current: Sequence[Slot], target: Sequence[Slot], limits: Limits
) -> Step:
    """The next step towards `target`; `current` is the plan before it, which the traffic is served by until then.

    Deterministic and stateless: called again on what it has led to, it goes on; called on the end state, it says done.
    """
    wanted = {identity(s): s for s in target}
    latest: Counter[Identity] = Counter()
    for i in observed:
        latest[identity(i.slot)] = max(latest[identity(i.slot)], i.attempt + 1)
    kept = {identity(i.slot): i for i in observed if i.alive and _matches(i.slot, wanted)}
    old = [i for i in observed if i.alive and kept.get(identity(i.slot)) is not i]
    serving = [i for i in observed if i.serves]

    admit = tuple(i for i in kept.values() if i.drain_age_s is not None)
    drain, delete, waits = [], [i for i in observed if (i.failed or i.lost) and not i.terminating], []
    may_go = {i.name for i in _drainable([i for i in old if i.serves], serving, target, current)}
    for i in sorted(old, key=lambda i: i.name):
        if i.drain_age_s is not None:
            if (i.load is not None and i.load.drained) or i.drain_age_s >= limits.drain_timeout_s:
                delete.append(i)
            elif i.load is None:
                waits.append(f"{i.name} drains, the routers have not said what it holds")
            else:
                waits.append(
                    f"{i.load.in_flight} requests in flight and {i.load.leased} KV hand-offs on {i.name}"
                )
        elif not i.ready:
            delete.append(i)  # never served under this plan: nothing to drain
        elif i.name in may_go:
            drain.append(i)

    create, blocked = _creations(observed, current, target, wanted, kept, latest, limits)
    starting = [i for i in kept.values() if not i.ready]
    if starting:
        waits.append(f"{len(starting)} of {len(target)} instances not ready yet")
    gone = [i for i in observed if i.terminating]
    if gone:
        waits.append(f"{len(gone)} instances terminating")
    acts = bool(create or admit or drain or delete)
    held = [i for i in old if i.serves and i.name not in may_go]
    if held and not blocked and not acts and not starting:
        blocked = f"{held[0].name} still carries traffic that nothing else can take"
    done = not (acts or waits or blocked or held or len(kept) < len(wanted))
    return Step(tuple(create), admit, tuple(drain), tuple(delete), "; ".join(waits), blocked, done)


def _creations(
    observed: Sequence[Instance],
    current: Sequence[Slot],
    target: Sequence[Slot],
    wanted: Mapping[Identity, Slot],
    kept: Mapping[Identity, Instance],
    latest: Mapping[Identity, int],
    limits: Limits,
) -> tuple[list[Create], str]:
    """Missing instances that fit now, prefill and decode in turn, and what keeps the first of the others from it."""
    held = sum(i.slot.gpus for i in observed if not i.failed)
    room = max(_gpus(current), _gpus(target)) + limits.max_surge_gpus - held
    free = dict(limits.free)
    missing = [s for k, s in wanted.items() if k not in kept]
    by_role: dict[str, int] = Counter()
    order = []
    for s in sorted(missing, key=lambda s: (s.role, identity(s))):
        order.append((by_role[s.role], s.role, identity(s), s))
        by_role[s.role] += 1
    create, blocked = [], ""
    for *_, s in sorted(order, key=lambda entry: entry[:3]):
        if free.get(s.node, 0) < s.gpus:
            blocked = (
                blocked or f"{s.gpus - free.get(s.node, 0)} GPUs missing on {s.node} for a {s.role} instance"
            )
        elif room < s.gpus:
            blocked = (
                blocked or f"maxSurgeGPUs leaves {max(0, room)} GPUs, a {s.role} instance needs {s.gpus}"
            )
        else:
            create.append(Create(s, latest.get(identity(s), 0)))
            free[s.node] -= s.gpus
            room -= s.gpus
    return create, blocked


@dataclass(frozen=True)
class Path:
    """A whole rollout played to its end: every step, and what blocked it, if anything did."""

    steps: tuple[Step, ...]
    blocked_by: str
    peak_gpus: int


def play(
    observed: Sequence[Instance], current: Sequence[Slot], target: Sequence[Slot], limits: Limits
) -> Path:
    """Plays `next_step` with instances that become ready at once and drain at once: can this plan be reached at all?

    A plan without an acceptable path is no better plan: the caller holds, and says `blocked_by`.
    """
    state = [replace(i, ready=i.ready or i.alive) for i in observed if not i.terminating]
    free = dict(limits.free)
    for i in observed:
        if i.terminating:
            free[i.slot.node] = free.get(i.slot.node, 0) + i.slot.gpus
    steps: list[Step] = []
    peak = sum(i.slot.gpus for i in state)
    while True:
        step = next_step(state, current, target, replace(limits, free=free))
        steps.append(step)
        if not step.acts:
            return Path(tuple(steps), "" if step.done else step.blocked_by or step.waiting, peak)
        leaving = {i.name for i in step.delete}
        for i in step.delete:
            free[i.slot.node] = free.get(i.slot.node, 0) + i.slot.gpus
        draining = {i.name for i in step.drain}
        admitted = {i.name for i in step.admit}
        state = [
            replace(i, drain_age_s=0.0, load=Load(False, 0, 0))
            if i.name in draining
            else replace(i, drain_age_s=None, load=None)
            if i.name in admitted
            else i
            for i in state
            if i.name not in leaving
        ]
        for c in step.create:
            free[c.slot.node] -= c.slot.gpus
            state.append(Instance(f"~{identity(c.slot)}-{c.attempt}", "", c.slot, c.attempt, ready=True))
        peak = max(peak, sum(i.slot.gpus for i in state))

"""The next step from what stands to what is wanted, from observed facts alone.

Create, re-plan, heal, upgrade and roll back are all the same difference of two multisets of instances; there is no phase and
no memory. Drain is the only state, and it is read from the routers; what an instance's role really is, from its own word.

Rules, checked by property tests:

* never more GPUs than the larger of both plans + `max_surge_gpus`, and none on a node that has none free;
* an instance that both plans want is left alone, and one that they want in two roles is turned: drained, told its new role,
  admitted again, one at a time. Where it can be turned at all, nothing is created or deleted for it;
* an instance that serves is drained only when the rest carries the traffic of all that it does (a mixed one and a pair do both);
* an instance is deleted or turned only when every router says that nothing is in flight or leased on it; after the drain
  timeout it is deleted, also where it should have been turned;
* none is admitted that has not said that it has the role of its label;
* a predecessor that failed, terminates or sits on a lost node is capacity nowhere, and its successor has the next attempt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from disaggserve.api.plan import Identity, Slot, SlotRole
from disaggserve.engines import RoleChange

Phase = Literal["prefill", "decode"]
PHASES: Mapping[SlotRole, tuple[Phase, ...]] = {
    "prefill": ("prefill",),
    "decode": ("decode",),
    "mixed": ("prefill", "decode"),
    "pair": ("prefill", "decode"),
}


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
    """One pod as it stands. Ages are seconds; `drain_age_s` is None when it is not draining.

    `role_change`: how it takes another role (None: not at all). `says`: the role that it says it has, asked while it drains;
    None is unknown.
    """

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
    role_change: RoleChange | None = None
    says: SlotRole | None = None

    @property
    def alive(self) -> bool:
        return not (self.failed or self.terminating or self.lost)

    @property
    def serves(self) -> bool:
        return self.alive and self.ready and self.drain_age_s is None

    def may_become(self, slot: Slot) -> bool:
        """Whether a change of role makes it what is wanted. Where the label is all there is, the chunk is a flag that stays."""
        if (
            self.role_change is None
            or self.slot == slot
            or (self.role_change == "label" and slot.chunk != self.slot.chunk)
        ):
            return False
        return self.slot.of_role(slot.role, slot.chunk) == slot

    @property
    def strange(self) -> bool:
        """Whether it drains and has yet to say that it has the role of its label."""
        return self.drain_age_s is not None and self.role_change == "door" and self.says != self.slot.role


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
class Turn:
    """An empty instance takes the role of `slot`."""

    instance: Instance
    slot: Slot


@dataclass(frozen=True)
class Step:
    """What may be done now; empty and `done` when what stands is what is wanted."""

    create: tuple[Create, ...] = ()
    turn: tuple[Turn, ...] = ()
    admit: tuple[Instance, ...] = ()
    drain: tuple[Instance, ...] = ()
    delete: tuple[Instance, ...] = ()
    waiting: str = ""
    blocked_by: str = ""
    done: bool = False

    @property
    def acts(self) -> bool:
        return bool(self.create or self.turn or self.admit or self.drain or self.delete)


def readable(serving: Iterable[Instance]) -> bool:
    """Whether among these some instance prefills what another, or itself, can decode."""
    keys: dict[Phase, set[str]] = {"prefill": set(), "decode": set()}
    for i in serving:
        for phase in PHASES[i.slot.role]:
            keys[phase].add(i.slot.pairing_key)
    return bool(keys["prefill"] & keys["decode"])


def _gpus(slots: Sequence[Slot]) -> int:
    return sum(s.gpus for s in slots)


@dataclass(frozen=True)
class _Traffic:
    """How much of it instances carry: of each phase, 1 is a whole plan, the old or the new."""

    wanted: Mapping[Identity, Slot]
    current: Sequence[Slot]

    def carried(self, phase: Phase, serving: Iterable[Instance]) -> float:
        new_n = sum(phase in PHASES[s.role] for s in self.wanted.values())
        old_n = max(1, sum(phase in PHASES[s.role] for s in self.current))
        return sum(
            1 / new_n if self.wanted.get(i.slot.identity) == i.slot else 1 / old_n
            for i in serving
            if phase in PHASES[i.slot.role]
        )

    def can_spare(self, instance: Instance, rest: Sequence[Instance]) -> bool:
        return all(self.carried(p, rest) >= 1 - 1e-9 for p in PHASES[instance.slot.role])


def _drainable(
    turning: Sequence[Instance],
    old: Sequence[Instance],
    serving: Sequence[Instance],
    target: Sequence[Slot],
    current: Sequence[Slot],
) -> set[str]:
    """Names of those that serve and whose share the rest carries, in a fixed order: at most one to be turned, first."""
    wanted = {s.identity: s for s in target}
    traffic = _Traffic(wanted, current)
    complete = {i.slot.identity for i in serving if wanted.get(i.slot.identity) == i.slot} == set(wanted)
    keys = {s.pairing_key for s in target}
    left, out = list(serving), set[str]()
    for n, i in enumerate((*turning, *old)):
        if n < len(turning) and out:
            continue
        rest = [x for x in left if x.name != i.name]
        # KV of another pairing key cannot be read, so old and new do not add up: the new must be whole first.
        adds_up = i.slot.pairing_key in keys
        if complete or (adds_up and traffic.can_spare(i, rest)):
            out.add(i.name)
            left = rest
    return out


def next_step(
    observed: Sequence[Instance], current: Sequence[Slot], target: Sequence[Slot], limits: Limits
) -> Step:
    """The next step towards `target`; `current` is the plan before it, which the traffic is served by until then.

    Deterministic and stateless: called again on what it has led to, it goes on; called on the end state, it says done.
    """
    observed = sorted(observed, key=lambda i: i.name)
    wanted = {s.identity: s for s in target}
    latest: Counter[Identity] = Counter()
    for i in observed:
        latest[i.slot.identity] = max(latest[i.slot.identity], i.attempt + 1)
    alive = [i for i in observed if i.alive]
    late = {i.name for i in alive if i.drain_age_s is not None and i.drain_age_s >= limits.drain_timeout_s}
    kept = {
        i.slot.identity: i
        for i in alive
        if wanted.get(i.slot.identity) == i.slot and not (i.strange and i.name in late)
    }
    turning = {
        i.slot.identity: i
        for i in alive
        if i.slot.identity in wanted.keys() - kept.keys()
        and i.may_become(wanted[i.slot.identity])
        and i.name not in late
    }
    stays = {i.name for i in (*kept.values(), *turning.values())}
    old = [i for i in alive if i.name not in stays]
    serving = [i for i in alive if i.serves]

    turn, admit, drain, waits = [], [], [], []
    delete = [i for i in observed if (i.failed or i.lost) and not i.terminating]
    for i in kept.values():
        if i.drain_age_s is None:
            continue
        if not i.strange:
            admit.append(i)
        elif i.says is None:
            waits.append(f"{i.name} has not said which role it has")
        else:
            turn.append(Turn(i, i.slot))  # it began anew, or its turn was interrupted, and another plan came
    busy = [i for i in (*kept.values(), *turning.values()) if i.ready and i.drain_age_s is not None]
    may_turn = [] if busy else [i for i in turning.values() if i.serves]
    may_go = _drainable(may_turn, [i for i in old if i.serves], serving, target, current)
    for i in turning.values():
        if i.drain_age_s is not None:
            if not i.ready:
                waits.append(f"{i.name} is not ready, and takes its new role when it is")
            elif i.load is not None and i.load.drained:
                turn.append(Turn(i, wanted[i.slot.identity]))
            else:
                waits.append(_held(i))
        elif i.name in may_go or not i.ready:
            drain.append(i)
    for i in old:
        if i.drain_age_s is not None:
            if (i.load is not None and i.load.drained) or i.name in late:
                delete.append(i)
            else:
                waits.append(_held(i))
        elif not i.ready:
            delete.append(i)  # never served under this plan: nothing to drain
        elif i.name in may_go:
            drain.append(i)

    missing = [s for k, s in wanted.items() if k not in kept and k not in turning]
    create, blocked = _creations(observed, current, target, missing, latest, limits)
    starting = [i for i in kept.values() if not i.ready]
    if starting:
        waits.append(f"{len(starting)} of {len(target)} instances not ready yet")
    gone = [i for i in observed if i.terminating]
    if gone:
        waits.append(f"{len(gone)} instances terminating")
    held = [i for i in (*turning.values(), *old) if i.serves and i.name not in may_go]
    if held and not (blocked or create or turn or admit or drain or delete or waits):
        # What cannot be spared, not even for the time of a turn, gets a successor beside it where GPUs allow.
        anew = [wanted[i.slot.identity] for i in turning.values() if i.serves][:1]
        create, blocked = _creations(observed, current, target, anew, latest, limits)
        if not create:
            blocked = f"{held[0].name} still carries traffic that nothing else can take" + (
                blocked and f"; {blocked}"
            )
    step = Step(
        tuple(create), tuple(turn), tuple(admit), tuple(drain), tuple(delete), "; ".join(waits), blocked
    )
    done = not (step.acts or waits or blocked or held or len(kept) < len(wanted))
    return replace(step, done=done)


def _held(i: Instance) -> str:
    if i.load is None:
        return f"{i.name} drains, the routers have not said what it holds"
    if i.load.admitting:
        return f"{i.name} drains, and not every router has seen it yet"
    return f"{i.load.in_flight} requests in flight and {i.load.leased} KV hand-offs on {i.name}"


def _what(slot: Slot) -> str:
    return "pair" if slot.role == "pair" else f"{slot.role} instance"


def _creations(
    observed: Sequence[Instance],
    current: Sequence[Slot],
    target: Sequence[Slot],
    missing: Sequence[Slot],
    latest: Mapping[Identity, int],
    limits: Limits,
) -> tuple[list[Create], str]:
    """Missing instances that fit now, prefill and decode in turn, and what keeps the first of the others from it."""
    held = sum(i.slot.gpus for i in observed if not i.failed)
    room = max(_gpus(current), _gpus(target)) + limits.max_surge_gpus - held
    free = dict(limits.free)
    by_role: dict[str, int] = Counter()
    order = []
    for s in sorted(missing, key=lambda s: (s.role, s.identity)):
        order.append((by_role[s.role], s.role, s.identity, s))
        by_role[s.role] += 1
    create, blocked = [], ""
    for *_, s in sorted(order, key=lambda entry: entry[:3]):
        if free.get(s.node, 0) < s.gpus:
            blocked = blocked or f"{s.gpus - free.get(s.node, 0)} GPUs missing on {s.node} for a {_what(s)}"
        elif room < s.gpus:
            blocked = blocked or f"maxSurgeGPUs leaves {max(0, room)} GPUs, a {_what(s)} needs {s.gpus}"
        else:
            create.append(Create(s, latest.get(s.identity, 0)))
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
    """Plays `next_step` with instances that become ready, drain and turn at once: can this plan be reached at all?

    A plan without an acceptable path is no better plan: the caller holds, and says `blocked_by`.
    """
    state = [
        replace(
            i,
            ready=i.ready or i.alive,
            load=None if i.drain_age_s is None else Load(False, 0, 0),
            says=i.says or i.slot.role,
        )
        for i in observed
        if not i.terminating
    ]
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
        for i in step.delete:
            free[i.slot.node] = free.get(i.slot.node, 0) + i.slot.gpus
        state = after(step, state)
        for c in step.create:
            free[c.slot.node] -= c.slot.gpus
        peak = max(peak, sum(i.slot.gpus for i in state))


def after(step: Step, state: Sequence[Instance]) -> list[Instance]:
    """What stands when a step has had its whole effect."""
    gone, drained, admitted = ({i.name for i in some} for some in (step.delete, step.drain, step.admit))
    turned = {t.instance.name: t.slot for t in step.turn}
    out = []
    for i in state:
        if i.name in gone:
            continue
        if i.name in drained:
            i = replace(i, drain_age_s=0.0, load=Load(False, 0, 0))
        elif i.name in admitted:
            i = replace(i, drain_age_s=None, load=None)
        elif i.name in turned:
            i = replace(i, slot=turned[i.name], says=turned[i.name].role)
        out.append(i)
    for c in step.create:
        name = f"~{c.slot.identity}-{c.attempt}"
        out.append(Instance(name, "", c.slot, c.attempt, ready=True, says=c.slot.role))
    return out

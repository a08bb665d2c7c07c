"""Whole rollouts played to the end, as tables of steps, and the invariants that hold on every path."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from disaggserve import rollout
from disaggserve.api.plan import Slot
from disaggserve.rollout import PHASES, Instance, Limits, Load, next_step, play, readable

PLENTY = Limits(free={"a": 64, "b": 64}, max_surge_gpus=8, drain_timeout_s=600)


def slot(role: str, n: int = 0, tp: int = 1, key: str = "k1", template: str = "t1", node: str = "a") -> Slot:
    return Slot(slot=n, role=role, tp=tp, pp=1, node=node, pairing_key=key, template=template)  # type: ignore[arg-type]


def standing(s: Slot, attempt: int = 0, **facts: object) -> Instance:
    name = f"{s.role}-{s.pairing_key}-{s.tp}-{s.slot}-{attempt}"
    return replace(Instance(name, "u-" + name, s, attempt, ready=True), **facts)  # type: ignore[arg-type]


def table(
    observed: list[Instance], current: list[Slot], target: list[Slot], limits: Limits = PLENTY
) -> list[str]:
    def line(step: object) -> str:
        parts = []
        for verb in ("create", "turn", "admit", "drain", "delete"):
            roles = [t.slot.role for t in getattr(step, verb)]
            if roles:
                mixed = f"{roles.count('mixed')}M" if "mixed" in roles else ""
                parts.append(f"{verb} {roles.count('prefill')}P{roles.count('decode')}D{mixed}")
        return ", ".join(parts) or ("done" if step.done else "blocked")  # type: ignore[attr-defined]

    return [line(s) for s in play(observed, current, target, limits).steps]


def test_from_nothing_everything_is_created_at_once() -> None:
    assert table([], [], [slot("prefill"), slot("decode", 1)]) == ["create 1P1D", "done"]


def pair(n: int = 0, decode_tp: int = 1) -> Slot:
    return slot("pair", n).model_copy(update={"decode_tp": decode_tp})


def test_a_pair_is_one_pod_of_both_phases_that_is_never_turned() -> None:
    assert readable([standing(pair())])
    two = [pair(0), pair(1)]
    tight = replace(PLENTY, free={"a": 0}, max_surge_gpus=0)
    # One of two carries half of the traffic: where no GPU is free, the new plan waits.
    apart = [slot("prefill", 0), slot("decode", 1), slot("prefill", 2), slot("decode", 3)]
    assert [s.gpus for s in two] == [2, 2]
    for old, new in ((two, apart), (apart, two), (two, [pair(0, 2), pair(1, 2)])):
        path = play([standing(s) for s in old], old, new, PLENTY)
        assert not path.blocked_by
        assert not [s.turn for s in path.steps if s.turn]
        assert play([standing(s) for s in old], old, new, tight).blocked_by
    path = play([standing(s) for s in two], two, two[:1], PLENTY)
    assert [[i.name for i in (*s.drain, *s.delete)] for s in path.steps] == [["pair-k1-1-1-0"]] * 2 + [[]]


def test_growing_by_one_creates_exactly_one() -> None:
    old = [slot("prefill"), slot("decode", 1)]
    assert table([standing(s) for s in old], old, [*old, slot("decode", 2)]) == ["create 0P1D", "done"]


def test_shrinking_by_one_drains_and_deletes_exactly_one() -> None:
    old = [slot("prefill"), slot("decode", 1), slot("decode", 2)]
    assert table([standing(s) for s in old], old, old[:2]) == ["drain 0P1D", "delete 0P1D", "done"]


def test_a_new_shape_stands_before_the_old_one_goes() -> None:
    old = [slot("prefill", 0, 2), slot("decode", 0, 1)]
    new = [slot("prefill", 0, 4), slot("decode", 0, 1), slot("decode", 1, 1)]
    assert table([standing(s) for s in old], old, new) == ["create 1P1D", "drain 1P0D", "delete 1P0D", "done"]


def test_another_pairing_key_is_blue_green() -> None:
    old = [slot("prefill"), slot("decode", 1)]
    new = [slot("prefill", key="k2"), slot("decode", 1, key="k2")]
    assert table([standing(s) for s in old], old, new) == ["create 1P1D", "drain 1P1D", "delete 1P1D", "done"]
    # one half of the new pair alone drains nothing: its KV is unreadable for the old half
    half = [*map(standing, old), standing(new[0]), standing(new[1], ready=False)]
    assert not next_step(half, old, new, PLENTY).drain


def test_little_surge_goes_step_by_step() -> None:
    old = [slot("prefill", n, 1) for n in range(4)] + [slot("decode", 9)]
    new = [slot("prefill", n, 1, template="t2") for n in range(4, 8)] + [slot("decode", 9)]
    tight = replace(PLENTY, max_surge_gpus=1)
    assert table([standing(s) for s in old], old, new, tight) == [
        "create 1P0D",
        "drain 1P0D",
        "delete 1P0D",
    ] * 4 + ["done"]


def test_no_spare_gpu_blocks_and_says_where() -> None:
    old = [slot("prefill"), slot("decode", 1)]
    new = [slot("prefill", 0, 4, node="b"), slot("decode", 1)]
    path = play([standing(s) for s in old], old, new, replace(PLENTY, free={"a": 0, "b": 2}))
    assert path.blocked_by == "2 GPUs missing on b for a prefill instance"


def test_a_failed_instance_is_replaced_with_the_next_attempt() -> None:
    plan = [slot("prefill"), slot("decode", 1)]
    step = next_step([standing(plan[0], attempt=3, failed=True), standing(plan[1])], plan, plan, PLENTY)
    assert [(c.slot, c.attempt) for c in step.create] == [(plan[0], 4)]
    assert [i.attempt for i in step.delete] == [3]


def test_a_terminating_predecessor_is_replaced_but_not_deleted_twice() -> None:
    plan = [slot("prefill"), slot("decode", 1)]
    step = next_step([standing(plan[0], terminating=True), standing(plan[1])], plan, plan, PLENTY)
    assert [c.attempt for c in step.create] == [1]
    assert not step.delete
    assert not step.done


def test_unknown_load_is_not_zero() -> None:
    keep = [slot("prefill"), slot("decode", 1)]
    extra = standing(slot("decode", 2), drain_age_s=5.0)
    base = [standing(s) for s in keep]
    assert not next_step([*base, extra], keep, keep, PLENTY).delete
    busy = replace(extra, load=Load(False, 3, 0))
    step = next_step([*base, busy], keep, keep, PLENTY)
    assert not step.delete
    assert "3 requests in flight" in step.waiting
    assert next_step([*base, replace(extra, load=Load(False, 0, 1))], keep, keep, PLENTY).delete == ()
    assert len(next_step([*base, replace(extra, load=Load(False, 0, 0))], keep, keep, PLENTY).delete) == 1
    assert len(next_step([*base, replace(busy, drain_age_s=601.0)], keep, keep, PLENTY).delete) == 1


def test_a_draining_instance_that_is_wanted_again_is_admitted() -> None:
    plan = [slot("prefill"), slot("decode", 1)]
    step = next_step([standing(plan[0]), standing(plan[1], drain_age_s=3.0)], plan, plan, PLENTY)
    assert [i.slot.role for i in step.admit] == ["decode"]


# ---- roles that change in place: every instance here can be turned


def turnable(slots: list[Slot], **facts: object) -> list[Instance]:
    return [standing(s, role_change="door", **facts) for s in slots]


def test_an_instance_that_is_wanted_in_another_role_is_turned_and_no_pod_comes_or_goes() -> None:
    old = [slot("prefill"), slot("prefill", 1), slot("decode", 2)]
    new = [old[0].of_role("decode"), *old[1:]]
    turning = ["drain 1P0D", "turn 0P1D", "admit 0P1D", "done"]
    assert table(turnable(old), old, new) == turning
    assert table([standing(s, role_change="label") for s in old], old, new) == turning
    # an engine that cannot: another pod of the same slot, and the old one goes
    assert table([standing(s) for s in old], old, new) == ["create 0P1D, drain 1P0D", "delete 1P0D", "done"]


def test_roles_change_one_at_a_time() -> None:
    old = [slot("prefill", n) for n in range(4)] + [slot("decode", 4)]
    new = [s.of_role("decode") for s in old[:2]] + old[2:]
    assert table(turnable(old), old, new) == ["drain 1P0D", "turn 0P1D", "admit 0P1D"] * 2 + ["done"]


def test_the_last_of_a_role_is_turned_only_when_a_successor_serves() -> None:
    old = [slot("prefill"), slot("decode", 1, node="b")]
    new = [old[1].of_role("prefill"), old[0].of_role("decode")]  # the same, on each other's node
    no_room = replace(PLENTY, free={"a": 0, "b": 0})
    assert play(turnable(old), old, new, no_room).blocked_by.startswith(
        "decode-k1-1-1-0 still carries traffic"
    )
    path = play(turnable(old), old, new, PLENTY)
    assert not path.blocked_by
    assert sum(len(s.create) for s in path.steps) == 1, "one more is enough to turn the other"


def test_mixed_instances_carry_a_share_of_both() -> None:
    old = [slot("mixed"), slot("mixed", 1)]
    assert readable(map(standing, old))
    assert table([standing(s) for s in old], old, old[:1]) == ["drain 0P0D1M", "delete 0P0D1M", "done"]
    apart = [slot("prefill", 2), slot("decode", 3)]
    assert table([standing(s) for s in old], old, apart) == [
        "create 1P1D",
        "drain 0P0D2M",
        "delete 0P0D2M",
        "done",
    ]
    half = [*map(standing, old), standing(apart[0]), standing(apart[1], ready=False)]
    assert not next_step(half, old, apart, PLENTY).drain, "nothing else decodes yet"


def test_another_chunk_is_a_turn_at_the_workers_door_and_another_pod_where_it_is_a_flag() -> None:
    old, new = slot("mixed").of_role("mixed", 256), slot("mixed").of_role("mixed", 512)
    assert standing(old, role_change="door").may_become(new)
    assert not standing(old, role_change="label").may_become(new)
    assert not standing(old, role_change="door").may_become(new.model_copy(update={"node": "b"}))


def test_a_turn_waits_for_the_routers_and_is_given_up_after_the_drain_timeout() -> None:
    old = [slot("prefill"), slot("prefill", 1), slot("decode", 2)]
    new = [old[0].of_role("decode"), *old[1:]]

    def step(**facts: object) -> rollout.Step:
        return next_step([*turnable(old[:1], **facts), *turnable(old[1:])], old, new, PLENTY)

    assert step(drain_age_s=5.0).waiting.endswith("the routers have not said what it holds")
    busy = step(drain_age_s=5.0, load=Load(False, 0, 2))
    assert not busy.acts
    assert "2 KV hand-offs" in busy.waiting
    (turn,) = step(drain_age_s=5.0, load=Load(False, 0, 0)).turn
    assert turn.slot == new[0]
    assert not step(drain_age_s=5.0, load=Load(False, 0, 0), ready=False).acts
    late = step(drain_age_s=601.0, load=Load(False, 0, 2))
    assert [i.slot for i in late.delete] == [old[0]]
    assert [(c.slot, c.attempt) for c in late.create] == [(new[0], 1)]


def test_none_is_admitted_before_it_says_that_it_has_its_role() -> None:
    plan = [slot("prefill"), slot("prefill", 1), slot("decode", 2)]
    rest = turnable(plan[1:])

    def step(**facts: object) -> rollout.Step:
        drained = {"drain_age_s": 3.0, "load": Load(False, 0, 0)}
        return next_step([*turnable(plan[:1], **drained | facts), *rest], plan, plan, PLENTY)

    assert not step(says=None).acts
    assert "has not said which role" in step(says=None).waiting
    assert [t.slot for t in step(says="decode").turn] == [plan[0]], (
        "a turn that was cut off and is not wanted any more"
    )
    assert [i.slot for i in step(says="prefill").admit] == [plan[0]]
    assert [i.slot for i in step(says="decode", drain_age_s=601.0).delete] == [plan[0]]


roles = st.sampled_from(["prefill", "decode", "mixed"])


@st.composite
def turns(draw: st.DrawFn) -> tuple[list[Slot], list[Slot]]:
    """Two plans of the same pods in other roles; both can serve."""
    places = draw(
        st.lists(st.tuples(st.sampled_from([1, 2]), st.sampled_from(["a", "b"])), min_size=2, max_size=7)
    )
    old, new = ([slot(draw(roles), n, tp, node=node) for n, (tp, node) in enumerate(places)] for _ in "on")
    for plan in (old, new):
        if not readable(map(standing, plan)):
            plan[0], plan[1] = plan[0].of_role("prefill"), plan[1].of_role("decode")
    return old, new


@settings(max_examples=300, deadline=None)
@given(plans=turns(), data=st.data())
def test_turning_never_leaves_less_than_the_smaller_plan_and_ends(
    plans: tuple[list[Slot], list[Slot]], data: st.DataObject
) -> None:
    """Nothing is known of when a router, a worker or an operator answers: any subset of a step's effects may be all that came
    of it."""
    old, new = plans
    limits = replace(PLENTY, free={"a": 2, "b": 2})
    state = turnable(old)
    needed = {p: min(sum(p in PHASES[s.role] for s in plan) for plan in plans) for p in ("prefill", "decode")}
    for n in range(200):
        step = next_step(state, old, new, limits)
        assert step == next_step(list(reversed(state)), old, new, limits)
        if not step.acts:
            break
        # One at a time: those on their way to another role, or back to service.
        served = [i.slot.identity for i in state if i.slot in new]
        turning = [i for i in state if i.slot in new or i.slot.identity not in served]
        assert sum(i in step.drain or i.drain_age_s is not None for i in turning) <= 1
        if n < 20 and data.draw(st.booleans()):
            step = replace(
                step, **{data.draw(st.sampled_from(["create", "turn", "admit", "drain", "delete"])): ()}
            )
        spare = dict(limits.free)
        for i in step.delete:
            spare[i.slot.node] += i.slot.gpus
        for c in step.create:
            spare[c.slot.node] -= c.slot.gpus
        limits = replace(limits, free=spare)
        assert min(spare.values()) >= 0
        state = [replace(i, role_change="door") for i in rollout.after(step, state)]
        for phase, least in needed.items():
            assert sum(phase in PHASES[i.slot.role] for i in state if i.serves) >= least
    else:
        raise AssertionError("a rollout must end")
    if step.done:
        assert sorted(map(str, (i.slot for i in state))) == sorted(map(str, new))
    else:
        assert "still carries traffic" in step.blocked_by


@settings(max_examples=100, deadline=None)
@given(prefill=st.integers(2, 5), decode=st.integers(1, 5), surge=st.integers(0, 4), data=st.data())
def test_a_plan_that_differs_by_one_role_changes_one_instance_and_creates_and_deletes_nothing(
    prefill: int, decode: int, surge: int, data: st.DataObject
) -> None:
    old = [slot("prefill", n) for n in range(prefill)] + [slot("decode", prefill + n) for n in range(decode)]
    chosen = data.draw(st.integers(0, prefill - 1))
    new = [s.of_role("decode") if n == chosen else s for n, s in enumerate(old)]
    limits = replace(
        PLENTY, free=data.draw(st.sampled_from([{}, {"a": 1}, PLENTY.free])), max_surge_gpus=surge
    )
    for there, back in ((old, new), (new, old)):
        if sum(s.role == "decode" for s in back) and sum(s.role == "decode" for s in there) > 1:
            steps = play(turnable(there), there, back, limits).steps
            assert [(len(s.drain), len(s.turn), len(s.admit)) for s in steps] == [
                (1, 0, 0),
                (0, 1, 0),
                (0, 0, 1),
                (0, 0, 0),
            ]
            assert not any(s.create or s.delete for s in steps)
            assert steps[-1].done


def plans(key: str) -> st.SearchStrategy[list[Slot]]:
    shape = st.tuples(
        st.sampled_from(["prefill", "decode"]), st.sampled_from([1, 2, 4]), st.sampled_from(["a", "b"])
    )
    return st.lists(shape, min_size=0, max_size=5).map(
        lambda extra: [
            slot(role, n, tp, key=key, node=node)
            for n, (role, tp, node) in enumerate([("prefill", 1, "a"), ("decode", 1, "b"), *extra])
        ]
    )


@settings(max_examples=300, deadline=None)
@given(
    current=plans("k1"),
    target=st.one_of(plans("k1"), plans("k2")),
    surge=st.integers(0, 8),
    free=st.fixed_dictionaries({"a": st.integers(0, 12), "b": st.integers(0, 12)}),
)
def test_every_path_keeps_the_invariants(
    current: list[Slot], target: list[Slot], surge: int, free: dict[str, int]
) -> None:
    limits = Limits(free=free, max_surge_gpus=surge, drain_timeout_s=600)
    state = [standing(s) for s in current]
    ceiling = max(sum(s.gpus for s in current), sum(s.gpus for s in target)) + surge
    for _ in range(60):
        step = next_step(state, current, target, limits)
        if not step.acts:
            break
        spare = dict(limits.free)
        for c in step.create:
            spare[c.slot.node] -= c.slot.gpus
        assert min(spare.values()) >= 0, "no GPU is used that is not free"
        assert not {i.name for i in step.drain} & {i.name for i in step.delete}
        for i in step.delete:
            assert i.slot not in target
            spare[i.slot.node] += i.slot.gpus
        draining, leaving = {i.name for i in step.drain}, {i.name for i in step.delete}
        state = [
            replace(i, drain_age_s=1.0, load=Load(False, 0, 0)) if i.name in draining else i
            for i in state
            if i.name not in leaving
        ] + [standing(c.slot, c.attempt) for c in step.create]
        limits = replace(limits, free=spare)
        assert sum(i.slot.gpus for i in state) <= ceiling
        for key in ("k1", "k2"):
            roles = {i.slot.role for i in state if i.serves and i.slot.pairing_key == key}
            if roles == {"prefill", "decode"}:
                break
        else:
            raise AssertionError("never without a prefill and a decode that can read each other's KV")
    else:
        raise AssertionError("a rollout must end")
    if step.done:
        assert sorted(map(str, (i.slot for i in state))) == sorted(map(str, target))
    else:
        assert step.blocked_by

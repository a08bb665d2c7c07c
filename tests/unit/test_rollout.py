"""Whole rollouts played to the end, as tables of steps, and the invariants that hold on every path."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from disaggserve.api.plan import Slot
from disaggserve.rollout import Instance, Limits, Load, next_step, play

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
        for verb in ("create", "admit", "drain", "delete"):
            things = getattr(step, verb)
            if things:
                counts = {r: sum(t.slot.role == r for t in things) for r in ("prefill", "decode")}
                parts.append(f"{verb} {counts['prefill']}P{counts['decode']}D")
        return ", ".join(parts) or ("done" if step.done else "blocked")  # type: ignore[attr-defined]

    return [line(s) for s in play(observed, current, target, limits).steps]


def test_from_nothing_everything_is_created_at_once() -> None:
    assert table([], [], [slot("prefill"), slot("decode", 1)]) == ["create 1P1D", "done"]


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

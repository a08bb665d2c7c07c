"""Which instance takes a request, and what the operator is told of each."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from disaggserve.protocol import Load
from disaggworker.router.fleet import WARM_AFTER, Fleet, Hold, Instance, Role, Seen
from disaggworker.router.prefixes import Prefixes
from disaggworker.router.request import Request


def seen(name: str, role: Role, key: str = "k", **more: bool) -> Seen:
    return Seen(name, name, role, key, f"http://{name}:8000", **{"ready": True, **more})


P0, P1, D0, D1 = seen("p0", "prefill"), seen("p1", "prefill"), seen("d0", "decode"), seen("d1", "decode")


def fleet(*view: Seen) -> Fleet:
    made = Fleet()
    made.update(view)
    return made


def test_shortest_queue_by_tokens_and_least_kv() -> None:
    f = fleet(P1, P0, D1, D0)
    p = f.prefill(0)
    assert p is not None
    assert p.seen == P0  # ties: by name
    hold = Hold(p, queued_tokens=10)
    q = f.prefill(0)
    assert q is not None
    assert q.seen == P1
    more = Hold(q, queued_tokens=11)
    assert f.prefill(0) is p
    hold.answered()  # a lease is no queue
    assert (p.queued_tokens, p.in_flight, p.leased) == (0, 0, 1)
    d = f.decode("k", 0)
    assert d is not None
    assert d.seen == D0
    running = Hold(d, kv_tokens=11)
    running.grow(5)
    assert d.kv_tokens == 16
    e = f.decode("k", 0)
    assert e is not None
    assert e.seen == D1
    for h in (hold, hold, more, running):
        h.end()
    f.check_integrity()


def test_keys_do_not_mix() -> None:
    f = fleet(seen("p0", "prefill", "old"), seen("d0", "decode", "new"))
    assert f.prefill(0) is None
    assert "pairing key" in (f.lacking() or "")
    assert f.decode("old", 0) is None
    f.update([seen("p0", "prefill", "old"), seen("d0", "decode", "new"), seen("p9", "prefill", "new")])
    p = f.prefill(0)
    assert p is not None
    assert p.seen.name == "p9"
    assert f.lacking() is None


def test_only_ready_and_not_draining_ones_admit() -> None:
    assert fleet(replace(P0, ready=False), D0).lacking() == "no prefill instance is ready"
    assert fleet(replace(P0, draining=True), D0).prefill(0) is None
    assert fleet().lacking() == "no prefill and no decode instance is ready"


def test_a_draining_decode_takes_what_its_prefill_still_holds() -> None:
    f = fleet(P0, D0)
    p = f.prefill(0)
    assert p is not None
    hold = Hold(p, queued_tokens=1)
    f.update([P0, replace(D0, draining=True)])
    d = f.decode("k", 0)
    assert d is not None
    assert d.seen.name == "d0"
    view = f.drain_view()["d0"]
    assert (view["admitting"], view["in_flight"]) == (False, 1)
    hold.end()
    assert f.drain_view()["d0"]["in_flight"] == 0
    f.update([P0, replace(D0, draining=True), D1])  # another takes over
    d = f.decode("k", 0)
    assert d is not None
    assert d.seen == D1


def pair(pod: str, **more: Any) -> list[Seen]:
    """Both instances of a low-affinity pair."""
    return [
        Seen(f"{pod}/{role}", pod, role, "k", f"http://{pod}:{port}", True, pair=pod, **more)
        for role, port in (("prefill", 8001), ("decode", 8002))
    ]


def taken(f: Fleet) -> Instance:
    found = f.prefill(0)
    assert found is not None
    return found


def test_kv_stays_inside_its_pair() -> None:
    f = fleet(*pair("a"), *pair("b"), P0, D0)
    within = {i.seen.uid: i.seen.within for i in f.instances()}
    assert within["a/prefill"] == within["a/decode"] != within["b/decode"]
    for prefill, decode in (("a/prefill", "a/decode"), ("b/prefill", "b/decode"), ("p0", "d0")):
        d = f.decode(within[prefill], 0)
        assert d is not None
        assert d.seen.uid == decode
    f = fleet(*pair("a"), *pair("b"))
    f.fault(next(i for i in f.instances() if i.seen.uid == "a/decode"), 0)
    assert taken(f).seen.uid == "b/prefill", "half of a pair takes nothing"
    assert f.decode("k of a", 0) is None
    f = fleet(*pair("a")[:1], *pair("b")[1:])
    assert f.prefill(0) is None
    assert f.lacking() == "no ready prefill instance has the pairing key of a ready decode instance"


def test_of_pairs_with_equal_queues_the_one_whose_decode_holds_less() -> None:
    f = fleet(*pair("a"), *pair("b"))
    for i in f.instances():
        i.answered = WARM_AFTER
    decoding = Hold(f.decode("k of a", 0) or taken(f), kv_tokens=7)
    assert taken(f).seen.uid == "b/prefill"
    queued = Hold(taken(f), queued_tokens=1)
    assert taken(f).seen.uid == "a/prefill", "the queue comes first"
    queued.end()
    decoding.end()
    assert taken(f).seen.uid == "a/prefill"


def test_what_both_of_a_pair_hold_their_pod_holds() -> None:
    f = fleet(*pair("a"), *pair("b"))
    p = Hold(taken(f), queued_tokens=1)
    d = Hold(f.decode("k of a", 0) or taken(f), kv_tokens=1)
    for i in f.instances():
        i.others = load(leased_blocks=2 if i.seen.role == "prefill" else 0)
    f.update([*pair("a", draining=True), *pair("b")])
    view = f.drain_view()
    assert set(view) == {"a", "b"}
    assert view["a"] == {"name": "a", "admitting": False, "in_flight": 2, "leased": 0, "leased_blocks": 2}
    p.answered()
    assert (view := f.drain_view()["a"])["in_flight"] == view["leased"] == 1
    next(i for i in f.instances() if i.seen.uid == "a/decode").lost = True
    assert f.drain_view()["a"]["leased_blocks"] is None
    p.end()
    d.end()
    assert f.drain_view()["a"]["in_flight"] == 0


def test_a_failed_one_is_left_alone_for_longer_each_time() -> None:
    f = fleet(P0, D0)
    p = f.prefill(0)
    assert p is not None
    f.fault(p, 0)
    assert f.prefill(0.4) is None
    assert f.next_chance_s(0.4) == 0.5
    assert f.prefill(0.5) is p
    f.fault(p, 1)
    assert f.prefill(1.9) is None
    assert f.prefill(2) is p
    for _ in range(50):
        f.fault(p, 2)
    assert f.prefill(12) is p
    f.worked(p)
    f.fault(p, 20, answered=True)
    assert f.prefill(20.25) is p
    f.fault(p, 30)
    f.update([replace(P0, ready=False), D0])
    f.update([P0, D0])
    assert f.prefill(30) is p  # it came up anew


def test_what_left_the_view_is_unknown_but_kept_while_held() -> None:
    f = fleet(P0, D0)
    p = f.prefill(0)
    assert p is not None
    hold = Hold(p, queued_tokens=3)
    f.update([D0])
    assert set(f.drain_view()) == {"d0"}
    assert f.prefill(0) is None
    hold.end()
    f.update([D0])
    assert [i.seen for i in f.instances()] == [D0]


def load(**tokens: int) -> Load:
    nothing = dict.fromkeys(
        ("queued_tokens", "kv_tokens", "waiting", "running", "free_blocks", "total_blocks", "leased_blocks"),
        0,
    )
    return Load(**{**nothing, **tokens})


def one(f: Fleet, name: str) -> Instance:
    return next(i for i in f.instances() if i.seen.name == name)


def test_others_requests_count_as_our_own() -> None:
    f = fleet(P0, P1, D0, D1)
    one(f, "p1").answered = WARM_AFTER
    one(f, "p0").others = load(queued_tokens=10)
    one(f, "d0").others = load(kv_tokens=10)
    Hold(one(f, "p1"), queued_tokens=9)
    assert f.prefill(0) is one(f, "p1")
    Hold(one(f, "p1"), queued_tokens=2)
    assert f.prefill(0) is one(f, "p0")
    assert f.decode("k", 0) is one(f, "d1")


def test_a_load_that_is_unknown_is_not_zero() -> None:
    f = fleet(P0, P1, D0)
    one(f, "p0").lost = True
    one(f, "p1").others = load(queued_tokens=10**6)
    assert f.prefill(0) is one(f, "p1")
    assert f.drain_view()["p0"]["leased_blocks"] is None
    assert f.drain_view()["p1"]["leased_blocks"] == 0
    one(f, "p1").lost = True  # none is known: own counts are all there is
    Hold(one(f, "p1"), queued_tokens=1)
    assert f.prefill(0) is one(f, "p0")


def test_a_new_instance_is_given_little_until_it_has_answered() -> None:
    f = fleet(P0, P1, D0)
    old, new = one(f, "p0"), one(f, "p1")
    for _ in range(WARM_AFTER):
        f.generated(old)
    busy = Hold(old, queued_tokens=10**6)
    at_once = []
    for answered in range(4):
        holds = []
        while (p := f.prefill(0)) is new:
            holds.append(Hold(p, queued_tokens=1))
        assert p is old
        at_once.append(len(holds))
        for hold in holds:
            hold.end()
        f.generated(new)
        assert answered + 1 == new.answered
    assert at_once == [1, 2, 3, 4]
    f.update([P0, replace(P1, ready=False), D0])
    f.update([P0, P1, D0])
    assert new.answered == 0  # it came up anew
    busy.end()
    new.answered = 0
    f.update([P1, D0])
    assert all(Hold(new) and f.prefill(0) is new for _ in range(3))  # there is no other


def ask(prompt: list[int]) -> Request:
    body = {"model": "m", "prompt": prompt}
    return Request(json.dumps(body).encode(), chat=False, model_name="m", id="i")


def test_prompts_go_where_their_beginning_is() -> None:
    f = fleet(P0, P1, D0)
    for i in f.instances():
        f.cached(i, 0)
    a, b = [1] * 256, [2] * 256
    first = f.prefill(0, ask([*a, 3]))
    hold = Hold(first, queued_tokens=64)
    second = f.prefill(0, ask([*b, 3]))
    hold.end()
    assert first is not second
    for k in range(20):  # in turn and without another's queue: to each its own
        assert f.prefill(0, ask([*a, k])) is first
        assert f.prefill(0, ask([*b, k])) is second
    first.caches = second.caches = False  # one that has never said what it found in a prefix cache has none
    assert f.prefill(0, ask([*b, 3])) is one(f, "p0")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 600), st.integers(0, 2)), max_size=40))
def test_affinity_never_starves_balance(asked: list[tuple[int, int, int]]) -> None:
    """Whatever prompts share, the chosen queue is longer than the shortest by less than the prompt."""
    f = fleet(P0, P1, seen("p2", "prefill"), D0)
    prefills = [one(f, n) for n in ("p0", "p1", "p2")]
    for i in prefills:
        i.caches, i.answered = True, WARM_AFTER
    holds = []
    for kind, length, ends in asked:
        request = ask([kind] * length)
        chosen = f.prefill(0, request)
        assert chosen is not None
        assert chosen.queued_tokens - min(i.queued_tokens for i in prefills) <= length
        assert request.uncached_tokens <= length
        holds.append(Hold(chosen, queued_tokens=request.uncached_tokens))
        for _ in range(min(ends, len(holds))):
            holds.pop(0).end()


def test_affinity_helps() -> None:
    """Forty conversations that grow turn by turn, on two instances: tokens to compute, with the term and without."""

    def uncached(caches: bool) -> int:
        f = fleet(P0, P1, D0)
        total = 0
        held: dict[str, Prefixes] = {"p0": Prefixes(), "p1": Prefixes()}  # what each really has
        rng = random.Random(1)
        for i in f.instances():
            i.caches, i.answered = caches, WARM_AFTER
        flying: list[Hold] = []
        for turn in range(1, 6):
            for talk in rng.sample(range(40), 40):
                request = ask([talk] * 128 * turn)
                chosen = f.prefill(0, request)
                assert chosen is not None
                cache = held[chosen.seen.name]
                own = request.input_tokens - cache.known_tokens(request.prefix)
                cache.note(request.prefix)
                total += own
                flying.append(Hold(chosen, queued_tokens=request.uncached_tokens))
                if len(flying) > 3:
                    flying.pop(0).end()
        return total

    assert uncached(True) < 0.7 * uncached(False)


@given(st.lists(st.tuples(st.sampled_from("apgeu"), st.integers(0, 7)), max_size=60))
def test_nothing_is_held_when_all_have_ended(steps: list[tuple[str, int]]) -> None:
    f = fleet(P0, P1, D0, D1)
    holds: list[Hold] = []
    for step, n in steps:
        if step == "a" and (p := f.prefill(0)) is not None:
            holds.append(Hold(p, queued_tokens=n))
        elif step == "p" and (d := f.decode("k", 0)) is not None:
            holds.append(Hold(d, kv_tokens=n))
        elif step == "u":
            f.update([s for k, s in enumerate((P0, P1, D0, D1)) if n >> (k % 3) & 1])
        elif holds:
            hold = holds[n % len(holds)]
            if step == "g":
                hold.grow(n)
            elif step == "e":
                hold.end()
                holds.remove(hold)
    for hold in holds:
        hold.end()
    f.check_integrity()

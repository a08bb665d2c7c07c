"""Which instance takes a request, and what the operator is told of each."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from disaggworker.router.fleet import Fleet, Hold, Role, Seen


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

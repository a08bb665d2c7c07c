"""What the report page is drawn from: parts of a request's time, goodput by promise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from disaggserve import catalogue, engines, search, simulate
from disaggserve.api.plan import Plan, Rejected, RolePlan, in_words
from disaggserve.cli.report import curves
from disaggserve.search.mixed import Mixed
from disaggserve.simulate import Deployment, Promise
from disaggserve.workload import Workload, preset

A100 = catalogue.gpu("NVIDIA-A100-SXM4-80GB")
CHAT = Workload(rate=2.0, cv=1.0, lengths=preset("sharegpt"))
PROMISE = Promise(0.25, 0.1, 0.9)


def deployment(engine: str = "torch") -> Deployment:
    groups = [("prefill", 2, 1, 1), ("decode", 1, 1, 1)]
    model = catalogue.model("facebook/opt-13b")
    return search.deployment(model, engines.engine(engine), A100, groups, "rdma")  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_the_parts_of_a_request_are_its_whole_time(engine: str) -> None:
    on = deployment(engine)
    requests, outcome = search.observe(on, CHAT, seeds=(1,))
    parts = np.stack(simulate.parts(on, requests, outcome))
    assert np.all(parts >= 0)
    whole_s = (outcome.last_ns - requests.arrival_ns) / 1e9
    assert np.allclose(parts.sum(axis=0), whole_s, atol=1e-6)
    moved = outcome.transfer_end_ns >= 0
    expected_s = on.link_latency_s + requests.input * on.kv_bytes_per_token / on.link_bytes_s
    assert np.allclose(parts[2][moved], expected_s[moved])
    assert not parts[2:][:, ~moved].any()
    if engine == "torch":
        assert np.allclose(parts[:2].sum(axis=0), (outcome.first_ns - requests.arrival_ns) / 1e9, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 512])
def test_a_colocated_runner_up_is_read_as_it_is_named(chunk: int | None) -> None:
    mixed = Mixed(A100, search.Shape(2, 1), ((3, chunk),))
    role = RolePlan(role="mixed", count=3, tp=2, pp=1, chunk=chunk)
    assert in_words((role,)) == str(mixed), "the plan and the rejected call one thing by one name"
    plan = Plan.model_construct(roles=(), rejected=(Rejected(what=str(mixed), reason="slower"),))
    ((name, found, why),) = curves._runners_up(plan)
    assert (name, found.roles, why) == ("colocated", (role,), "slower")
    pools = Mixed(A100, search.Shape(2, 1), ((2, 2048), (1, 256)))
    two = (RolePlan(role="mixed", count=n, tp=2, pp=1, chunk=c) for n, c in pools.parts)
    assert in_words(tuple(two)) == str(pools) == "mixed 2×tp2 with chunks of 2048 + 1×tp2 with chunks of 256"


def test_goodput_by_promise_is_where_attainment_falls_through_the_target() -> None:
    curve = curves._curve(curves.Candidate("chosen", "", 3, deployment(), 1, ""), CHAT, PROMISE)
    assert list(curve.goodputs) == sorted(curve.goodputs), "a looser promise never lowers goodput"
    goodput = curve.goodputs[curves.SCALES.index(1.0)]
    below, above = (
        search.predict(deployment(), dataclasses.replace(CHAT, rate=goodput * f), PROMISE).attainment
        for f in (0.9, 1.1)
    )
    assert above < PROMISE.attainment < below
    assert curve.points[0].attainment > 0.9 > curve.points[-1].attainment
    assert all(p.low <= p.attainment <= p.high for p in curve.points)


def test_a_promise_that_is_never_kept_has_no_goodput() -> None:
    curve = curves._curve(
        curves.Candidate("chosen", "", 3, deployment(), 1, ""), CHAT, Promise(0.001, 0.1, 0.9)
    )
    assert set(curve.goodputs) == {0.0}

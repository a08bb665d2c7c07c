"""The kernel's jumps and tables give exactly what the plain oracle gives by stepping."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggserve import simulate
from disaggserve.latency import Provenance, StepTimes
from disaggserve.simulate import kernel
from disaggserve.workload import Requests
from tests.oracle import Oracle

LONGEST = 60  # tokens of prompt and answer together: at most 4 blocks


def times(pp: int, unit: float, ctx: float, quad: float, odd: float) -> StepTimes:
    """Step times in units that make instants coincide often (odd = 0) or hardly ever."""
    batch = np.arange(9)
    return StepTimes(
        prefill_knots_tokens=np.array([0, 8, 32], dtype=np.int64),
        prefill_knots_ns=unit * np.array([1.0, 2.0, 5.0]) + odd,
        prefill_quad_ns=quad,
        decode_base_ns=unit * (1.0 + (batch >= 4) + batch // 6) + odd * batch,
        decode_ctx_ns=np.where(batch < 5, ctx, ctx / 2),
        pp=pp,
        provenance=Provenance("roofline", "made up"),
    )


@st.composite
def pools(draw: st.DrawFn, blocks: int) -> simulate.Pool:
    return simulate.Pool(
        count=draw(st.integers(1, 3)),
        times=times(
            draw(st.integers(1, 3)),
            draw(st.sampled_from([1000.0, 2000.0])),
            draw(st.sampled_from([0.0, 0.25, 10.0, 100.0])),
            draw(st.sampled_from([0.0, 0.3])),
            draw(st.sampled_from([0.0, 0.123])),
        ),
        blocks=draw(st.integers(blocks, 14)),
        batch_tokens=draw(st.sampled_from([8, 32, 64])),
    )


@st.composite
def scenes(draw: st.DrawFn) -> tuple[simulate.Deployment, Requests]:
    deployment = simulate.Deployment(
        prefill=tuple(draw(st.lists(pools(3), min_size=1, max_size=2))),
        decode=tuple(draw(st.lists(pools(3), min_size=1, max_size=2))),
        kv_bytes_per_token=draw(st.sampled_from([0, 100])),
        link_bytes_s=draw(st.sampled_from([1e9, 3e10])),
        link_latency_s=draw(st.sampled_from([0.0, 1e-6])),
        first_token_from=draw(st.sampled_from(["prefill", "decode"])),
    )
    gap = st.sampled_from([0, 0, 0, 1000, 2000, 7000, 50_000])
    rows = draw(
        st.lists(st.tuples(gap, st.integers(1, 30), st.integers(1, 1) | st.integers(1, 30)), max_size=40)
    )
    return deployment, Requests(
        np.cumsum([5000, *(r[0] for r in rows)])[1:].astype(np.int64),
        np.array([r[1] for r in rows], dtype=np.int32),
        np.array([r[2] for r in rows], dtype=np.int32),
    )


def same(outcome: simulate.Outcome, deployment: simulate.Deployment, requests: Requests) -> None:
    expected = Oracle(deployment, requests).run()
    assert outcome.prefill_start_ns.tolist() == expected["prefill_start"]
    assert outcome.first_ns.tolist() == expected["first"]
    assert outcome.transfer_end_ns.tolist() == expected["transfer_end"]
    assert outcome.decode_start_ns.tolist() == expected["decode_start"]
    assert outcome.last_ns.tolist() == expected["last"]


@given(scenes())
@settings(max_examples=400, deadline=None)
def test_the_kernel_is_the_oracle(scene: tuple[simulate.Deployment, Requests]) -> None:
    deployment, requests = scene
    same(simulate.run(deployment, requests), deployment, requests)
    one = dataclasses.replace(deployment.prefill[0], count=1)
    alone = dataclasses.replace(deployment, prefill=(one,), decode=(), first_token_from="prefill")
    same(simulate.run_prefill(one, requests), alone, requests)
    one = dataclasses.replace(deployment.decode[0], count=2)
    alone = dataclasses.replace(deployment, prefill=(), decode=(one,), first_token_from="prefill")
    same(simulate.run_decode(one, requests), alone, requests)
    # Every process compiles or loads one kernel, not one for each kind of array it is given.
    assert len(kernel.serve.signatures) == 1  # type: ignore[attr-defined]

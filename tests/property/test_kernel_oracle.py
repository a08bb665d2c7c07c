"""The kernel's jumps and tables give exactly what the plain oracle gives by stepping.

With NUMBA_DISABLE_JIT=1 the kernel runs as plain Python, which is how to look into a difference.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggserve import catalogue, latency, simulate
from disaggserve.latency import Provenance, StepTimes
from disaggserve.simulate import kernel
from disaggserve.workload import Requests, Workload, preset
from tests.oracle import Oracle


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
def pools(draw: st.DrawFn) -> simulate.Pool:
    return simulate.Pool(
        count=draw(st.integers(1, 3)),
        times=times(
            draw(st.sampled_from([1, 1, 2, 3])),
            draw(st.sampled_from([1000.0, 2000.0])),
            draw(st.sampled_from([0.0, 0.25, 10.0, 100.0])),
            draw(st.sampled_from([0.0, 0.3])),
            draw(st.sampled_from([0.0, 0.123])),
        ),
        blocks=draw(st.integers(3, 14)),
        batch_tokens=draw(st.sampled_from([3, 8, 32, 64])),
        policy=draw(st.sampled_from(["whole", "chunked"])),
        batch_requests=draw(st.sampled_from([0, 0, 1, 3])),
    )


def some(least: int = 1) -> st.SearchStrategy[tuple[simulate.Pool, ...]]:
    return st.lists(pools(), min_size=least, max_size=2).map(tuple)


@st.composite
def deployments(draw: st.DrawFn) -> simulate.Deployment:
    kind = draw(st.sampled_from(["apart", "colocated", "mixed"]))
    habits: list[dict[str, Any]] = [{}, {"transfer": "step"}]
    if kind != "mixed":
        inline = {"transfer": "inline", "pull_below": draw(st.sampled_from([0.05, 0.5, 1.0]))}
        habits += [{"handoff": "push"}, inline]
    pull = draw(st.sampled_from(habits))
    return simulate.Deployment(
        prefill=draw(some(1 if kind == "apart" else 0)) if kind != "colocated" else (),
        decode=draw(some(1 if kind == "apart" else 0)) if kind != "colocated" else (),
        mixed=draw(some()) if kind != "apart" else (),
        sticky=kind == "colocated",
        kv_bytes_per_token=draw(st.sampled_from([0, 100])),
        link_bytes_s=draw(st.sampled_from([1e9, 3e10])),
        link_latency_s=draw(st.sampled_from([0.0, 1e-6, 1.3e-5])),
        first_token_from=draw(st.sampled_from(["prefill", "decode"])),
        overlap=draw(st.booleans()),
        routers=draw(st.integers(1, 3)),
        view_age_s=draw(st.sampled_from([0.0, 0.0, 1e-6, 2.5e-6, 1e-4])),
        swap_bytes_s=draw(st.sampled_from([None, 1e8, 1e9])),
        **pull,
    )


@st.composite
def traffic(draw: st.DrawFn) -> Requests:
    gap = st.sampled_from([0, 0, 0, 1000, 2000, 7000, 50_000])
    row = st.tuples(gap, st.integers(1, 30), st.integers(1, 1) | st.integers(1, 30), st.integers(0, 40))
    rows = draw(st.lists(row, max_size=40))
    arrival = np.cumsum([5000, *(r[0] for r in rows)])[1:].astype(np.int64)
    lens = [np.array([r[column] for r in rows], dtype=np.int32) for column in (1, 2, 3)]
    return Requests(arrival, *lens if draw(st.booleans()) else lens[:2])


def same(outcome: simulate.Outcome, deployment: simulate.Deployment, requests: Requests, **how: bool) -> None:
    expected = Oracle(deployment, requests, **how).run()
    assert outcome.prefill_start_ns.tolist() == expected["prefill_start"]
    assert outcome.first_ns.tolist() == expected["first"]
    assert outcome.transfer_end_ns.tolist() == expected["transfer_end"]
    assert outcome.decode_start_ns.tolist() == expected["decode_start"]
    assert outcome.last_ns.tolist() == expected["last"]


@given(deployments(), traffic(), st.sampled_from([100, 3, 7]))
@settings(max_examples=400, deadline=None)
def test_the_kernel_is_the_oracle(deployment: simulate.Deployment, requests: Requests, reserve: int) -> None:
    with mock.patch.object(
        simulate.serving, "RESERVE", reserve
    ):  # few blocks are drawn, of which 1 % is none
        same(simulate.run(deployment, requests), deployment, requests)
    # Every process compiles or loads one kernel, not one for each kind of array it is given.
    assert numba.config.DISABLE_JIT or len(kernel.serve.signatures) == 1  # type: ignore[attr-defined]


@given(pools(), traffic())
@settings(max_examples=100, deadline=None)
def test_each_phase_alone_is_the_oracles(pool: simulate.Pool, requests: Requests) -> None:
    same(
        simulate.run_prefill(pool, requests), simulate.Deployment((pool,), (), 0, 1.0), requests, moves=False
    )
    same(simulate.run_decode(pool, requests), simulate.Deployment((), (pool,), 0, 1.0), requests, moves=False)


MODEL, GPU = catalogue.model("facebook/opt-13b"), catalogue.gpu("NVIDIA-A100-SXM4-80GB")


def real(count: int, pp: int = 1, **how: Any) -> simulate.Pool:
    """OPT-13B on A100s, with a fifth of its memory: contexts outgrow it."""
    blocks = catalogue.kv_blocks(MODEL, GPU, 1, pp) // 5
    return simulate.Pool(count, latency.step_times(MODEL, GPU, 1, pp), blocks, **how)


CHUNKED: dict[str, Any] = {"policy": "chunked", "batch_tokens": 256}


@pytest.mark.parametrize(
    "deployment",
    [
        {"prefill": (real(2, 2),), "decode": (real(1), real(1, 2)), "overlap": True},
        {"prefill": (real(2),), "decode": (real(2),), "handoff": "push", "routers": 2, "view_age_s": 0.5},
        {"prefill": (real(2),), "decode": (real(2),), "transfer": "inline", "swap_bytes_s": 20e9},
        {"mixed": (real(3),), "sticky": True},
        {"mixed": (real(2, **CHUNKED), real(1, 2, **CHUNKED)), "first_token_from": "decode"},
    ],
)
def test_real_lengths_and_steps_are_the_oracles(deployment: dict[str, Any]) -> None:
    apart = simulate.Deployment((), (), MODEL.kv_bytes_per_token(), 5e9)
    drawn = Workload(8.0, 2.0, preset("sharegpt")).requests(50.0, seed=3)
    requests = dataclasses.replace(drawn, cached=np.array(drawn.input // 4, dtype=np.int32))
    one = dataclasses.replace(apart, **deployment)
    outcome = simulate.run(one, requests)
    same(outcome, one, requests)
    assert outcome.events < 40 * len(requests)  # it jumps: the oracle takes one for each step

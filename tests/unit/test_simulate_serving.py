from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from disaggserve import simulate
from disaggserve.latency import Provenance, StepTimes
from disaggserve.simulate import Deployment, Pool
from disaggserve.workload import Lengths, Requests, Workload

MS = 1_000_000


def times(prefill_ms_per_token: float = 1.0, step_ms: float = 10.0, pp: int = 1) -> StepTimes:
    """A prefill stage of so many ms a token, a decode stage of `step_ms` whatever the batch."""
    return StepTimes(
        prefill_knots_tokens=np.array([0, 1024], dtype=np.int64),
        prefill_knots_ns=np.array([0.0, 1024.0]) * prefill_ms_per_token * MS,
        prefill_quad_ns=0.0,
        decode_base_ns=np.full(65, step_ms * MS),
        decode_ctx_ns=np.zeros(65),
        pp=pp,
        provenance=Provenance("roofline", "made up"),
    )


def requests(*rows: tuple[float, int, int]) -> Requests:
    """Rows of (arrival in ms, input, output)."""
    return Requests(
        np.array([round(r[0] * MS) for r in rows], dtype=np.int64),
        np.array([r[1] for r in rows], dtype=np.int32),
        np.array([r[2] for r in rows], dtype=np.int32),
    )


def deployment(prefill: Pool | None = None, decode: Pool | None = None) -> Deployment:
    return Deployment(
        (prefill or Pool(1, times(), blocks=1000),),
        (decode or Pool(1, times(), blocks=1000),),
        kv_bytes_per_token=1000,
        link_bytes_s=1e6,  # 1 ms a token
    )


def ms(values: np.ndarray) -> list[float]:
    return [v / MS for v in values.tolist()]


def test_one_request_passes_prefill_transfer_and_decode() -> None:
    out = simulate.run(deployment(), requests((5, 20, 4)))
    assert ms(out.prefill_start_ns) == [5]
    assert ms(out.first_ns) == [25]
    assert ms(out.transfer_end_ns) == [45]
    assert ms(out.decode_start_ns) == [45]
    assert ms(out.last_ns) == [75]


def test_vllms_first_token_comes_from_decode() -> None:
    vllm = dataclasses.replace(deployment(), first_token_from="decode")
    out = simulate.run(vllm, requests((0, 20, 3), (1000, 20, 1)))
    assert ms(out.first_ns) == [50, 1050]
    assert ms(out.last_ns) == [70, 1050]


def test_vllms_pull_begins_with_a_step_and_is_seen_after_one() -> None:
    vllm = dataclasses.replace(deployment(), first_token_from="decode", transfer="step")
    out = simulate.run(vllm, requests((0, 20, 20), (30, 15, 1)))
    assert ms(out.first_ns)[0] == 50  # nothing ran: at once
    # Its prompt is done at 45 and a step at 50: it is pulled until 65, in the middle of the step that ends at 70.
    assert ms(out.transfer_end_ns)[1] == 65
    assert ms(out.first_ns)[1] == 80


def test_a_pull_waits_for_the_step_after_the_word_of_its_prompt() -> None:
    vllm = dataclasses.replace(deployment(), first_token_from="decode", transfer="step", link_latency_s=0.007)
    out = simulate.run(vllm, requests((0, 20, 20), (30, 15, 1)))
    assert ms(out.transfer_end_ns)[0] == 47  # nothing ran: as soon as the word is there
    # Its prompt is done at 45, the word is there at 52, and a step begins at 57: it is pulled until 72, and in the one at 77.
    assert ms(out.transfer_end_ns)[1] == 72
    assert ms(out.first_ns)[1] == 87


def test_one_token_ends_at_prefill() -> None:
    out = simulate.run(deployment(), requests((0, 20, 1)))
    assert ms(out.last_ns) == ms(out.first_ns) == [20]
    assert out.transfer_end_ns.tolist() == out.decode_start_ns.tolist() == [-1]


def test_prompts_are_batched_up_to_the_limit_and_longer_ones_go_alone() -> None:
    pool = Pool(1, times(), blocks=1000, batch_tokens=30)
    out = simulate.run_prefill(pool, requests((0, 50, 9), (1, 10, 9), (2, 20, 9), (3, 1, 9)))
    assert ms(out.first_ns) == [50, 80, 80, 81]
    assert out.last_ns.tolist() == out.first_ns.tolist()


def test_batches_overlap_in_a_pipeline() -> None:
    pool = Pool(1, times(pp=3), blocks=1000, batch_tokens=10)
    out = simulate.run_prefill(pool, requests((0, 10, 9), (0, 10, 9), (0, 10, 9)))
    assert ms(out.prefill_start_ns) == [0, 10, 20]
    assert ms(out.first_ns) == [30, 40, 50]


def test_kv_that_was_not_pulled_holds_up_prefill() -> None:
    held = deployment(prefill=Pool(1, times(), blocks=4, batch_tokens=1), decode=Pool(1, times(), blocks=4))
    out = simulate.run(held, requests((0, 48, 6), (0, 32, 2)))
    assert ms(out.transfer_end_ns)[0] == 96
    assert ms(out.prefill_start_ns) == [0, 96]  # 4 blocks hold one prompt at a time
    assert ms(out.last_ns)[0] == 146
    assert ms(out.transfer_end_ns)[1] == 178  # 3 blocks are free on the decode side from 146 on


def test_the_last_of_the_batch_is_preempted_and_recomputed() -> None:
    pool = Pool(1, times(prefill_ms_per_token=0.5), blocks=4)
    out = simulate.run_decode(pool, requests((0, 20, 15), (0, 20, 15)))
    # 2 blocks each; the 13th step makes it 33 tokens: the second gives way until the first has ended.
    assert ms(out.last_ns)[0] == pytest.approx(14 * 10, abs=1e-3)
    assert ms(out.last_ns)[1] == pytest.approx(14 * 10 + 32 * 0.5 + 2 * 10, abs=1e-3)


def test_lanes_of_a_pipeline_take_pp_stage_times_a_step() -> None:
    out = simulate.run_decode(Pool(1, times(pp=2), blocks=100), requests((0, 8, 3), (5, 8, 3), (6, 8, 3)))
    # The second lane's step waits until the first one's has left the first stage.
    assert ms(out.decode_start_ns) == pytest.approx([0, 10, 20], abs=1e-3)
    assert ms(out.last_ns) == pytest.approx([40, 50, 60], abs=1e-3)


def test_a_long_step_holds_up_a_short_one_in_every_stage() -> None:
    pool = Pool(1, times(pp=2), blocks=100, batch_tokens=1)
    out = simulate.run_prefill(pool, requests((0, 30, 9), (0, 10, 9), (0, 10, 9)))
    assert ms(out.prefill_start_ns) == [0, 30, 60]  # the third has a lane when the first one's step is over
    assert ms(out.first_ns) == [60, 70, 80]


def colocated(pool: Pool) -> Deployment:
    return Deployment((), (), 1000, 1e6, mixed=(pool,), sticky=True)


def test_waiting_prompts_go_before_running_decodes() -> None:
    out = simulate.run(colocated(Pool(1, times(), blocks=100)), requests((0, 20, 4), (25, 40, 2), (26, 8, 1)))
    # The first decodes from 20 on; at 30 two prompts take the instance until 78.
    assert ms(out.prefill_start_ns) == [0, 30, 30]
    assert ms(out.first_ns) == [20, 78, 78]
    assert ms(out.last_ns) == pytest.approx([98, 88, 78], abs=1e-3)
    assert out.transfer_end_ns.tolist() == [*out.first_ns.tolist()[:2], -1]


def test_chunks_go_along_with_decodes_that_never_stall() -> None:
    pool = Pool(1, times(step_ms=10.0), blocks=100, batch_tokens=16, policy="chunked")
    out = simulate.run(colocated(pool), requests((0, 16, 5), (17, 40, 2)))
    # Prompt 0–16; a step of 10; then steps of 16 tokens: the decode's one and 15 of the prompt, twice; then 10.
    assert ms(out.prefill_start_ns) == [0, 26]
    assert ms(out.first_ns) == pytest.approx([16, 26 + 16 + 16 + 11], abs=1e-3)
    assert ms(out.last_ns) == pytest.approx([69, 79], abs=1e-3)


def test_a_request_may_prefill_on_one_and_decode_on_another() -> None:
    pool = Pool(1, times(), blocks=100, batch_tokens=64)
    mixed = dataclasses.replace(colocated(pool), mixed=(pool, pool), sticky=False)
    out = simulate.run(mixed, requests((0, 20, 11), (1, 30, 3)))
    # Both instances are empty at 20: the first has it. At 31 it holds 22 tokens, so the second keeps its own.
    assert ms(out.transfer_end_ns) == [20, 31]
    third = simulate.run(mixed, requests((0, 20, 11), (1, 30, 3), (2, 50, 2)))
    # Queued on the first (20 against 30 tokens) it is done at 20 + 50; the second is empty by then.
    assert ms(third.first_ns)[2] == 70
    assert ms(third.transfer_end_ns)[2] == 120


def test_small_chunks_are_slower_and_the_queue_is_weighed() -> None:
    slow = Pool(1, times(prefill_ms_per_token=2.0), blocks=100)
    mixed = dataclasses.replace(colocated(slow), mixed=(slow, Pool(1, times(), blocks=100)))
    out = simulate.run(mixed, requests((0, 10, 1), (0, 15, 1), (0, 10, 1)))
    # 10 tokens at 2 ms each weigh more than the second instance's 15 at 1 ms.
    assert ms(out.first_ns) == [20, 25, 25]


def test_what_is_cached_is_not_computed_but_held_and_moved() -> None:
    rows = requests((0, 20, 2), (100, 20, 2))
    rows = dataclasses.replace(rows, cached=np.array([15, 20], dtype=np.int32))
    out = simulate.run(deployment(), rows)
    assert ms(out.first_ns) == [5, 101]  # at least one token is computed
    assert ms(out.transfer_end_ns) == [25, 121]


def test_pushed_kv_needs_room_before_prefill() -> None:
    push = dataclasses.replace(deployment(decode=Pool(1, times(), blocks=4)), handoff="push")
    out = simulate.run(push, requests((0, 40, 3), (0, 40, 3)))
    assert ms(out.prefill_start_ns) == [0, 100]  # 3 of 4 blocks are reserved for the first until its end
    assert ms(out.transfer_end_ns) == [80, 180]


def test_a_transfer_that_overlaps_counts_what_is_left_of_it() -> None:
    over = dataclasses.replace(deployment(), overlap=True)
    assert ms(simulate.run(over, requests((0, 20, 2))).transfer_end_ns) == [36]  # one block after the end
    slow = dataclasses.replace(over, link_bytes_s=0.5e6)
    assert ms(simulate.run(slow, requests((0, 40, 2))).transfer_end_ns) == [80]  # begun with the prefill


def test_an_old_view_sends_a_burst_to_one_instance() -> None:
    plan = deployment(prefill=Pool(2, times(), blocks=1000, batch_tokens=1))
    rows = requests(*((i, 10, 1) for i in range(4)))
    seen = dataclasses.replace(plan, view_age_s=60.0)
    assert ms(simulate.run(plan, rows).first_ns) == [10, 11, 20, 21]
    assert ms(simulate.run(seen, rows).first_ns) == [10, 11, 20, 21]  # one router knows what it sent itself
    two = dataclasses.replace(seen, routers=2)
    assert ms(simulate.run(two, rows).first_ns) == [10, 20, 12, 22]  # neither knows what the other sent


def test_an_engine_that_pulls_in_its_loop_stands_still_meanwhile() -> None:
    inline = dataclasses.replace(deployment(), transfer="inline")
    out = simulate.run(inline, requests((0, 20, 8), (25, 20, 2)))
    # The first decodes from 40 on; the second is prefilled at 45, pulled at the boundary at 50, until 70.
    assert ms(out.transfer_end_ns) == [40, 70]
    assert ms(out.decode_start_ns) == [40, 70]
    assert ms(out.last_ns) == [130, 80]


def test_swapped_requests_pay_for_both_ways() -> None:
    swap = Deployment(
        (Pool(1, times(), blocks=9),), (Pool(1, times(), blocks=4),), 1000, 1e9, swap_bytes_s=1e6
    )
    out = simulate.run(swap, requests((0, 20, 15), (0, 20, 15)))
    # The second joins a step later and leaves with 31 tokens, at 1 ms each: within the step that it leaves for,
    # and again within the one that it is back for.
    first = 40.02 + 14 * 10 + 31
    assert ms(out.last_ns) == pytest.approx([first, first + 31 + 3 * 10], abs=1e-3)


def test_the_instance_with_the_least_work_is_chosen() -> None:
    out = simulate.run_prefill(Pool(2, times(), blocks=1000), requests((0, 30, 9), (1, 10, 9), (2, 10, 9)))
    assert ms(out.first_ns) == [30, 11, 21]


def test_what_fits_no_memory_is_served_nowhere() -> None:
    small = deployment(decode=Pool(1, times(), blocks=3))
    out = simulate.run(small, requests((0, 40, 9), (0, 40, 10), (0, 40, 1), (0, 49, 1)))
    assert (out.last_ns >= 0).tolist() == [True, False, True, True]
    assert out.prefill_start_ns[1] == -1
    prompt = deployment(prefill=Pool(1, times(), blocks=3))
    assert (simulate.run(prompt, requests((0, 48, 2), (0, 49, 1))).last_ns >= 0).tolist() == [True, False]


@pytest.mark.parametrize("load", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_one_prefill_instance_is_an_md1_queue(load: float) -> None:
    service_s = 0.1
    pool = Pool(1, times(prefill_ms_per_token=1.0), blocks=10**6, batch_tokens=100)
    fixed = Lengths("fixed", np.array([100], dtype=np.int32), np.array([1], dtype=np.int32))
    rate = load / service_s
    means_s = []
    for seed in range(4):
        arrivals = Workload(rate, 1.0, fixed, "test").requests(400_000 / rate, seed)
        first_ns = simulate.run_prefill(pool, arrivals).first_ns
        # Lindley's recursion, closed: the k-th ends at max over j ≤ k of (arrival j + (k − j + 1) services).
        k = np.arange(len(arrivals)) * round(service_s * 1e9)
        exact = np.maximum.accumulate(arrivals.arrival_ns - k) + k + round(service_s * 1e9)
        np.testing.assert_array_equal(first_ns, exact)
        means_s.append(np.mean(first_ns - arrivals.arrival_ns) / 1e9)
    expected_s = service_s + rate * service_s**2 / (2 * (1 - load))
    assert float(np.mean(means_s)) == pytest.approx(expected_s, rel=0.03)


def test_no_requests_is_no_fault() -> None:
    assert len(simulate.run(deployment(), requests()).last_ns) == 0
    simulate.warm_up()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prefill": ()}, "needs prefill and decode"),
        ({"link_bytes_s": 0.0}, "bandwidth above 0"),
        ({"link_bytes_s": math.nan}, "bandwidth above 0"),
        ({"decode": (Pool(1, times(), blocks=0),)}, "0 KV blocks"),
    ],
)
def test_a_deployment_that_cannot_be_simulated_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(simulate.BadDeployment, match=said):
        simulate.run(dataclasses.replace(deployment(), **change), requests((0, 1, 1)))  # type: ignore[arg-type]


def test_requests_must_be_in_order_and_of_one_fortnight() -> None:
    for second_ms in (-1, 14 * 86_400_000):
        with pytest.raises(simulate.BadDeployment, match="in order of arrival and within 13 days"):
            simulate.run(deployment(), requests((0, 1, 1), (second_ms, 1, 1)))

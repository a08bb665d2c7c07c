"""A paced engine's times are the simulator's, step by step: what is planned is what is served."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Literal, cast

import numpy as np
import pytest

from disaggserve import catalogue, latency, simulate
from disaggserve.workload import Requests

pytest.importorskip("torch")

from disaggworker.engine.scheduler import Batch, Scheduler
from disaggworker.kv.blocks import BlockManager
from disaggworker.pace import Pace
from tests.engine_bench import Bench, answer

MODEL, GPU = catalogue.model("facebook/opt-13b"), catalogue.gpu("NVIDIA-A100-SXM4-80GB")


@pytest.mark.parametrize(
    ("chunk", "pp", "blocks"),
    [(0, 1, 3000), (256, 1, 3000), (1024, 1, 3000), (100, 2, 3000), (0, 2, 3000), (0, 1, 300), (256, 1, 300)],
)
def test_an_instance_keeps_the_simulators_time(chunk: int, pp: int, blocks: int) -> None:
    times = latency.step_times(MODEL, GPU, 1, pp)
    draw = random.Random(chunk)
    count = 150
    arrivals = np.sort(np.array([draw.randrange(20_000_000) for _ in range(count)])) * 1000
    inputs = np.array([draw.randrange(1, 1500) for _ in range(count)])
    outputs = np.array([draw.choice((1, 2, 7, 40, 150)) for _ in range(count)])
    policy: Literal["whole", "chunked"] = "chunked" if chunk else "whole"
    pool = simulate.Pool(1, times, blocks, batch_tokens=chunk or 512, policy=policy)
    outcome = simulate.run(
        simulate.Deployment((), (), 0, 1.0, mixed=(pool,), sticky=True),
        Requests(arrivals, inputs.astype(np.int32), outputs.astype(np.int32)),
    )
    pace = cast(Pace, SimpleNamespace(times=times, stage_s=lambda batch: Pace.stage_s(pace, batch)))
    bench = Bench(Scheduler(BlockManager(blocks), batch_tokens=512, chunk=chunk, lanes=pp), pace)
    asked = []
    for number in range(count):
        bench.until(arrivals[number] * 1e-9)
        prompt = [(number * 31 + place) % 97 for place in range(inputs[number])]
        asked.append(bench.submit(prompt, int(outputs[number])))
    bench.until(float("inf"))
    assert (bench.scheduler.preemptions > 0) == (blocks < 1000)
    said = [bench.said[sequence] for sequence in asked]
    assert [s.tokens for s in said] == [answer(sequence.prompt, sequence.max_tokens) for sequence in asked]
    first, last = (np.array([s.times_s[at] for s in said]) for at in (0, -1))
    np.testing.assert_allclose(first, outcome.first_ns * 1e-9, atol=1e-6)
    np.testing.assert_allclose(last, outcome.last_ns * 1e-9, atol=1e-6)
    kinds = {(bool(s.answers), len(s.counts) > 1, max(s.counts) > 1) for s in bench.runner.steps}
    assert len(kinds) > 1, Batch

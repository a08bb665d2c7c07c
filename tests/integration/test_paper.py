"""The paper's own placements, simulated, against what it measured: the bound of benchmarks/paper/."""

from __future__ import annotations

import pytest

from benchmarks.paper import systems
from benchmarks.paper.facts import APPLICATIONS, Application
from benchmarks.paper.measure import Bench
from benchmarks.paper.page import CLOSE


@pytest.mark.parametrize("app", [a for a in APPLICATIONS if a.fitted], ids=lambda a: a.key)
def test_goodput_is_within_15_percent_of_the_measurement(app: Application) -> None:
    bench = Bench(systems.own(app), systems.lengths(app), app.prompts_per_gpu)
    assert bench.attained((1 - CLOSE) * app.distserve, app.promise) >= app.promise.attainment
    assert bench.attained((1 + CLOSE) * app.distserve, app.promise) < app.promise.attainment


@pytest.mark.parametrize("app", APPLICATIONS, ids=lambda a: a.key)
def test_vllm_as_the_paper_ran_it_is_worse_than_its_own_placement_where_fits_exist(app: Application) -> None:
    """For OPT-175B both are a roofline, and the page says that the order is another there."""
    vllm = systems.vllm(app, app.colocated_tp)
    assert vllm is not None
    shares = [
        Bench(system, systems.lengths(app), app.prompts_per_gpu).attained(app.distserve, app.promise)
        for system in (vllm, systems.own(app))
    ]
    assert (shares[0] < shares[1]) == app.fitted

"""DistServe's own runs on A100s, replayed with the model of its engine (benchmarks/measured.py has the table)."""

from __future__ import annotations

import pytest

from benchmarks import measured
from tests.data import shared


@pytest.mark.parametrize("name", sorted(measured.PUBLIC))
def test_attainment_comes_out_as_measured(name: str) -> None:
    run = next(r for r in measured.runs(shared(measured.FILE)) if r.name == name)
    error = abs(measured.replay(run).attainment - run.attainment)
    if run.attainment >= 0.9:
        assert error <= 0.02
    elif run.attainment >= 0.6:
        assert error <= 0.06
    else:
        public = abs(measured.PUBLIC[name] / 100 - run.attainment)
        assert error < public  # without a bound, but nearer than the public simulator

"""Joint lengths learned from the router's counters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from disaggserve.workload.lengths import Lengths, deal
from disaggserve.workload.requests import BadLengths, Lens


def from_cells(
    counts: Sequence[Sequence[float]],
    input_edges: Sequence[float],
    output_edges: Sequence[float],
    input_means: Sequence[float],
    output_means: Sequence[float],
    *,
    name: str = "observed",
    rows: int = 4000,
) -> Lengths:
    """A joint table from the router's two-dimensional counter.

    `counts[i][j]`: requests with input in bucket i and output in bucket j (need not be whole: Prometheus
    extrapolates). `…_edges`: n + 1 rising edges of n buckets, bucket k = (edge k, edge k + 1]; the last may
    be inf. `…_means`: mean length in each bucket over all requests, NaN where unknown (the bucket's middle is
    taken).

    About `rows` rows are dealt to the cells by largest remainder. Inside a bucket, lengths are piecewise
    uniform on [lo, mean] and [mean, hi], the lower part with probability (hi − mean)/(hi − lo), so that the
    mean is kept; a cell's k rows are the means of the k equal parts of that law, outputs in an order that
    goes with no input. No random draw. Raises `BadLengths`.
    """
    table = np.asarray(counts, dtype=np.float64)
    shape = (len(input_edges) - 1, len(output_edges) - 1)
    if table.shape != shape or (len(input_means), len(output_means)) != shape:
        raise BadLengths(f"counts are {table.shape} where edges make {shape} buckets")
    if not np.all(np.isfinite(table)) or np.any(table < 0):
        raise BadLengths("counts of lengths must be finite and not negative")
    if not table.sum() > 0:
        raise BadLengths("no request was counted, so there are no lengths to learn")
    dealt = deal(table.ravel(), rows)
    inputs: list[Lens] = []
    outputs: list[Lens] = []
    for cell, k in enumerate(dealt.tolist()):
        if not k:
            continue
        i, j = divmod(cell, shape[1])
        inputs.append(_strata(input_edges[i], input_edges[i + 1], input_means[i], k))
        outputs.append(_strata(output_edges[j], output_edges[j + 1], output_means[j], k)[_scramble(k)])
    return Lengths(name, np.concatenate(inputs), np.concatenate(outputs))


def _strata(lo: float, hi: float, mean: float, k: int) -> Lens:
    """Means of the k equal parts of the bucket's law, rounded so that their sum is kept, at least 1."""
    if math.isnan(mean):
        mean = lo + 0.5 if math.isinf(hi) else (lo + hi) / 2
    if math.isinf(hi):
        hi = max(2 * mean - lo, lo + 1)
    mean = min(max(mean, lo), hi)
    p = (hi - mean) / (hi - lo)
    u = np.linspace(0.0, 1.0, k + 1)
    # Integral of the quantile function: lo + (mean−lo)·u/p below p, mean + (hi−mean)·(u−p)/(1−p) above.
    below, above = np.minimum(u, p), np.maximum(u - p, 0.0)
    integral = lo * below + (0.0 if p == 0 else (mean - lo) / (2 * p)) * below**2
    integral += mean * above + (0.0 if p == 1 else (hi - mean) / (2 * (1 - p))) * above**2
    return np.maximum(np.diff(np.rint(integral * k)), 1).astype(np.int32)


def _scramble(k: int) -> npt.NDArray[np.int64]:
    """An order of 0…k−1 spread evenly against its own: multiples of a number near 0.618·k, coprime to k."""
    step = max(1, round(k * 0.6180339887))
    while math.gcd(step, k) != 1:
        step += 1
    return np.arange(k, dtype=np.int64) * step % k

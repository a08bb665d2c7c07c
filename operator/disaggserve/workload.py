"""Traffic as values: joint (input, output) lengths in tokens, arrivals, traces.

No randomness but a seed: the same (workload, duration, seed) gives the same requests on every machine, and
two rates of one seed share their draws (common random numbers), so that their difference is the rate's.

Errors: `BadTrace`, `BadLengths` (both `WorkloadError`, a `ValueError`), one sentence with the line number.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from disaggserve.api.errors import InvalidInput

Lens = npt.NDArray[np.int32]
Times = npt.NDArray[np.int64]

MAX_TOKENS = 1_000_000  # a length of so many tokens or more is taken for a fault in the file
PRESETS = {
    "sharegpt": "sharegpt_opt_1600.csv",
    "humaneval": "humaneval_opt_164.csv",
    "longbench": "longbench_like_1600.csv",
}
_LENGTHS = Path(__file__).parent / "data" / "lengths"


class WorkloadError(InvalidInput, ValueError):
    """What is wrong with the traffic given, in one sentence."""


class BadTrace(WorkloadError):
    """A trace file has a row that is no request."""


class BadLengths(WorkloadError):
    """Lengths that no request can have."""


@dataclasses.dataclass(frozen=True, eq=False)
class Requests:
    """Requests in order of arrival. Equal lengths; every prompt and answer has at least one token."""

    arrival_ns: Times  # int64[n], not falling, whole microseconds
    input: Lens  # int32[n] prompt tokens
    output: Lens  # int32[n] tokens to generate, the first one included

    def __len__(self) -> int:
        return len(self.arrival_ns)


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths:
    """A joint table of (input, output) lengths: row i is one request's pair, all rows equally likely."""

    name: str
    input: Lens  # int32[n]
    output: Lens  # int32[n]

    def __post_init__(self) -> None:
        if len(self.input) != len(self.output) or not len(self.input):
            raise BadLengths(
                f"lengths {self.name}: {len(self.input)} inputs and {len(self.output)} outputs make no table"
            )
        if min(int(self.input.min()), int(self.output.min())) < 1:
            raise BadLengths(f"lengths {self.name}: a request has at least one input and one output token")

    def __len__(self) -> int:
        return len(self.input)

    def scaled(self, input_scale: float, context_length: int) -> Lengths:
        """Prompts × `input_scale`, rounded, at least 1; then cut to the model's context.

        A prompt is cut to context_length − 1 tokens, then the output to what is left beside its prompt.
        """
        if not (math.isfinite(input_scale) and input_scale > 0):
            raise BadLengths(f"inputScale is {input_scale}, not a number above 0")
        if context_length < 2:
            raise BadLengths(
                f"a context of {context_length} tokens holds no prompt and answer; it takes at least 2"
            )
        prompts = np.clip(np.rint(self.input * float(input_scale)), 1, context_length - 1).astype(np.int32)
        outputs = np.minimum(self.output, context_length - prompts).astype(np.int32)
        name = self.name if input_scale == 1 else f"{self.name} (prompts × {input_scale:.3g})"
        return Lengths(name, prompts, outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """Independent requests at a rate, with gaps of a coefficient of variation (1 = Poisson, else gamma)."""

    rate: float  # req/s
    cv: float
    lengths: Lengths
    source: str = "spec"  # where it comes from, for people: the spec, or the window it was learned from

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise WorkloadError(f"rate is {self.rate}, not a number of requests per second above 0")
        if not (math.isfinite(self.cv) and self.cv >= 0):
            raise WorkloadError(f"the coefficient of variation is {self.cv}, not a number of at least 0")

    def requests(self, duration_s: float, seed: int) -> Requests:
        """The requests that arrive in [0, duration_s).

        Arrivals and lengths come from streams of their own, each drawn in order: another rate or duration of
        the same seed scales the same gaps and takes the same rows, as far as both go. Arrivals are rounded to
        1 µs, so that no ulp between machines is seen.
        """
        horizon_us = round(duration_s * 1e6)
        count = int(self.rate * duration_s * (1 + self.cv / 4)) + 64
        while True:
            unit = np.cumsum(self._gaps(seed, count))
            arrival_us = np.rint(unit * (1e6 / self.rate)).astype(np.int64)
            if arrival_us[-1] >= horizon_us:
                break
            count *= 2
        arrival_us = arrival_us[: int(np.searchsorted(arrival_us, horizon_us))]
        uniform = np.random.Generator(np.random.PCG64([seed, 1])).random(len(arrival_us))
        rows = (uniform * len(self.lengths)).astype(np.int64)
        return Requests(arrival_us * 1000, self.lengths.input[rows], self.lengths.output[rows])

    def _gaps(self, seed: int, count: int) -> npt.NDArray[np.float64]:
        """Gaps of mean 1; a longer draw begins with the shorter one."""
        draw = np.random.Generator(np.random.PCG64([seed, 0]))
        if self.cv == 0:
            return np.ones(count)
        if self.cv == 1:
            return draw.standard_exponential(count)
        return draw.standard_gamma(1 / self.cv**2, count) * self.cv**2


@functools.cache
def preset(name: Literal["sharegpt", "humaneval", "longbench"] | str) -> Lengths:
    """A shipped joint table of lengths (data/README.md has each one's origin). Raises `BadLengths`."""
    try:
        path = _LENGTHS / PRESETS[name]
    except KeyError:
        raise BadLengths(f"lengths preset {name!r} is not known; known are {', '.join(PRESETS)}") from None
    return dataclasses.replace(read_lengths(path), name=name)


def read_lengths(path: Path | str) -> Lengths:
    """Lengths from a CSV file: input_tokens,output_tokens (or input_len,output_len). Raises `BadLengths`."""
    path = Path(path)
    wanted = (("input_tokens", "output_tokens"), ("input_len", "output_len"))
    rows = [
        (_tokens(BadLengths, where, "the input", row[0]), _tokens(BadLengths, where, "the output", row[1]))
        for where, row in _rows(path, wanted, BadLengths)
    ]
    table = np.array(rows, dtype=np.int32)
    return Lengths(path.stem, table[:, 0].copy(), table[:, 1].copy())


def read_trace(path: Path | str) -> Requests:
    """A trace in its own order from a CSV file: arrival_s,input_tokens,output_tokens; more columns are
    ignored.

    Raises `BadTrace` with the line number for a row that is negative, empty, not a number, out of order, or
    has a length of 0 or of a million tokens and more.
    """
    path = Path(path)
    arrivals: list[int] = []
    inputs: list[int] = []
    outputs: list[int] = []
    for where, row in _rows(path, (("arrival_s", "input_tokens", "output_tokens"),), BadTrace):
        try:
            arrival_s = float(row[0])
        except ValueError:
            arrival_s = math.nan
        if not (0 <= arrival_s < 1e9):
            raise BadTrace(f"{where}: arrival_s is {row[0]!r}, not a number of seconds from 0 on")
        arrival_ns = round(arrival_s * 1e6) * 1000
        if arrivals and arrival_ns < arrivals[-1]:
            raise BadTrace(
                f"{where}: arrives at {arrival_s:g} s, before the line above; sort the trace by arrival_s"
            )
        arrivals.append(arrival_ns)
        inputs.append(_tokens(BadTrace, where, "input_tokens", row[1]))
        outputs.append(_tokens(BadTrace, where, "output_tokens", row[2]))
    return Requests(
        np.array(arrivals, dtype=np.int64),
        np.array(inputs, dtype=np.int32),
        np.array(outputs, dtype=np.int32),
    )


def _rows(
    path: Path, headers: Sequence[Sequence[str]], error: type[WorkloadError]
) -> Iterator[tuple[str, list[str]]]:
    """(where, the wanted columns) of each row, under the first of `headers` whose columns are all there."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise error(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise error(f"{path} is not UTF-8 text") from e
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        found = [c.strip() for c in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as e:
        raise error(f"{path}, line {reader.line_num}: is not CSV: {e}") from e
    columns = next((h for h in headers if set(h) <= set(found)), None)
    if columns is None:
        raise error(
            f"{path}, line 1: columns are {','.join(found) or 'none'}; expected {','.join(headers[0])}"
        )
    places = [found.index(c) for c in columns]
    if not rows:
        raise error(f"{path} has no rows below its header")
    for line, row in rows:
        where = f"{path}, line {line}"
        if len(row) <= max(places):
            raise error(f"{where}: has {len(row)} columns where {','.join(found)} were expected")
        yield where, [row[p].strip() for p in places]


def _tokens(error: type[WorkloadError], where: str, what: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:12]) < MAX_TOKENS:
        raise error(f"{where}: {what} is {text!r}, not a whole number of tokens from 1 to {MAX_TOKENS - 1:,}")
    return int(text)


# -------------------------------------------------------------------------------------- lengths from counters


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
    total = float(table.sum())
    if total <= 0:
        raise BadLengths("no request was counted, so there are no lengths to learn")
    share = table.ravel() / total * rows
    dealt = np.floor(share).astype(np.int64)
    # Ties go to the lowest cell: a stable sort of what is left over.
    dealt[np.argsort(-(share - dealt), kind="stable")[: rows - int(dealt.sum())]] += 1
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

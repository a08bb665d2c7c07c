"""Step times of one pipeline stage: the tables that the simulator's kernel and a paced worker both read.

prefill stage = knots(Σlen) + quad·Σlen²              decode stage = base[batch] + ctx[batch]·Σ(context+1)
both in one   = max(knots(Σchunk + batch), base[batch]) + quad·Σ(chunk² + 2·chunk·past) + ctx[batch]·Σ(context+1)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Tables = tuple[Ints, Floats, float, Floats, Floats]  # the first five fields of `StepTimes`

MAX_BATCH = 1024  # decode tables reach to this batch; beyond it their last difference goes on


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where step times come from."""

    source: Literal["fitted", "profile", "roofline"]
    detail: str
    borrowed: bool = False  # efficiency curves of another product
    measured: bool = False  # this very tp was measured (the profile's own form carries it over to other pp)
    elsewhere: str = ""  # the engine that was measured, where it is not the one planned for

    def describe(self) -> str:
        """One short phrase for people."""
        return self.detail + (f", measured on {self.elsewhere}" if self.elsewhere else "")


@dataclasses.dataclass(frozen=True, eq=False)
class StepTimes:
    """Times of one pipeline stage of one (model, GPU, tp, pp); a whole pass takes pp of them.

    All tables are non-negative, in nanoseconds. Roofline tables rise with tokens and batch; a fitted decode
    table may step down between its two regimes, as published (REFERENCE § 1).
    """

    prefill_knots_tokens: Ints  # [k], rising from 0; between knots linear, beyond the last with its slope
    prefill_knots_ns: Floats  # [k]
    prefill_quad_ns: float  # × Σ len²
    decode_base_ns: Floats  # [MAX_BATCH + 1], by batch
    decode_ctx_ns: Floats  # [MAX_BATCH + 1], ns per token of context, by batch
    pp: int
    provenance: Provenance

    def prefill_stage_s(self, lengths: Sequence[int]) -> float:
        """Seconds that one stage takes for a batch of prompts of these lengths (tokens)."""
        return self.stage_s([(n, 0) for n in lengths], 0, 0)

    def decode_stage_s(self, batch: int, context_tokens: int) -> float:
        """Seconds that one stage takes for a decode step of `batch` requests.

        `context_tokens` is Σ (context + 1): every request's tokens so far and the one being made.
        """
        return self.stage_s([], batch, context_tokens)

    def stage_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        """Seconds that one stage takes for a step with chunks of prompts beside `batch` requests that decode.

        A chunk is its tokens and those of its prompt that were computed before. The matrix products of all tokens read
        the weights once, so the larger of both forms holds for them, while attention adds up: the simulator's rule.
        """
        base, last = self.decode_base_ns, len(self.decode_base_ns) - 1
        linear, attention = 0.0, 0.0
        if chunks:
            tokens = sum(n for n, _ in chunks) + batch
            linear = _piecewise(tokens, self.prefill_knots_tokens, self.prefill_knots_ns)
            attention = self.prefill_quad_ns * sum(n * (n + 2 * past) for n, past in chunks)
        if batch:
            beyond = max(batch - last, 0)
            linear = max(linear, float(base[batch - beyond] + (base[last] - base[last - 1]) * beyond))
            attention += float(self.decode_ctx_ns[batch - beyond]) * context_tokens
        return (linear + attention) * 1e-9


def _piecewise(x: float, knots: Ints, values: Floats) -> float:
    i = min(max(int(np.searchsorted(knots, x, side="right")) - 1, 0), len(knots) - 2)
    slope = (values[i + 1] - values[i]) / (knots[i + 1] - knots[i])
    return float(values[i] + slope * (x - knots[i]))

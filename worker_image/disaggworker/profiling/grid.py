"""What is measured, in which order, and the rows it gives. No clock, no engine, no network."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

COLUMNS = "phase,batch,tokens,context_tokens,tp,pp,seconds"  # of disaggserve.latency.measurements


@dataclasses.dataclass(frozen=True)
class Cell:
    """One step: `batch` prompts of `length` tokens, or `batch` requests that have `length` tokens in the cache."""

    phase: Literal["prefill", "decode"]
    batch: int
    length: int

    def __str__(self) -> str:
        what = "prompt" if self.phase == "prefill" else "context"
        requests = f"{self.batch} {what}s" if self.batch > 1 else f"one {what}"
        return f"{self.phase} of {requests} of {self.length} tokens"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a step, and Σ tokens that were in the cache before it."""

    seconds: float
    context_tokens: int


class LeftOut(Exception):
    """This cell cannot be measured here; the message says why."""


class Door(Protocol):
    """A way to an engine."""

    context: int  # tokens of prompt and answer together

    def time(self, cell: Cell) -> Timing:
        """One measurement. Raises `LeftOut`."""


def cells(
    batches: Sequence[int], prompts: Sequence[int], contexts: Sequence[int], context: int, repeat: int
) -> tuple[list[Cell], list[str]]:
    """The cells of a grid that fit a context and so many passes, and a sentence for each length that does not.

    Single prompts, and several whose Σ is no more than the longest one; every batch at every context. A prompt needs room
    for one token of answer and is a token shorter in each pass, a context needs room for the step's token and the next.
    """
    fits = [n for n in prompts if repeat < n < context]
    held = [n for n in contexts if n + 2 <= context]
    said = [
        f"{what} of {n} tokens: beyond the context of {context}"
        for what, given, room in (("prompts", prompts, 1), ("contexts", contexts, 2))
        for n in given
        if n + room > context
    ]
    said += [
        f"prompts of {n} tokens: each of {repeat + 1} passes takes one token less"
        for n in prompts
        if n <= repeat
    ]
    several = [b for b in batches if b > 1]
    found = [Cell("prefill", b, n) for b in [1, *several] for n in fits if b == 1 or b * n <= max(fits)]
    return found + [Cell("decode", b, n) for b in batches for n in held], said


def measure(
    door: Door, grid: Iterable[Cell], repeat: int, advance: Callable[[], None]
) -> tuple[dict[Cell, Timing], list[str]]:
    """The mean of `repeat` passes over the grid, after one that is not counted; and what was left out, and why.

    The mean and not the median: a machine that now and then takes half as long again makes a queue wait for that, too.

    Whole passes, not one cell after another: what disturbs the machine for a while then falls on all cells alike.

    Each pass has prompts shorter by one token, and a row is of their mean length: one that comes again is a fifth
    faster on a CPU's vLLM (benchmarks/README, the simulator's word), and of traffic's few do.

    `advance` is called after every measurement.
    """
    taken: dict[Cell, list[tuple[Cell, Timing]]] = {cell: [] for cell in grid}
    said: list[str] = []
    for turn in range(repeat + 1):
        for cell in list(taken):
            this = _shorter(cell, turn)
            try:
                timing = door.time(this)
            except LeftOut as e:
                del taken[cell]
                said.append(f"{cell}: {e}")
                continue
            finally:
                advance()
            if turn:
                taken[cell].append((this, timing))
    return dict(map(_mean, taken.values())), said


def _shorter(cell: Cell, tokens: int) -> Cell:
    """Those prompts with so many tokens fewer; contexts stay."""
    return dataclasses.replace(cell, length=cell.length - tokens) if cell.phase == "prefill" else cell


def _mean(taken: Sequence[tuple[Cell, Timing]]) -> tuple[Cell, Timing]:
    length = round(statistics.mean(cell.length for cell, _ in taken))
    timing = Timing(
        statistics.mean(t.seconds for _, t in taken),
        round(statistics.mean(t.context_tokens for _, t in taken)),
    )
    return dataclasses.replace(taken[0][0], length=length), timing


def table(measured: dict[Cell, Timing], tp: int, pp: int) -> str:
    """CSV: `tokens` are those that the step works on, Σ prompt tokens or one a request."""
    rows = [COLUMNS]
    for cell, timing in measured.items():
        tokens = cell.batch * (cell.length if cell.phase == "prefill" else 1)
        rows.append(
            f"{cell.phase},{cell.batch},{tokens},{timing.context_tokens},{tp},{pp},{timing.seconds:.9f}"
        )
    return "\n".join(rows) + "\n"

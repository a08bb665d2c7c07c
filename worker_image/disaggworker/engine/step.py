"""One forward pass as plain numbers: what rank 0 decides and every rank of an instance carries out."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np
from numpy.typing import NDArray

from disaggworker.engine.sequence import Sequence


class Step(msgspec.Struct, frozen=True):
    """New tokens of several sequences. A prompt from nothing, a chunk of one on what is cached, and a decode step are the
    same thing, and may stand side by side.

    Row i of `counts`, `starts` and `blocks` is sequence i; `tokens` are those of sequence 0, then those of sequence 1, …
    """

    tokens: list[int]
    counts: list[int]  # new tokens of each sequence, at least 1
    starts: list[int]  # tokens that the cache holds before them
    blocks: list[list[int]]  # each one's block table; it covers starts + counts
    answers: list[int]  # sequences after whose last new token logits are wanted, rising

    def positions(self) -> NDArray[np.int64]:
        """Each new token's place in its sequence."""
        counts = np.asarray(self.counts)
        shift = np.asarray(self.starts) - (counts.cumsum() - counts)
        places: NDArray[np.int64] = np.arange(len(self.tokens)) + np.repeat(shift, counts)
        return places


def lay_out(batch: Iterable[tuple[Sequence, int]]) -> Step:
    """The step that computes the next so many tokens of each sequence. Who has none left after it is answered."""
    step = Step([], [], [], [], [])
    for row, (sequence, count) in enumerate(batch):
        assert sequence.kv is not None
        start = sequence.computed
        step.tokens.extend(sequence.tokens(start, start + count))
        step.counts.append(count)
        step.starts.append(start)
        step.blocks.append(sequence.kv.blocks)
        if start + count == sequence.length:
            step.answers.append(row)
    return step

"""The next token of every row of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from disaggworker.engine.sequence import Sequence


def choose(logits: Tensor, batch: list[Sequence]) -> list[int]:
    """One token per row of `logits` `[batch, vocab]`.

    A sampled token depends on the request's seed and the token's place in the answer alone: not on its neighbours in
    the batch, not on which worker draws it, and not on a preemption in between.
    """
    greedy: list[int] = logits.argmax(-1).tolist()
    for row, sequence in enumerate(batch):
        if sequence.sampling.temperature > 0:
            greedy[row] = _draw(logits[row].float().cpu(), sequence)
    return greedy


def _draw(logits: Tensor, sequence: Sequence) -> int:
    how = sequence.sampling
    logits = logits / how.temperature
    if 0 < how.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], -torch.inf)
    share = logits.softmax(-1)
    if how.top_p < 1.0:
        ordered, index = share.sort(descending=True, stable=True)
        # The smallest set that reaches top_p: a token stays if those before it do not.
        ordered[ordered.cumsum(-1) - ordered >= how.top_p] = 0.0
        share = torch.zeros_like(share).scatter_(0, index, ordered)
    generator = torch.Generator().manual_seed(_mix(how.seed, len(sequence.output)))
    # The exponential race: argmax(p / e) is drawn with probability p, in one pass.
    race = torch.empty_like(share).exponential_(generator=generator)
    return int((share / race).argmax())


def _mix(seed: int, place: int) -> int:
    """A generator's seed from a request's seed and a place (splitmix64's finisher): near seeds give far streams."""
    z = (seed * 0x9E3779B97F4A7C15 + place * 0xD1B54A32D192ED03 + 1) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) & (2**63 - 1)

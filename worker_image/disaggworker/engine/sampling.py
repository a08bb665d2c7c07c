"""The next token of every row of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from disaggserve.protocol import Logprobs
from disaggworker.engine.sequence import Sequence, Token

_GREEDY = 1e-5  # temperatures below it are 0, as in vLLM: dividing by them overflows
_LEAST = -9999.0  # for minus infinity, which JSON does not know; vLLM's


def choose(logits: Tensor, batch: list[Sequence]) -> list[Token]:
    """One token per row of `logits` `[batch, vocab]`.

    A sampled token depends on the request's seed and the token's place in the answer alone: not on its neighbours in
    the batch, not on which worker draws it, and not on a preemption in between.
    """
    chosen: list[int] = logits.argmax(-1).tolist()
    for row, sequence in enumerate(batch):
        if sequence.sampling.temperature >= _GREEDY:
            chosen[row] = _draw(logits[row].float().cpu(), sequence)
    said = _logprobs(logits, chosen, batch)
    return [Token(token, said.get(row)) for row, token in enumerate(chosen)]


def _logprobs(logits: Tensor, chosen: list[int], batch: list[Sequence]) -> dict[int, Logprobs]:
    """By row, for those who asked: of the logits as the model gives them (vLLM's default, raw_logprobs)."""
    counts = {
        row: count for row, sequence in enumerate(batch) if (count := sequence.sampling.logprobs) is not None
    }
    if not counts:
        return {}
    share = logits[list(counts)].float().log_softmax(-1)
    index = torch.tensor([[chosen[row]] for row in counts], device=logits.device)
    own = share.gather(1, index).clamp(min=_LEAST)[:, 0].tolist()
    top = share.clamp(min=_LEAST).topk(min(max(counts.values()), share.shape[1]))
    ranked = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return {
        row: Logprobs(chosen=mine, top=list(zip(ids[:count], values[:count], strict=True)))
        for (row, count), mine, (ids, values) in zip(counts.items(), own, ranked, strict=True)
    }


def _draw(logits: Tensor, sequence: Sequence) -> int:
    how = sequence.sampling
    logits = logits / how.temperature
    if 0 < how.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], -torch.inf)
    share = logits.softmax(-1)
    if how.top_p < 1.0:
        ordered, index = share.sort(descending=True, stable=True)
        # The smallest set that reaches top_p: a token stays if those before it do not, and the likeliest always.
        ordered[1:][(ordered.cumsum(-1) - ordered)[1:] >= how.top_p] = 0.0
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

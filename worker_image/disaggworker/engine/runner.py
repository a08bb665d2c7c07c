"""From a step to logits, in one process."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from disaggworker.engine.attention import Attention
from disaggworker.engine.step import Step
from disaggworker.kv.pool import Pool
from disaggworker.model.load import Model


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step that was begun."""

    _logits: Tensor

    def logits(self) -> Tensor:
        """`[answers, vocab]` of its step; waits for them."""
        return self._logits


class Runner:
    """Carries steps out, in the order in which they were begun. Called in one thread."""

    def __init__(self, model: Model, pool: Pool) -> None:
        self.model, self.pool = model, pool

    def begin(self, step: Step) -> Pending:
        """Compute the step: its keys and values into the pool, its logits into what is returned."""
        device = self.model.device
        tokens = torch.tensor(step.tokens, device=device)
        positions = torch.from_numpy(step.positions()).to(device)
        last = None  # all of them
        if len(step.answers) < len(step.tokens):
            last = (torch.tensor(step.counts).cumsum(0) - 1)[step.answers].to(device)
        return Pending(self.model.forward(tokens, positions, Attention(self.pool, step), last))

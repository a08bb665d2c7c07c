"""From a step to logits, in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from disaggworker.engine.attention import Attend, Attention
from disaggworker.engine.step import Step
from disaggworker.kv.pool import Pool
from disaggworker.model.load import Model


class Pending(Protocol):
    """A step that was begun."""

    @property
    def ready(self) -> bool:
        """Whether `logits` would not wait."""

    def logits(self) -> Tensor:
        """`[answers, vocab]` of its step; waits for them."""


@dataclasses.dataclass(frozen=True)
class Computed:
    """A step that is over."""

    _logits: Tensor
    ready = True

    def logits(self) -> Tensor:
        """`[answers, vocab]` of its step."""
        return self._logits


class Runner:
    """Carries steps out, in the order in which they were begun. Called in one thread."""

    stages = 1  # steps that can be in flight

    def __init__(self, model: Model, pool: Pool) -> None:
        self.model, self.pool = model, pool
        self._attention = attention_on(model.device)
        self.on_ready: Callable[[], None] = lambda: (
            None
        )  # a step in flight has become ready; in another thread

    def begin(self, step: Step) -> Pending:
        """Compute the step: its keys and values into the pool, its logits into what is returned."""
        return Computed(self.forward(step))

    def forward(self, step: Step, x: Tensor | None = None) -> Tensor:
        """What the model gives for the step; `x` is what the stage before gave, where there is one."""
        device = self.model.device
        if x is None:
            x = torch.tensor(step.tokens, device=device)
        positions = torch.from_numpy(step.positions()).to(device)
        last = None  # all of them
        if len(step.answers) < len(step.tokens):
            last = (torch.tensor(step.counts).cumsum(0) - 1)[step.answers].to(device)
        return self.model.forward(x, positions, self._attention(self.pool, step), last)


def attention_on(device: torch.device) -> Callable[[Pool, Step], Attend]:
    """What attends on such a device. Triton, which a CPU does not have, is imported on a GPU only."""
    if device.type == "cuda":
        from disaggworker.cuda.attention import attention_for

        return attention_for
    return Attention


def runner_for(model: Model, pool: Pool) -> Runner:
    """The runner of one process on the model's device."""
    if model.device.type == "cuda":
        from disaggworker.cuda.runner import CudaRunner

        return CudaRunner(model, pool)
    return Runner(model, pool)

"""From a step to logits on an NVIDIA GPU: decode steps and short prompts as CUDA graphs, others kernel by kernel."""

from __future__ import annotations

import torch

from disaggworker.cuda.attention import PackedAttention
from disaggworker.cuda.graphs import DecodeGraphs, PromptGraphs
from disaggworker.engine.runner import Computed, Pending, Runner
from disaggworker.engine.step import Step
from disaggworker.kv.pool import Pool
from disaggworker.model.load import Model


class CudaRunner(Runner):
    """As `Runner`. Making one captures the graphs, which takes seconds; logits of those are valid until the next step."""

    def __init__(self, model: Model, pool: Pool) -> None:
        super().__init__(model, pool)
        with torch.inference_mode():
            self._graphs: list[DecodeGraphs | PromptGraphs] = [DecodeGraphs(model, pool)]
            if PackedAttention.knows(pool.dtype):
                self._graphs.append(PromptGraphs(model, pool))

    def begin(self, step: Step) -> Pending:
        """As `Runner`."""
        for graphs in self._graphs:
            if graphs.takes(step):
                return Computed(graphs.run(step))
        return super().begin(step)

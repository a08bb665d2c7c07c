"""Steps as CUDA graphs: hundreds of kernels that are started as one.

Python starts a kernel in tens of microseconds, a layer's take less to run in a decode step and in a short prompt. A graph
reads its inputs where they were when it was captured, so they have a place for good, which a step fills from pinned
memory. What a step does not need of it is padding, which reads and writes no cache.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disaggworker.cuda.attention import PackedAttention, PagedAttention, slots
from disaggworker.engine.step import Step
from disaggworker.kv.blocks import blocks_for
from disaggworker.kv.pool import Pool
from disaggworker.model.load import Model

# A step takes the smallest graph that holds it. Each costs start-up time, each row of padding a little of every step.
BATCHES = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
PROMPT_TOKENS = (
    64,
    128,
    192,
    256,
    320,
    384,
    448,
    512,
)  # longer ones keep the GPU busy for as long as their start takes
_PROMPTS = 16


class _Input:
    """Whole numbers, written on the host and read by graphs."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        self._near = torch.zeros(shape, dtype=torch.int32, pin_memory=True)
        self.device = torch.zeros(shape, dtype=torch.int32, device=device)
        self.host: NDArray[np.int32] = self._near.numpy()

    def send(self, rows: int) -> None:
        """Copy the first rows, when the device gets to it."""
        self.device[:rows].copy_(self._near[:rows], non_blocking=True)


class _Graphs:
    """One forward pass, captured at several sizes, the largest first: the others live in its memory."""

    def __init__(self, sizes: tuple[int, ...], forward: Callable[[int], Tensor]) -> None:
        self._sizes = sizes
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._logits = torch.empty_like(forward(sizes[-1]))
        memory = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        for size in reversed(sizes):
            forward(size)  # once without a graph: what it needs is compiled, and workspaces are taken
            torch.cuda.synchronize()
            self._graphs[size] = graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: KV is pulled and served.
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                logits = forward(size)
                self._logits[: len(logits)].copy_(logits)

    def size(self, count: int) -> int:
        """The smallest size that holds so many; waits until inputs may be written."""
        self._copied.synchronize()
        return self._sizes[bisect.bisect_left(self._sizes, count)]

    def replay(self, size: int, answers: int) -> Tensor:
        """Logits `[answers, vocab]`, valid until the next step of these graphs; the inputs have been sent."""
        self._copied.record()
        self._graphs[size].replay()
        return self._logits[:answers]


class DecodeGraphs:
    """One new token a sequence."""

    def __init__(self, model: Model, pool: Pool) -> None:
        """The pool's tensors must stay where they are."""
        self._model, self._pool = model, pool
        width = min(blocks_for(model.max_positions), pool.limit)
        self._heads = _Input(2, BATCHES[-1], device=model.device)  # tokens; lengths, 0 for padding
        self._tables = _Input(BATCHES[-1], width, device=model.device)
        self._known: list[list[int]] = [[] for _ in range(BATCHES[-1])]  # what stands in the tables
        self._graphs = _Graphs(BATCHES, self._forward)

    def _forward(self, size: int) -> Tensor:
        tokens, lengths = self._heads.device[:, :size]
        attention = PagedAttention(self._pool, self._tables.device[:size], lengths)
        return self._model.forward(tokens, (lengths - 1).clamp(min=0), attention, None)

    def takes(self, step: Step) -> bool:
        """Whether it is a step of these: one new token of each sequence, and all of them answered."""
        batch = len(step.counts)
        return batch <= BATCHES[-1] and len(step.tokens) == batch == len(step.answers)

    def run(self, step: Step) -> Tensor:
        """Logits `[batch, vocab]`; valid until the next call."""
        batch = len(step.tokens)
        size = self._graphs.size(batch)
        heads = self._heads.host
        heads[0, :batch] = step.tokens
        heads[1, :batch] = step.starts
        heads[1, :batch] += 1
        heads[1, batch:size] = 0
        self._heads.send(2)
        changed = 0
        for row, owned in enumerate(step.blocks):
            if owned != self._known[row]:
                self._known[row] = list(owned)
                reach = owned[: self._tables.host.shape[1]]
                self._tables.host[row, : len(reach)] = reach
                changed = row + 1
        if changed:
            self._tables.send(changed)
        return self._graphs.replay(size, batch)


class PromptGraphs:
    """Few short prompts, whole, packed one after another."""

    def __init__(self, model: Model, pool: Pool) -> None:
        """The pool's tensors must stay where they are."""
        self._model, self._pool = model, pool
        self._tokens = _Input(3, PROMPT_TOKENS[-1], device=model.device)  # token, position, slot or -1
        self._ends = _Input(
            2, _PROMPTS + 1, device=model.device
        )  # where each prompt begins, and the last ends; its last
        self._tokens.host[2] = -1
        self._tokens.send(3)
        self._graphs = _Graphs(PROMPT_TOKENS, self._forward)

    def _forward(self, size: int) -> Tensor:
        tokens, positions, places = self._tokens.device[:, :size]
        ends, last = self._ends.device
        return self._model.forward(
            tokens, positions, PackedAttention(self._pool, places, ends, size), last[:-1]
        )

    def takes(self, step: Step) -> bool:
        """Whether it is a step of these."""
        few = len(step.counts) == len(step.answers) <= _PROMPTS and len(step.tokens) <= PROMPT_TOKENS[-1]
        return few and not any(step.starts)

    def run(self, step: Step) -> Tensor:
        """Logits `[prompts, vocab]`; valid until the next call."""
        count, total = len(step.counts), len(step.tokens)
        size = self._graphs.size(total)
        tokens, ends = self._tokens.host, self._ends.host
        tokens[0, :total], tokens[1, :total] = step.tokens, step.positions()
        tokens[2, :total], tokens[2, total:size] = slots(step), -1
        ends[0, 0] = 0
        ends[0, 1 : count + 1] = np.cumsum(step.counts)
        ends[0, count + 1 :] = total
        ends[1, :count] = ends[0, 1 : count + 1] - 1
        ends[1, count:] = 0
        self._tokens.send(3)
        self._ends.send(2)
        return self._graphs.replay(size, count)

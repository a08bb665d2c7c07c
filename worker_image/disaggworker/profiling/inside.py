"""Our engine in this process: one step of it, timed.

A row holds what a step of `engine.Engine` does: its inputs, the model's forward pass, attention over paged KV, and the
choice of the next tokens, which waits for the device. It leaves out queueing, the hand-off of KV, detokenising and HTTP.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from disaggworker.engine.engine import Engine
from disaggworker.engine.runner import runner_for
from disaggworker.engine.scheduler import Batch, Scheduler
from disaggworker.engine.sequence import Sampling, Sequence
from disaggworker.errors import StartError
from disaggworker.kv.blocks import BlockManager, blocks_for
from disaggworker.kv.pool import Pool, blocks_in_memory
from disaggworker.model.load import Model, load
from disaggworker.profiling.grid import Cell, LeftOut, Timing

_GREEDY = Sampling(temperature=0.0, ignore_eos=True)
_TOKENS = range(10, 256)  # ids that every vocabulary has


class Inside:
    """A model in this process. `prepare` comes before `time`."""

    def __init__(self, model: Model, context: int = 0) -> None:
        """`context` 0: the model's own."""
        self._model = model
        self.context = min(context or model.max_positions, model.max_positions)
        self._random = random.Random(0)

    @classmethod
    def load(cls, weights: Path, dtype: str, context: int) -> Inside:
        """As a worker loads it. Raises `StartError`."""
        try:
            with torch.inference_mode():
                model, _ = load(weights, dtype)
        except RuntimeError as e:  # torch's, for memory and for shapes
            raise StartError(f"{weights} cannot be loaded: {e}") from None
        return cls(model, context)

    def prepare(self, grid: Iterable[Cell]) -> None:
        """Take KV memory for the largest cell, or as much of it as there is. Raises `StartError`."""
        model = self._model
        shape = (model.layers, model.kv_heads, model.head_dim)
        total = min(max(map(self._needed, grid)), blocks_in_memory(*shape, model.dtype, model.device))
        with torch.inference_mode():
            pool = Pool(*shape, total, model.dtype, model.device)
            for tensor in (*pool.keys, *pool.values):
                # Decode reads what nothing was prefilled into: memory that was never written may be one page of zeros.
                tensor.normal_()
        self._blocks = BlockManager(total)
        scheduler = Scheduler(self._blocks, batch_tokens=0)
        self._engine = Engine(runner_for(model, pool), scheduler, frozenset(), None, lambda _: None)

    def time(self, cell: Cell) -> Timing:
        """One step. Raises `LeftOut` where memory holds no such batch."""
        lengths = self._lengths(cell)
        owned = [self._blocks.allocate(blocks_for(n + (cell.phase == "decode"))) for n in lengths]
        batch = [
            Sequence(self._random.choices(_TOKENS, k=n), _GREEDY, 1, lambda _token, _finish: None, kv=kv)
            for n, kv in zip(lengths, owned, strict=True)
        ]
        try:
            if None in owned:
                raise LeftOut(
                    f"KV memory holds {self._blocks.total} blocks, and it takes {self._needed(cell)}"
                )
            if cell.phase == "decode":
                for sequence in batch:
                    # The last token is not in the cache yet: the step puts it there.
                    sequence.output, sequence.computed = [_TOKENS[0]], len(sequence.prompt)
            step = Batch(batch, [], [])
            if cell.phase == "prefill":
                step = Batch([], [], [(sequence, cell.length) for sequence in batch])
            if self._model.device.type == "cuda":
                torch.cuda.synchronize()
            with torch.inference_mode():
                begun = time.perf_counter()
                self._engine.compute(step)
                return Timing(time.perf_counter() - begun, sum(lengths) * (cell.phase == "decode"))
        except torch.OutOfMemoryError:
            raise LeftOut("the device has no memory for it") from None
        finally:
            for kv in owned:
                if kv is not None:
                    self._blocks.release(kv)

    def _needed(self, cell: Cell) -> int:
        """KV blocks that the step needs."""
        return sum(blocks_for(n + (cell.phase == "decode")) for n in self._lengths(cell))

    def _lengths(self, cell: Cell) -> list[int]:
        """Tokens of each request. What decodes together in service has contexts of all lengths, and where short ones are padded they
        pay for the longest: here they lie evenly around the cell's, from half of it at most."""
        if cell.phase == "prefill":
            return [cell.length] * cell.batch
        spread = min(cell.length / 2, self.context - 2 - cell.length)
        return [round(cell.length + spread * ((2 * i + 1) / cell.batch - 1)) for i in range(cell.batch)]

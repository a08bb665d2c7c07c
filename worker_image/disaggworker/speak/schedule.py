"""The scheduler of an instance that does everything: prompts for itself, prompts whose KV is kept, and KV from elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from disaggworker.engine.scheduler import Scheduler
from disaggworker.engine.sequence import Sequence
from disaggworker.kv.blocks import BlockManager, blocks_for


class Both(Scheduler):
    """`keep` is told of a sequence in `kept` whose prompt is computed; it holds its blocks until they are freed."""

    def __init__(
        self, blocks: BlockManager, keep: Callable[[Sequence], None], *, batch_tokens: int, lanes: int
    ) -> None:
        super().__init__(blocks, may_prefill=True, may_decode=True, batch_tokens=batch_tokens, lanes=lanes)
        self._keep = keep
        self.kept: set[Sequence] = set()
        self.fetching: deque[Sequence] = deque()  # wait for blocks to fetch KV into

    def add(self, sequence: Sequence) -> None:
        (self.fetching if sequence.on_admitted else self.waiting).append(sequence)

    def join(self, sequence: Sequence) -> None:
        if sequence in self.kept:
            self._keep(sequence)
        else:
            super().join(sequence)

    def leave(self, sequence: Sequence) -> None:
        if sequence in self.fetching:
            self.fetching.remove(sequence)
        self.kept.discard(sequence)
        super().leave(sequence)

    def admit(self) -> list[Sequence]:
        admitted = []
        while self.fetching and not self.preempted:
            head = self.fetching[0]
            head.kv = self.blocks.allocate(blocks_for(head.length))
            if head.kv is None:
                break
            admitted.append(self.fetching.popleft())
        return admitted

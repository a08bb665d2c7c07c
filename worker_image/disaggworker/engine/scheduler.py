"""Who is in the next step. Decides only: no tensor, no thread, no clock.

First come, first served. A prompt's blocks are taken whole before its prefill or its pull, for decode while 1 % of all stay
free; blocks grow with the answer; when none is free the last of the batch is put back and computed again, before anybody new
(REFERENCE § 4).
"""

from __future__ import annotations

from collections import deque

from disaggworker.engine.sequence import Sequence
from disaggworker.kv.blocks import Allocation, BlockManager, blocks_for

MAX_BATCH_REQUESTS = 256
RESERVE = 100  # of so many blocks one stays free when decode admits: room to grow, or it preempts at once


class Scheduler:
    """Queues and batches of one instance. `lanes` = pipeline stages: decode batches that run in turn."""

    def __init__(
        self, blocks: BlockManager, *, may_prefill: bool, may_decode: bool, batch_tokens: int, lanes: int = 1
    ) -> None:
        self.blocks = blocks
        self.may_prefill, self.may_decode = may_prefill, may_decode
        self.batch_tokens = batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.preempted: deque[Sequence] = deque()
        self.lanes: list[list[Sequence]] = [[] for _ in range(lanes)]
        self.preemptions = 0

    @property
    def running(self) -> int:
        """Sequences that decode."""
        return sum(map(len, self.lanes))

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def join(self, sequence: Sequence) -> None:
        """Put a sequence whose KV is there into the shortest lane."""
        sequence.lane = min(range(len(self.lanes)), key=lambda i: len(self.lanes[i]))
        self.lanes[sequence.lane].append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        for queue in (self.lanes[sequence.lane], self.waiting, self.preempted):
            if sequence in queue:
                queue.remove(sequence)
        self.free(sequence)

    def free(self, sequence: Sequence) -> None:
        """Give back the blocks of a sequence, if it has any."""
        if sequence.kv is not None:
            self.blocks.release(sequence.kv)
            sequence.kv = None
            sequence.computed = 0

    def admit(self) -> list[Sequence]:
        """Decode only: waiting sequences whose prompt's blocks are free, and taken now, to be pulled into."""
        admitted: list[Sequence] = []
        # Who was put back goes first: its blocks must not go to a newcomer.
        while self.waiting and not self.preempted and not self.may_prefill:
            head = self.waiting[0]
            head.kv = self._take(blocks_for(head.length - 1))  # the last token is computed here
            if head.kv is None:
                break
            admitted.append(self.waiting.popleft())
        return admitted

    def _take(self, count: int) -> Allocation | None:
        """Blocks to decode with, none where that leaves too few to grow into; all of an instance are for whoever is alone."""
        free, total = self.blocks.free, self.blocks.total
        if free < total and count > free - total // RESERVE:
            return None
        return self.blocks.allocate(count)

    def prefill_batch(self) -> list[Sequence]:
        """Sequences to compute whole: those put back, else new ones; up to `batch_tokens`, a longer one alone."""
        again = bool(self.preempted)
        queue = self.preempted or (self.waiting if self.may_prefill else None)
        batch: list[Sequence] = []
        tokens = 0
        while queue and len(batch) < MAX_BATCH_REQUESTS:
            head = queue[0]
            if batch and tokens + head.length > self.batch_tokens:
                break
            count = blocks_for(head.length)
            head.kv = self._take(count) if again else self.blocks.allocate(count)
            if head.kv is None:
                break
            tokens += head.length
            batch.append(queue.popleft())
        return batch

    def decode_batch(self, lane: int) -> list[Sequence]:
        """The lane's sequences, each with room for its next token; some may be put back for it."""
        members = self.lanes[lane]
        at = 0
        while at < len(members):
            sequence = members[at]
            assert sequence.kv is not None
            # The last token is not in the cache yet: this step puts it there.
            if blocks_for(sequence.length) <= len(sequence.kv.blocks) or self.blocks.grow(sequence.kv):
                at += 1
                continue
            last = members.pop()
            self.free(last)
            self.preempted.appendleft(last)
            self.preemptions += 1
        return list(members)

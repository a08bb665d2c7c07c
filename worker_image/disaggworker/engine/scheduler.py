"""Who is in the next step. Decides only: no tensor, no thread, no clock.

One step for every role, the simulator's (disaggserve.simulate): an instance that only prefills has nobody to decode, one
that only decodes has no prompts, a mixed one has both. Without `chunk` prompts go first and whole, up to `batch_tokens` a
step and a longer one alone, and decode waits meanwhile. With `chunk` a step has a token of everybody who decodes and
prompts cut to what is left of so many tokens, in one forward pass: nobody who decodes waits for a prompt.

First come, first served. A prompt's blocks are taken whole with its first tokens, or before its pull while 1 % of all stay
free; blocks grow with the answer; when none is free the last of the batch is put back, and comes back before anybody new, in
a step that computes all its tokens again beside who decodes (REFERENCE § 4).
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from disaggworker.engine.sequence import Sequence
from disaggworker.kv.blocks import BLOCK_TOKENS, BlockManager, blocks_for

RESERVE = 100  # of so many blocks one stays free when decode admits: room to grow, or it preempts at once


class Batch(NamedTuple):
    """What a step computes."""

    decodes: list[Sequence]  # the next token of each; who was put back computes all before it, too
    owing: list[
        Sequence
    ]  # who was put back and comes back beside prompts alone: all but the last token of each
    prompts: list[tuple[Sequence, int]]  # so many tokens of each

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prompts)

    def shares(self) -> list[tuple[Sequence, int]]:
        """Everybody, with the tokens of each in this step, in their order in it."""
        decodes = [(sequence, sequence.length - sequence.computed) for sequence in self.decodes]
        return decodes + [(sequence, sequence.owed) for sequence in self.owing] + self.prompts


class Scheduler:
    """Queues and batches of one instance. `lanes` = pipeline stages: batches that run in turn."""

    def __init__(self, blocks: BlockManager, *, batch_tokens: int, chunk: int = 0, lanes: int = 1) -> None:
        self.blocks, self.batch_tokens, self.chunk = blocks, batch_tokens, chunk
        self.prompts: deque[Sequence] = deque()  # not wholly in a step; the first may be in part
        self.waiting: deque[Sequence] = deque()  # prefilled elsewhere, to be pulled
        self.preempted: deque[Sequence] = deque()
        self.lanes: list[list[Sequence]] = [[] for _ in range(lanes)]
        self.preemptions = 0
        self.looked_up = self.found = 0  # prompt tokens asked of the prefix cache, and had

    @property
    def running(self) -> int:
        """Sequences that decode."""
        return sum(map(len, self.lanes))

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence: to prefill, or to be pulled."""
        (self.waiting if sequence.on_admitted else self.prompts).append(sequence)

    def join(self, sequence: Sequence) -> None:
        """Put a sequence whose KV is there into the shortest lane."""
        sequence.lane = min(range(len(self.lanes)), key=lambda i: len(self.lanes[i]))
        self.lanes[sequence.lane].append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its blocks go once no step and no pull holds it."""
        for queue in (self.lanes[sequence.lane], self.prompts, self.waiting, self.preempted):
            if sequence in queue:
                queue.remove(sequence)
        if not sequence.in_flight and not sequence.pulling:
            self.free(sequence)

    def free(self, sequence: Sequence) -> None:
        """Give back the blocks of a sequence, if it has any."""
        if sequence.kv is not None:
            self.blocks.release(sequence.kv)
            sequence.kv, sequence.computed = None, 0

    def admit(self) -> list[Sequence]:
        """Those to be pulled whose blocks are free, and taken now, with room for their first step.

        Who was put back goes first, and joins: its blocks must not go to a newcomer.
        """
        while self.preempted and self._take(self.preempted[0], self.preempted[0].length, self._spare()):
            self.join(self.preempted.popleft())
        admitted: list[Sequence] = []
        while self.waiting and not self.preempted:
            head = self.waiting[0]
            head.kv = self.blocks.allocate(blocks_for(head.length), spare=self._spare())
            if head.kv is None:
                break
            admitted.append(self.waiting.popleft())
        return admitted

    def step(self, lane: int) -> Batch:
        """The lane's next step; empty when it has none."""
        if not self.chunk and (prompts := self._prompts(self.batch_tokens)):
            return Batch([], [sequence for sequence in self.lanes[lane] if sequence.owed], prompts)
        decodes = self._decodes(lane)
        return Batch(decodes, [], self._prompts(self.chunk - len(decodes)) if self.chunk else [])

    def computed(self, sequence: Sequence) -> None:
        """A step that held the sequence is over: what it filled may be found by others."""
        kv, full = sequence.kv, sequence.computed // BLOCK_TOKENS
        if kv is not None and self.blocks.cache and full > kv.kept:
            self.blocks.keep(kv, sequence.keys_to(sequence.computed))

    def _spare(self) -> int:
        """Blocks that stay free when decode takes some, to grow into; all of an instance are for whoever is alone."""
        free, total = self.blocks.free, self.blocks.total
        return 0 if free == total else total // RESERVE

    def _prompts(self, room: int) -> list[tuple[Sequence, int]]:
        """Prompts in order, up to `room` tokens: whole, and a longer one alone; or in chunks, cut to what is left."""
        batch: list[tuple[Sequence, int]] = []
        while self.prompts:
            head = self.prompts[0]
            missing = self._missing(head)
            count = min(missing, room) if self.chunk else missing
            if count <= 0 or (batch and count > room):
                break
            if head.kv is None and not self._begin(head):
                break
            room -= count
            batch.append((head, count))
            if count < missing:
                break
            self.prompts.popleft()
        return batch

    def _begin(self, sequence: Sequence) -> bool:
        """Take a prompt's blocks, and its first decode step's if it stays; False where they are not free."""
        # Nobody begins while somebody waits to decode: the blocks are theirs.
        if self.preempted or self.waiting:
            return False
        stays = not sequence.hand_off and sequence.max_tokens > len(sequence.output) + 1
        if not self._take(sequence, sequence.length + stays, 0):
            return False
        sequence.found = sequence.computed
        if self.blocks.cache:
            self.looked_up += sequence.length
            self.found += sequence.found
        return True

    def _missing(self, sequence: Sequence) -> int:
        """Tokens of the sequence that are still to be computed."""
        done = sequence.computed
        if sequence.kv is None:
            done = self.blocks.known(self._keys(sequence)) * BLOCK_TOKENS
        return sequence.length - done

    def _keys(self, sequence: Sequence) -> list[bytes]:
        """By which blocks of a sequence may be found. Its last token is always computed: its logits are wanted."""
        return sequence.keys_to(sequence.length - 1) if self.blocks.cache else []

    def _take(self, sequence: Sequence, tokens: int, spare: int) -> bool:
        """Take blocks for so many tokens, filled ones where they are known; False where they are not free."""
        sequence.kv = self.blocks.allocate(blocks_for(tokens), self._keys(sequence), spare=spare)
        if sequence.kv is None:
            return False
        sequence.computed = sequence.kv.found * BLOCK_TOKENS
        return True

    def _decodes(self, lane: int) -> list[Sequence]:
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

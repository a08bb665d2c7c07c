"""One thread that owns the model, the pool and the queues: it takes steps and reports tokens once per step."""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Callable
from typing import Literal

import torch

from disaggworker.engine.runner import Runner
from disaggworker.engine.sampling import choose
from disaggworker.engine.scheduler import Scheduler
from disaggworker.engine.sequence import Sampling, Sequence, Token
from disaggworker.engine.step import lay_out
from disaggworker.pace import Pace, Pipeline

Event = tuple[Sequence, Token, str | None]

# A step that begins this soon after the one before it was due began when that one was due: waking up late by a
# fraction of a millisecond must not add up.
_SLACK_S = 0.003


@dataclasses.dataclass(eq=False)
class _Step:
    """A batch in flight: computed, and reported when its time is over."""

    kind: Literal["prefill", "decode"]
    batch: list[Sequence]
    tokens: list[Token]
    due_s: float
    lane: int = 0


class Engine:
    """Steps of one instance.

    `sink` gets the tokens of a step, in the engine's thread. `hold` takes a sequence whose prefill is done on an instance
    that does not decode: its blocks stay until `release`. Everything else is called through `post`.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        ends: frozenset[int],
        pace: Pace | None,
        sink: Callable[[list[Event]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner, self.pool, self.scheduler, self.pace = runner, runner.pool, scheduler, pace
        self._ends, self._sink, self._clock = ends, sink, clock
        self.hold: Callable[[Sequence], None] | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pipeline = Pipeline(pace.times.pp if pace else 1)
        self._flying: list[_Step] = []
        self._idle = True  # nothing was runnable at the last look
        self._boundary_s = 0.0  # when the last step was due
        self._turn = -1  # the lane that stepped last
        self._closed = False
        self.steps = self.late_steps = 0

    @property
    def running(self) -> int:
        """Sequences in the running batch."""
        prefilling = sum(len(step.batch) for step in list(self._flying) if step.kind == "prefill")
        return self.scheduler.running + prefilling

    # ------------------------------------------------------------------------------ from other threads

    def post(self, action: Callable[[], None]) -> None:
        """Do this in the engine's thread, soon."""
        self._inbox.put(action)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.arrived_s = self._clock()
        self.post(lambda: self.scheduler.add(sequence))

    def pulled(self, sequence: Sequence, prompt: list[int] | None) -> None:
        """Nothing writes to the blocks of this admitted sequence any more. Its KV is in them, of this prompt, and it decodes;
        None: the pull failed, and it is forgotten."""

        def act() -> None:
            sequence.pulling = False
            if sequence.aborted or sequence.kv is None or prompt is None:
                return self.scheduler.leave(sequence)
            sequence.prompt = prompt
            sequence.computed = sequence.length - 1
            return self.scheduler.join(sequence)

        self.post(act)

    def abort(self, sequence: Sequence) -> None:
        """Nobody wants this sequence any more. Harmless when it has ended."""

        def act() -> None:
            sequence.aborted = True
            if not sequence.in_flight and not sequence.pulling:
                self.scheduler.leave(sequence)

        self.post(act)

    def release(self, sequence: Sequence) -> None:
        """Free the blocks of a held sequence."""
        self.post(lambda: self.scheduler.free(sequence))

    def close(self) -> None:
        """End `run`."""

        def act() -> None:
            self._closed = True

        self.post(act)

    # ------------------------------------------------------------------------------ in the engine's thread

    def warm_up(self) -> None:
        """One prefill and one decode step, so that the first request does not pay for first calls."""
        owned = self.scheduler.blocks.allocate(min(2, self.scheduler.blocks.total))
        assert owned is not None
        probe = Sequence(
            [0] * 15, sampling=Sampling(temperature=0.0), max_tokens=2, on_token=lambda _t, _f: None, kv=owned
        )
        probe.output = [token.id for token in self.compute([(probe, 15)])]
        self.compute([(probe, 1)])
        self.scheduler.blocks.release(owned)

    def run(self) -> None:
        """Take steps until `close`."""
        with torch.inference_mode():
            while not self._closed:
                self._report(self._clock())
                if not self._launch(self._clock()):
                    self._wait()

    def _wait(self) -> None:
        """Until something is due or posted; then do everything that was posted."""
        due = [step.due_s for step in self._flying]
        if 0 < len(self._flying) < self._pipeline.stages and not self._idle:
            due.append(self._pipeline.free_s)
        timeout = max(0.0, min(due) - self._clock()) if due else None
        try:
            action = self._inbox.get(timeout=timeout) if timeout != 0.0 else self._inbox.get_nowait()
        except queue.Empty:
            return
        while True:
            action()
            try:
                action = self._inbox.get_nowait()
            except queue.Empty:
                return

    def _drain(self) -> None:
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _launch(self, now: float) -> bool:
        """Begin a step if the first stage is free and somebody is ready; True if so."""
        self._drain()
        for sequence in self.scheduler.admit():
            assert sequence.on_admitted
            sequence.pulling = True
            sequence.on_admitted()
        if len(self._flying) >= self._pipeline.stages or now < self._pipeline.free_s:
            self._idle = False
            return False
        step = self._next()
        if step is None:
            self._idle = True
            return False
        kind, batch, lane = step
        boundary = max(self._boundary_s, self._pipeline.free_s)
        start = boundary if not self._idle and now - boundary < _SLACK_S else now
        self._idle = False
        stage_s = 0.0
        for sequence in batch:
            sequence.in_flight = True
            sequence.scheduled_s = sequence.scheduled_s or now
        if self.pace:
            lengths = [sequence.length for sequence in batch]
            times = self.pace.times
            stage_s = (
                times.prefill_stage_s(lengths)
                if kind == "prefill"
                else times.decode_stage_s(len(batch), sum(lengths))
            )
        tokens = self.compute([(sequence, sequence.length - sequence.computed) for sequence in batch])
        done = self._clock()
        self.steps += 1
        if not self.pace:
            due = done
        else:
            due = self._pipeline.enter(start, stage_s)
            # The same for every pipeline: what is late is a stage that the next batch cannot enter in time.
            self.late_steps += done - start > 1.1 * stage_s
        self._flying.append(_Step(kind, batch, tokens, due, lane))
        return True

    def _next(self) -> tuple[Literal["prefill", "decode"], list[Sequence], int] | None:
        """Kind, batch and lane of the next step. Lanes take turns: the one that waits longest first."""
        if batch := self.scheduler.prefill_batch():
            return "prefill", batch, 0
        busy = {step.lane for step in self._flying if step.kind == "decode"}
        for _ in range(len(self.scheduler.lanes)):
            lane = self._turn = (self._turn + 1) % len(self.scheduler.lanes)
            if lane not in busy and (batch := self.scheduler.decode_batch(lane)):
                return "decode", batch, lane
        return None

    def compute(self, batch: list[tuple[Sequence, int]]) -> list[Token]:
        """Compute the next so many tokens of each sequence, into its blocks; the next token of each that is then complete."""
        step = lay_out(batch)
        for sequence, count in batch:
            sequence.computed += count
        answered = [batch[row][0] for row in step.answers]
        return choose(self.runner.begin(step).logits(), answered)

    def _report(self, now: float) -> None:
        """Hand over the tokens of every step whose time is over."""
        for step in [step for step in self._flying if step.due_s <= now]:
            self._flying.remove(step)
            self._boundary_s = step.due_s
            events = [
                event
                for sequence, token in zip(step.batch, step.tokens, strict=True)
                if (event := self._advance(sequence, token, step.kind))
            ]
            if events:
                self._sink(events)

    def _advance(self, sequence: Sequence, token: Token, kind: str) -> Event | None:
        sequence.in_flight = False
        if sequence.aborted:
            self.scheduler.leave(sequence)
            return None
        sequence.output.append(token.id)
        finish, how = None, sequence.sampling
        if token.id in how.stop_ids or (token.id in self._ends and not how.ignore_eos):
            finish = "stop"
        elif len(sequence.output) >= sequence.max_tokens:
            finish = "length"
        if finish:
            self.scheduler.leave(sequence)
        elif kind == "prefill":
            if self.scheduler.may_decode:
                self.scheduler.join(sequence)
            elif self.hold:
                self.hold(sequence)
        return sequence, token, finish

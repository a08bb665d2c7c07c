"""One thread that owns the model, the pool and the queues: it takes steps and reports tokens once per step."""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Callable

import torch

from disaggworker.engine.runner import Pending, Runner
from disaggworker.engine.sampling import choose
from disaggworker.engine.scheduler import Batch, Scheduler
from disaggworker.engine.sequence import Sampling, Sequence, Token
from disaggworker.engine.step import lay_out
from disaggworker.pace import Pace, Pipeline

Event = tuple[Sequence, Token, str | None]

# A step that begins this soon after the one before it was due began when that one was due: waking up late by a
# fraction of a millisecond must not add up.
_SLACK_S = 0.003


@dataclasses.dataclass(eq=False)
class _Flight:
    """A step in flight: reported when its logits have come and its time is over."""

    batch: Batch
    answered: list[Sequence]
    pending: Pending
    answers: dict[Sequence, Token] | None = None  # until its logits have come
    due_s: float = 0.0
    lane: int = 0

    def land(self) -> dict[Sequence, Token]:
        """Choose the next token of everybody who is answered; waits for the logits."""
        if self.answers is None:
            tokens = choose(self.pending.logits(), self.answered)
            self.answers = dict(zip(self.answered, tokens, strict=True))
        return self.answers


class Engine:
    """Steps of one instance.

    `sink` gets the tokens of a step, in the engine's thread. `hold` takes a sequence whose prefill is done and that is to
    be handed off: its blocks stay until `release`. Everything else is called through `post`.
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
        self._pipeline = Pipeline(pace.times.pp if pace else runner.stages)
        runner.on_ready = lambda: self.post(lambda: None)
        self._flying: list[_Flight] = []
        self._idle = True  # nothing was runnable at the last look
        self._boundary_s = 0.0  # when the last step was due
        self._closed = False
        self.steps = self.late_steps = 0

    @property
    def running(self) -> int:
        """Sequences in the running batch."""
        return self.scheduler.running + sum(len(flight.batch.prompts) for flight in list(self._flying))

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place in the batch."""
        scheduler = self.scheduler
        return len(scheduler.prompts) + len(scheduler.waiting) + len(scheduler.preempted)

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
            self.scheduler.computed(sequence)
            return self.scheduler.join(sequence)

        self.post(act)

    def abort(self, sequence: Sequence) -> None:
        """Nobody wants this sequence any more. Harmless when it has ended."""

        def act() -> None:
            sequence.aborted = True
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
        probe.output.append(self.compute(Batch([], [], [(probe, 15)]))[probe].id)
        self.compute(Batch([probe], [], []))
        self.scheduler.blocks.release(owned)

    def run(self) -> None:
        """Take steps until `close`."""
        with torch.inference_mode():
            while not self._closed:
                until = self.turn(self._clock())
                if not self._closed:
                    self._wait(until)

    def turn(self, now: float) -> float | None:
        """Do what was posted, report what is over at this time and begin what can begin. When to look again; None: once
        something more is posted. What is posted wakes the engine once: all of it is done before anything is looked at."""
        self._drain()
        self._report(now)
        if self._launch(now):
            return now
        due = [flight.due_s for flight in self._flying if flight.answers is not None]
        if 0 < len(self._flying) < self._pipeline.stages and not self._idle:
            due.append(self._pipeline.free_s)
        return min(due, default=None)

    def _wait(self, until: float | None) -> None:
        """Until then, or until something is posted; the first of it is done."""
        timeout = None if until is None else max(0.0, until - self._clock())
        try:
            action = self._inbox.get(timeout=timeout) if timeout != 0.0 else self._inbox.get_nowait()
        except queue.Empty:
            return
        action()

    def _drain(self) -> None:
        while True:
            try:
                action = self._inbox.get_nowait()
            except queue.Empty:
                return
            action()

    def _launch(self, now: float) -> bool:
        """Begin a step if the first stage is free and somebody is ready; True if so."""
        for sequence in self.scheduler.admit():
            assert sequence.on_admitted
            sequence.pulling = True
            sequence.on_admitted()
        if len(self._flying) >= self._pipeline.stages or now < self._pipeline.free_s:
            self._idle = False
            return False
        found = self._next()
        if found is None:
            self._idle = True
            return False
        batch, lane = found
        boundary = max(self._boundary_s, self._pipeline.free_s)
        start = boundary if not self._idle and now - boundary < _SLACK_S else now
        self._idle = False
        for sequence, _ in batch.shares():
            sequence.in_flight += 1
            sequence.scheduled_s = sequence.scheduled_s or now
        stage_s = self.pace.stage_s(batch) if self.pace else 0.0
        flight = self._begin(batch)
        if flight.pending.ready:
            flight.land()
        done = self._clock()
        self.steps += 1
        flight.due_s, flight.lane = done, lane
        if self.pace:
            flight.due_s = self._pipeline.enter(start, stage_s)
            # The same for every pipeline: what is late is a stage that the next batch cannot enter in time.
            self.late_steps += done - start > 1.1 * stage_s
        self._flying.append(flight)
        return True

    def _next(self) -> tuple[Batch, int] | None:
        """The next step and its lane: the first one that has none under way and finds work."""
        busy = {flight.lane for flight in self._flying}
        for lane in range(len(self.scheduler.lanes)):
            if lane not in busy and (batch := self.scheduler.step(lane)):
                return batch, lane
        return None

    def compute(self, batch: Batch) -> dict[Sequence, Token]:
        """Compute the batch's tokens into the blocks of their sequences; the next token of each that is then complete."""
        return self._begin(batch).land()

    def _begin(self, batch: Batch) -> _Flight:
        work = batch.shares()
        step = lay_out(work)
        for sequence, count in work:
            sequence.computed += count
        return _Flight(batch, [work[row][0] for row in step.answers], self.runner.begin(step))

    def _report(self, now: float) -> None:
        """Hand over the tokens of every step whose time is over."""
        for flight in [f for f in self._flying if f.pending.ready and f.due_s <= now]:
            self._flying.remove(flight)
            self._boundary_s = flight.due_s
            decoded = [self._advance(sequence, flight, joined=True) for sequence in flight.batch.decodes]
            others = flight.batch.owing + [sequence for sequence, _ in flight.batch.prompts]
            begun = [self._advance(sequence, flight, joined=False) for sequence in others]
            if events := [event for event in decoded + begun if event]:
                self._sink(events)

    def _advance(self, sequence: Sequence, flight: _Flight, *, joined: bool) -> Event | None:
        """A step that held the sequence is over: its token, where it has one. `joined`: it is in a lane."""
        sequence.in_flight -= 1
        if sequence.aborted:
            self.scheduler.leave(sequence)
            return None
        self.scheduler.computed(sequence)
        token = flight.land().get(sequence)
        if token is None:
            return None
        sequence.output.append(token.id)
        finish, how = None, sequence.sampling
        if token.id in how.stop_ids or (token.id in self._ends and not how.ignore_eos):
            finish = "stop"
        elif len(sequence.output) >= sequence.max_tokens:
            finish = "length"
        if finish:
            self.scheduler.leave(sequence)
        elif sequence.hand_off:
            assert self.hold
            self.hold(sequence)
        elif not joined:
            self.scheduler.join(sequence)
        return sequence, token, finish

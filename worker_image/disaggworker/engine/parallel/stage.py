"""A rank's share of a step; and how rank 0 leads the others through it."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future

import torch
from torch import Tensor

from disaggworker.config import Config
from disaggworker.engine.parallel.group import Group, open_store
from disaggworker.engine.parallel.ranks import Meet, Ranks, Run, Serve
from disaggworker.engine.runner import Computed, Pending, Runner
from disaggworker.engine.step import Step
from disaggworker.kv.pool import Pool, blocks_in_memory
from disaggworker.model.load import Model, device_of, load
from disaggworker.model.share import Share
from disaggworker.pace import Pace


def load_share(config: Config, rank: int, group: Group) -> tuple[Model, frozenset[int]]:
    """The share of `rank`, and the model's end-of-text tokens. Raises `StartError`."""
    if group.device.type == "cpu":
        # The ranks share the cores that one process would have.
        torch.set_num_threads(max(1, torch.get_num_threads() // (config.tp * config.pp)))
    share = Share(config.tp, config.pp, rank)
    if config.tp > 1:
        share = Share(config.tp, config.pp, rank, group.reduce)
    return load(config.weights, config.dtype, share)


def total_blocks(config: Config, pace: Pace | None, model: Model) -> int:
    """KV blocks beside what is loaded here: the real GPU's when paced, else what the flag or the memory says.

    Raises `StartError`.
    """
    if config.kv_blocks:
        return config.kv_blocks
    if pace:
        return pace.blocks
    return blocks_in_memory(model.layers, model.kv_heads, model.head_dim, model.dtype, model.device)


def pool_of(config: Config, model: Model, blocks: int) -> Pool:
    """Memory for so many KV blocks of what this rank computes."""
    return Pool(
        model.layers,
        model.kv_heads,
        model.head_dim,
        blocks,
        model.dtype,
        model.device,
        shared=config.kv_share,
    )


class Stage:
    """One rank's work on each step, in the order of the steps."""

    def __init__(self, runner: Runner, group: Group) -> None:
        self.runner, self.group = runner, group

    def compute(self, step: Step) -> Tensor | None:
        """On the last stage, logits `[answers, own vocabulary]`; elsewhere they are made of what is passed on."""
        model = self.runner.model
        x = None
        if not model.share.first:
            x = self.group.receive(len(step.tokens), model.hidden, model.dtype)
        x = self.runner.forward(step, x)
        if model.share.last:
            return x
        self.group.pass_on(x)
        return None


class _Awaited:
    """A step whose logits come from the last stage."""

    def __init__(self) -> None:
        self.future: Future[Tensor] = Future()

    @property
    def ready(self) -> bool:
        return self.future.done()

    def logits(self) -> Tensor:
        return self.future.result()


class Lead(Runner):
    """Carries steps out on all ranks. Called in one thread, on rank 0."""

    def __init__(self, model: Model, pool: Pool, group: Group, ranks: Ranks) -> None:
        super().__init__(model, pool)
        self.stages = model.share.pp
        self._stage, self._group, self._ranks = Stage(self, group), group, ranks
        self._begun: queue.SimpleQueue[tuple[int, _Awaited]] = queue.SimpleQueue()
        if self.stages > 1:
            threading.Thread(target=self._collect_all, name="logits", daemon=True).start()

    def begin(self, step: Step) -> Pending:
        """Compute this rank's share, and let the others compute theirs. Raises `RankLost`."""
        self._ranks.order(Run(step))
        own = self._stage.compute(step)
        if own is not None:
            return Computed(self._collect(len(step.answers), [own]))
        pending = _Awaited()
        self._begun.put((len(step.answers), pending))
        return pending

    def _collect(self, rows: int, parts: list[Tensor]) -> Tensor:
        """Logits `[rows, vocabulary]`: `parts` and those of the other ranks of the last stage."""
        model = self.model
        for source in self._group.answering if rows else []:
            own = Share(model.share.tp, model.share.pp, source).vocabulary(model.vocabulary)
            parts.append(self._group.collect(source, rows, own.stop - own.start, model.dtype))
        return torch.cat(parts, -1) if parts else torch.empty((0, model.vocabulary))

    def _collect_all(self) -> None:
        """In a thread of its own: steps come back in the order in which they were begun."""
        stream = torch.cuda.Stream() if self.model.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        with torch.inference_mode(), torch.cuda.stream(stream):
            while True:
                rows, pending = self._begun.get()
                try:
                    logits = self._collect(rows, [])
                    if stream:
                        stream.synchronize()
                except Exception as e:
                    pending.future.set_exception(e)
                else:
                    pending.future.set_result(logits)
                self.on_ready()


def lead(config: Config, ranks: Ranks) -> tuple[Lead, frozenset[int]]:
    """Load the model on all ranks: what carries steps out, and the end-of-text tokens.

    Raises `StartError`, `RankLost`.
    """
    size = config.tp * config.pp
    device = device_of(0, size)
    store, port = open_store(size)
    ranks.order(Meet(port))
    group = Group(store, config.tp, config.pp, 0, device)
    model, ends = load_share(config, 0, group)
    total = min(total_blocks(config, None, model), ranks.loaded())
    ranks.order(Serve(total))
    pool = pool_of(config, model, total)
    return Lead(model, pool, group, ranks), ends

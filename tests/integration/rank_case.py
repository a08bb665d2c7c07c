"""A program: load a model on tp × pp ranks, carry steps out, and write the logits of each. Called in a fork server's child.

Arguments: weights, tp, pp, dtype, a file for the logits. Some steps are in flight together where there are stages.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from disaggworker.config import read
from disaggworker.engine.parallel.rank import follow
from disaggworker.engine.parallel.ranks import Link, Ranks
from disaggworker.engine.parallel.stage import lead
from disaggworker.engine.step import Step
from disaggworker.kv.blocks import blocks_for

LENGTHS = (1, 2, 16, 17, 33, 64, 129, 200)
# Tokens of a step for a text of n: all but some, singles, chunks of some beside singles of others, the rest.
SHARES: tuple[Callable[[int], int], ...] = (
    lambda n: n - 21 if n > 21 else n // 2,
    lambda n: 1,
    lambda n: 13 if n % 2 else 1,
    lambda n: n,
)


def texts() -> list[list[int]]:
    """A text per length."""
    return [[5 + (7919 * i + 31 * row) % 500 for i in range(n)] for row, n in enumerate(LENGTHS)]


def steps(lanes: int) -> Iterator[tuple[list[int], list[int], Step]]:
    """Rows, how far each is when its step is over, and the step. `lanes` steps in a row share no sequence."""
    owned, first = [], 0
    for n in LENGTHS:
        owned.append(list(range(first, first + blocks_for(n))))
        first += len(owned[-1])
    done, known = [0] * len(LENGTHS), texts()
    for share in SHARES:
        for lane in range(lanes):
            rows = [r for r in range(lane, len(LENGTHS), lanes) if done[r] < LENGTHS[r]]
            counts = [min(share(LENGTHS[r]), LENGTHS[r] - done[r]) or 1 for r in rows]
            new = [known[r][done[r] : done[r] + count] for r, count in zip(rows, counts, strict=True)]
            answers = list(range(0, len(rows), 2))
            step = Step(
                [*itertools.chain(*new)], counts, [done[r] for r in rows], [owned[r] for r in rows], answers
            )
            for r, count in zip(rows, counts, strict=True):
                done[r] += count
            if rows:
                yield [rows[i] for i in answers], [done[rows[i]] for i in answers], step


def main() -> int:
    """Exit code."""
    weights, tp, pp, dtype, out = sys.argv[1:]
    flags = ["decode", "--model", "m", "--weights", weights, "--pairing-key", "k"]
    config = read([*flags, "--tp", tp, "--pp", pp, "--dtype", dtype, "--kv-blocks", "64"], {})
    ranks = Ranks(config.tp * config.pp - 1, functools.partial(follow, config))
    try:
        ranks.listen()
        logits: dict[str, Tensor] = {}
        with torch.inference_mode():
            runner, _ = lead(config, ranks)
            flying = deque()
            for number, (_, _, step) in enumerate(steps(2)):
                flying.append((number, runner.begin(step)))
                if len(flying) == runner.stages:
                    number, pending = flying.popleft()
                    logits[str(number)] = pending.logits().contiguous()
            for number, pending in flying:
                logits[str(number)] = pending.logits().contiguous()
        save_file(logits, Path(out))
    finally:
        ranks.close()
    return 0


def leave_ranks() -> int:
    """A worker with two ranks, one that listens and one that hangs, is killed in another session; says who they were."""
    read_end, write_end = os.pipe()
    worker = os.fork()
    if not worker:
        os.setsid()

        def body(rank: int, link: Link) -> None:
            os.write(write_end, f"{os.getpid()}\n".encode())
            while True:
                if rank == 1:
                    link.hear()
                else:
                    signal.pause()

        ranks = Ranks(2, body)
        signal.pause()
        ranks.close()
    pids = b""
    while pids.count(b"\n") < 2:
        pids += os.read(read_end, 64)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    print(pids.decode())
    return 0

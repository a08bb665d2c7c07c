"""What every rank but 0 does: load its share, then follow rank 0 step by step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol

import torch

from disaggworker.config import Config
from disaggworker.engine.parallel.group import Group, join_store
from disaggworker.engine.parallel.part import Part
from disaggworker.engine.parallel.ranks import End, Failed, Link, Loaded, Meet, Note, Run, Serve
from disaggworker.engine.parallel.stage import Stage, load_share, pool_of, total_blocks
from disaggworker.engine.runner import Runner
from disaggworker.errors import StartError
from disaggworker.model.load import device_of


class Attendant(Protocol):
    """What a rank does beside steps."""

    def hear(self, note: bytes) -> None:
        """A note from rank 0, in the rank's one thread, between the steps before and after it."""

    def close(self) -> None:
        """The worker ends."""


Attend = Callable[[Part, Callable[[bytes], None]], Attendant]


class Idle:
    """An attendant with nothing to attend to."""

    def __init__(self, part: Part, say: Callable[[bytes], None]) -> None:
        pass

    def hear(self, note: bytes) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def follow(config: Config, rank: int, link: Link, attend: Attend = Idle) -> None:
    """Until rank 0 is done; raises `EOFError` when it is gone. Exits with 1 when this rank cannot go on, and says why."""
    try:
        with torch.inference_mode():
            _follow(config, rank, link, attend)
    except EOFError:
        raise
    except Exception as e:
        # torch raises plain Exceptions for memory and for peers that are gone.
        link.say(Failed(" ".join(str(e).split()), isinstance(e, StartError), time.monotonic()))
        sys.exit(1)


def _follow(config: Config, rank: int, link: Link, attend: Attend) -> None:
    meet = link.hear()
    assert isinstance(meet, Meet)
    device = device_of(rank, config.tp * config.pp)
    group = Group(join_store(meet.port, config.tp * config.pp), config.tp, config.pp, rank, device)
    model, _ = load_share(config, rank, group)
    link.say(Loaded(total_blocks(config, None, model)))
    serve = link.hear()
    assert isinstance(serve, Serve)
    pool = pool_of(config, model, serve.blocks)
    stage = Stage(Runner(model, pool), group)
    attendant = attend(Part.of(model, pool), lambda body: link.say(Note(body)))
    try:
        while True:
            match link.hear():
                case Run(step):
                    logits = stage.compute(step)
                    if logits is not None and len(logits):
                        group.answer(logits)
                case Note(body):
                    attendant.hear(body)
                case End():
                    return
    finally:
        attendant.close()

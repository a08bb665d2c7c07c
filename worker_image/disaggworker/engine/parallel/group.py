"""What the ranks of an instance move between them, over torch.distributed. Collectives only: it knows no step and no model."""

from __future__ import annotations

import collections
import os
import socket
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"


def open_store(ranks: int) -> tuple[Store, int]:
    """Where `ranks` ranks meet, and its port: on loopback, which other pods of a node do not reach."""
    listener = socket.create_server((LOOPBACK, 0))
    port: int = listener.getsockname()[1]
    store = TCPStore(
        LOOPBACK,
        port,
        ranks,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def join_store(port: int, ranks: int) -> Store:
    """The store that rank 0 opened."""
    return TCPStore(LOOPBACK, port, ranks)


class Group:
    """This rank's ties: an all-reduce in its stage, hidden states from stage to stage, logits to rank 0.

    Every rank of the instance makes one at about the same time, and calls for a step what its place asks for, in the order
    of the steps. `collect` may be called in a thread of its own; everything else in one thread.
    """

    def __init__(self, store: Store, tp: int, pp: int, rank: int, device: torch.device) -> None:
        """Meets the others. Raises RuntimeError (torch's) if they do not come."""
        self._tp, self._rank, self.device = tp, rank, device
        self._stages = pp
        self._flying: collections.deque[tuple[dist.Work | None, Tensor]] = collections.deque()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=tp * pp
        )
        # All ranks make all groups, in one order.
        self._stage = [_group(range(first, first + tp)) for first in range(0, tp * pp, tp)][rank // tp]
        self.answering = [r for r in range((pp - 1) * tp, pp * tp) if r != 0]  # who sends logits to rank 0
        self._answers = _group([0, *self.answering])

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks of this stage, in x's place."""
        dist.all_reduce(x, group=self._stage)
        return x

    def receive(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """`[rows, width]` from the stage before."""
        x = torch.empty((rows, width), dtype=dtype, device=self.device)
        dist.recv(x, self._rank - self._tp)
        return x

    def pass_on(self, x: Tensor) -> None:
        """Give x to the next stage, and do not wait until it is there."""
        self._send(dist.isend(x, self._rank + self._tp), x)

    def answer(self, logits: Tensor) -> None:
        """Give logits to rank 0, and do not wait until they are there."""
        self._send(dist.isend(logits, 0, group=self._answers), logits)

    def _send(self, work: dist.Work | None, x: Tensor) -> None:
        # What is on its way is kept; no more than one step per stage is.
        self._flying.append((work, x))
        if len(self._flying) > self._stages:
            work, _ = self._flying.popleft()
            if work:
                work.wait()

    def collect(self, source: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Logits `[rows, width]` that rank `source` answers with. On rank 0."""
        x = torch.empty((rows, width), dtype=dtype, device=self.device)
        dist.recv(x, source, group=self._answers)
        return x

    def close(self) -> None:
        """Part from the others."""
        dist.destroy_process_group()


def _group(ranks: Iterable[int]) -> dist.ProcessGroup | None:
    made = dist.new_group(list(ranks))
    return made if isinstance(made, dist.ProcessGroup) else None  # torch's number for "not in it"

"""What goes wrong in a worker, one sentence each.

WorkerError
├── StartError         a flag, file or shape is not what it must be: exit code 1
├── RankLost           a process of this instance has ended: exit code 1
├── RequestError       the client's request is at fault or cannot be taken now: an HTTP status and OpenAI's error
└── TransferError      the KV of a request cannot be had: HTTP 502
    ├── HandoffGone    the lease ended, or the blocks belong to somebody else
    ├── NotPaired      prefill and decode worker are of different revisions
    ├── PeerLost       the prefill worker does not answer
    └── Corrupted      what arrived is not what was sent
"""

from __future__ import annotations

_MOST_CHARACTERS = 500


def brief(message: str) -> str:
    """The sentence, its middle left out where a client's own words have made it long."""
    if len(message) <= _MOST_CHARACTERS:
        return message
    return f"{message[:200]} … {message[-200:]}"


class WorkerError(Exception):
    """Anything a worker says no to, in one sentence."""


class StartError(WorkerError):
    """The worker cannot start."""


class RankLost(WorkerError):
    """A rank of this instance has ended, and nothing can be computed without it."""


class RequestError(WorkerError):
    """A request that is answered with an error; `param` names the field at fault."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(brief(message))
        self.status, self.param, self.code = status, param, code


class TransferError(WorkerError):
    """The KV of a request could not be pulled."""

    code = "kv_transfer_failed"


class HandoffGone(TransferError):
    """The hand-off's lease ended, or its blocks were reused."""

    code = "handoff_gone"


class NotPaired(TransferError):
    """The two workers do not belong together."""

    code = "not_paired"


class PeerLost(TransferError):
    """The prefill worker does not answer."""

    code = "prefill_worker_lost"


class Corrupted(TransferError):
    """A checksum does not fit: what arrived is not what was sent."""

    code = "kv_corrupted"

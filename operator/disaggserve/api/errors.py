"""Every error that a user can meet, as one tree.

DisaggServeError
├── InvalidInput            the input is at fault: exit code 1, condition or refusal that names the field
│   ├── InvalidManifest     a `DisaggServe` document: one `Fault` per wrong field
│   └── …                   files: traces, profiles, node lists (raised where they are read)
├── Infeasible              no plan keeps the promise: exit code 3, `PlanFeasible=False`
└── Unsupported             asked for something that this release does not do: said in one sentence, before anything is made
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class DisaggServeError(Exception):
    """Base of all errors that carry one clear sentence for the user.

    `args` are the constructor's, so that they cross the border of the search process.
    """


class InvalidInput(DisaggServeError):
    """What the user gave is wrong; nothing was done."""


@dataclass(frozen=True)
class Fault:
    """One wrong field: where it stands, what is wrong with it, what would be right."""

    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class InvalidManifest(InvalidInput):
    """A `DisaggServe` document with at least one fault."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        return "; ".join(map(str, self.faults))


class Infeasible(DisaggServeError):
    """No plan keeps the promise. `limit` is one word for programs, the message says which limit binds and what could be kept."""

    def __init__(self, limit: str, message: str) -> None:
        self.limit = limit
        super().__init__(limit, message)

    def __str__(self) -> str:
        return str(self.args[1])


class Unsupported(DisaggServeError):
    """A right request for something that this release does not do yet."""

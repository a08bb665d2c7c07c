"""Requests in order of arrival, and the errors of all that is read or drawn into them."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from disaggserve.api.errors import InvalidInput

Lens = npt.NDArray[np.int32]
Times = npt.NDArray[np.int64]


class WorkloadError(InvalidInput, ValueError):
    """What is wrong with the traffic given, in one sentence."""


class BadTrace(WorkloadError):
    """A trace file has a row that is no request."""


class BadLengths(WorkloadError):
    """Lengths that no request can have."""


@dataclasses.dataclass(frozen=True, eq=False)
class Requests:
    """Requests in order of arrival. Equal lengths; every prompt and answer has at least one token."""

    arrival_ns: Times  # int64[n], not falling, whole microseconds
    input: Lens  # int32[n] prompt tokens
    output: Lens  # int32[n] tokens to generate, the first one included
    cached: Lens | None = (
        None  # int32[n] prompt tokens found in a prefix cache, less than input; None: none are
    )

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice) -> Requests:
        """These rows, in the order given."""
        cached = None if self.cached is None else self.cached[rows]
        return Requests(self.arrival_ns[rows], self.input[rows], self.output[rows], cached)

    def within(self, context_length: int) -> tuple[Requests, int]:
        """Those whose prompt and answer fit the model's context together, and how many were left out."""
        fits = self.input.astype(np.int64) + self.output <= context_length
        return self.take(fits), int(len(fits) - np.count_nonzero(fits))

    def cached_share(self) -> float:
        """Of all prompt tokens, those found in a prefix cache."""
        if self.cached is None:
            return 0.0
        return float(self.cached.sum(dtype=np.int64) / self.input.sum(dtype=np.int64))

    def faster(self, speed: float) -> Requests:
        """The same in 1/`speed` of the time from the first arrival, rounded to 1 µs. Raises `WorkloadError`."""
        if not 0 < speed < 1e6:
            raise WorkloadError(f"speed is {speed:g}, not a number above 0")
        if not len(self):
            return self
        start = self.arrival_ns[0]
        since_us = np.rint((self.arrival_ns - start) / (1000 * speed)).astype(np.int64)
        return dataclasses.replace(self, arrival_ns=start + since_us * 1000)

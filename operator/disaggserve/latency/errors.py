"""What the latency model cannot answer, all of it `LatencyError` (a `ValueError`) with one sentence each.

LatencyError
├── BadProfile           a profile file cannot be read, or lacks what was asked for
├── BadMeasurements      a table of measured steps has a wrong row, or cannot tell the fit's constants apart
└── FasterThanPhysics    a step is faster than the GPU's datasheet allows
"""

from __future__ import annotations

from disaggserve.api.errors import InvalidInput


class LatencyError(InvalidInput, ValueError):
    """What the latency model cannot answer, in one sentence."""


class BadProfile(LatencyError):
    """A profile file cannot be read, or lacks what was asked for."""


class BadMeasurements(LatencyError):
    """A table of measured steps has a wrong row, or cannot tell the fit's constants apart."""


class FasterThanPhysics(LatencyError):
    """A step is faster than the GPU's datasheet allows."""

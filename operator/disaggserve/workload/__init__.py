"""Traffic as values: joint (input, output) lengths in tokens, arrivals, traces.

No randomness but a seed: the same (workload, duration, seed) gives the same requests on every machine, and
two rates of one seed share their draws (common random numbers), so that their difference is the rate's.

Errors: `BadTrace`, `BadLengths` (both `WorkloadError`, a `ValueError`), one sentence with the line number.
"""

from disaggserve.workload.arrivals import Workload, from_trace, trace_rate
from disaggserve.workload.counters import from_cells
from disaggserve.workload.lengths import PRESETS, Lengths, preset, read_lengths
from disaggserve.workload.requests import BadLengths, BadTrace, Lens, Requests, Times, WorkloadError
from disaggserve.workload.traces import read_trace, replay_prefixes

__all__ = [
    "PRESETS",
    "BadLengths",
    "BadTrace",
    "Lengths",
    "Lens",
    "Requests",
    "Times",
    "Workload",
    "WorkloadError",
    "from_cells",
    "from_trace",
    "preset",
    "read_lengths",
    "read_trace",
    "replay_prefixes",
    "trace_rate",
]

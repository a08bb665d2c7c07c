"""How long a step takes, as small tables that the simulator's kernel and a paced worker both read.

Three sources in order of trust (DESIGN, *How it decides*): fitted to measurements of this engine (`fitting`), a
shipped profile (DistServe's fits of OPT on A100-80G, our engine's of Llama-3-8B and OPT-13B on H100), a roofline with efficiency by shape. Every `StepTimes` says
which one it is. Beside this module: `steps` (the tables), `profiles` and their file format `records`, `roofline`,
`physics` (what no step may beat), `sources` (which of the three answers), `measurements` and `fitting`, `errors`.
"""

from __future__ import annotations

from disaggserve.latency.errors import BadMeasurements, BadProfile, FasterThanPhysics, LatencyError
from disaggserve.latency.profiles import Fit, Profile, shipped_profile, shipped_profiles
from disaggserve.latency.sources import profile_for, saturation_tokens, step_times, transfer_s
from disaggserve.latency.steps import MAX_BATCH, Provenance, StepTimes

__all__ = [
    "MAX_BATCH",
    "BadMeasurements",
    "BadProfile",
    "FasterThanPhysics",
    "Fit",
    "LatencyError",
    "Profile",
    "Provenance",
    "StepTimes",
    "profile_for",
    "saturation_tokens",
    "shipped_profile",
    "shipped_profiles",
    "step_times",
    "transfer_s",
]

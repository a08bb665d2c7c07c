"""What the search is asked, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from disaggserve import latency
from disaggserve.api.errors import Infeasible
from disaggserve.catalogue import Link, Model
from disaggserve.engines import Engine
from disaggserve.hardware import Inventory
from disaggserve.search.packing import Group, Standing
from disaggserve.simulate import Prediction, Promise
from disaggserve.workload import Workload

Progress = Callable[[str, int, int], None]  # what is being done, how many of it are done, of how many


class Shape(NamedTuple):
    """How one instance is split over its GPUs."""

    tp: int
    pp: int

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp{self.tp}" + (f"pp{self.pp}" if self.pp > 1 else "")


class Rejected(NamedTuple):
    """An alternative and why it lost."""

    what: str
    reason: str


class TooShort(Infeasible):
    """A limit that not even idle instances keep. `what` it is, and the least of it in seconds that an idle one keeps."""

    def __init__(self, limit: str, message: str, what: Literal["TTFT", "TPOT"], idle_s: float) -> None:
        super().__init__(limit, message)
        self.what, self.idle_s = what, idle_s
        self.args = (limit, message, what, idle_s)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Traffic, promise and hardware. `workload.lengths` are already cut to the model's context."""

    model: Model
    promise: Promise
    workload: Workload
    inventory: Inventory
    engine: Engine
    algorithm: Literal["Joint", "DistServe", "HighAffinity", "LowAffinity"]
    max_gpus: int
    affinity: Literal["Auto", "High", "Low"] = "Auto"
    max_nodes_per_instance: int = 1  # an instance is one pod, so more than 1 changes nothing yet
    keep: tuple[Standing, ...] = ()
    seed: int = 0
    profile: latency.Profile | None = (
        None  # source of step times where it covers model and GPU; None: shipped
    )
    objective: Literal["gpus", "goodput"] = (
        "gpus"  # the least for `workload.rate`, or the most of the GPUs at hand
    )
    prices: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of a GPU-hour, by product
    explain: bool = True  # where there is no plan: whether to look for what could be kept


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """The plan that was found. Rates in req/s; `goodput` is the whole placement's, `bound` is per GPU. `rate` is
    what it was made for: the workload's, or with the objective "goodput" its own goodput."""

    algorithm: Literal["Joint", "HighAffinity", "LowAffinity"]
    affinity: Literal["High", "Low"]
    affinity_reason: str
    groups: tuple[Group, ...]
    gpus: int
    rate: float
    link: Link  # the slowest that KV takes
    paired: bool  # each prefill stands with its decode in one container
    goodput: float
    prediction: Prediction
    bottleneck: str
    bound: float
    bound_share: float
    latency_source: str
    rejected: tuple[Rejected, ...]
    simulations: int

"""The plan: one type from the search to the committed revision, the status and the command line.

Rates are req/s, times are seconds, attainment is a share in 0…1.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field

from disaggserve.api.model import ApiModel, Rule

RoleName = Literal["prefill", "decode", "mixed"]
Kind = Literal[RoleName, "colocated"]
SlotRole = Literal[RoleName, "pair"]
Identity = tuple[str, int, int, int, int]
Text = Annotated[str, Field(max_length=1024)]
Name = Annotated[str, Field(max_length=253)]


class NodeShare(ApiModel):
    """How many instances of a role stand on one node."""

    name: Name = Field(description="Name of the node. Example: gpu-0.")
    count: int = Field(ge=1, le=512, description="Instances of this role there. Example: 2.")


class RolePlan(ApiModel):
    """All instances of one role and one shape."""

    role: RoleName = Field(description="What the instances may do: prefill, decode, or mixed: both.")
    tp: int = Field(ge=1, le=64, description="Tensor parallelism: GPUs that share each layer. Example: 2.")
    pp: int = Field(ge=1, le=64, description="Pipeline parallelism: stages of layers. Example: 1.")
    count: int = Field(ge=1, le=512, description="Number of instances; each uses tp x pp GPUs. Example: 3.")
    chunk: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        default=None,
        description="Mixed: tokens of a step, prompts cut to fit; left out: whole prompts first. Example: 512.",
    )
    nodes: tuple[NodeShare, ...] = Field(
        default=(),
        max_length=128,
        description="Where they stand. Left out in a plan by hand, the operator chooses.",
    )

    rules = (
        Rule(
            "!has(self.nodes) || size(self.nodes) == 0 || self.nodes.map(n, n.count).sum() == self.count",
            "nodes: the counts must add up to count; correct one of them or leave nodes out",
            lambda self: not self.nodes or sum(n.count for n in self.nodes) == self.count,
            "nodes",
        ),
        Rule(
            "!has(self.chunk) || self.role == 'mixed'",
            "only mixed instances have a chunk",
            lambda self: self.chunk is None or self.role == "mixed",
            "chunk",
        ),
    )

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.count

    def words(self) -> str:
        shape = f"{self.count}×tp{self.tp}" + (f"pp{self.pp}" if self.pp > 1 else "")
        return shape + (f" with {self.prompts()}" if self.role == "mixed" else "")

    def prompts(self) -> str:
        """How mixed instances take prompts: `whole prompts`, `chunks of 512`."""
        return f"chunks of {self.chunk}" if self.chunk else "whole prompts"


class Percentiles(ApiModel):
    """Seconds."""

    p50: float = Field(description="Median, seconds. Example: 0.08.")
    p90: float = Field(description="90th percentile, seconds. Example: 0.16.")
    p99: float = Field(description="99th percentile, seconds. Example: 0.31.")


class Prediction(ApiModel):
    """What the simulator says of a plan under one workload."""

    attainment: float = Field(
        ge=0, le=1, description="Share of requests that meet TTFT and TPOT. Example: 0.94."
    )
    attainment_low: float = Field(ge=0, le=1, description="Lower end of the 95 % interval. Example: 0.93.")
    attainment_high: float = Field(ge=0, le=1, description="Upper end of the 95 % interval. Example: 0.95.")
    ttft: Percentiles = Field(description="Time to first token, seconds.")
    tpot: Percentiles = Field(description="Time per output token after the first, seconds.")
    requests: int = Field(ge=0, description="Requests that were simulated. Example: 6000.")


class WorkloadSummary(ApiModel):
    """What the plan was made for."""

    rate: float = Field(ge=0, description="Requests per second planned for, headroom included. Example: 6.0.")
    input_mean: float = Field(ge=0, description="Mean prompt length, tokens. Example: 758.7.")
    output_mean: float = Field(ge=0, description="Mean output length, tokens. Example: 186.3.")
    cv: float = Field(
        ge=0, description="Coefficient of variation of the gaps between arrivals; 1 is Poisson. Example: 1.0."
    )
    source: Text = Field(
        description="Where it comes from: the spec, or what Prometheus saw. Example: observed over 10m."
    )


class Rejected(ApiModel):
    """An alternative and why it lost."""

    what: Text = Field(description="The alternative. Example: prefill tp4, decode tp1.")
    reason: Text = Field(
        description="Why it is not the plan. Example: 0.91 req/s per GPU, the best has 1.42."
    )


class RefusedNode(ApiModel):
    """A node that was not counted."""

    name: Name = Field(description="Name of the node. Example: gpu-3.")
    reason: Text = Field(description="Why, in one sentence. Example: cordoned (spec.unschedulable).")


class ProfileName(ApiModel):
    """The measured step times that a plan was made with."""

    name: Text = Field(description="Name of the profile. Example: a100 fit.")
    digest: Text = Field(description="SHA-256 of what it says.")


class Setting(ApiModel):
    """What `disaggserve simulate --plan` must know to replay the plan without the resource and the cluster."""

    model: Text = Field(description="The model's id. Example: facebook/opt-13b.")
    config: Annotated[str, Field(max_length=16384)] | None = Field(
        default=None, description="Its config.json, if the catalogue does not know it."
    )
    engine: Text = Field(description="The engine. Example: torch.")
    gpu: Text = Field(description="The GPU's product label. Example: NVIDIA-A100-SXM4-80GB.")
    decode_gpu: Text | None = Field(
        default=None, description="That of decode instances, where it is another one. Example: NVIDIA-L40S."
    )
    profile: ProfileName | None = Field(
        default=None, description="The profile it was made with; left out: the release's own."
    )
    link: Text = Field(
        description="What KV crosses between prefill and decode: nvlink, pcie, rdma or tcp; or zmq, the torch engine's own messages "
        "through the memory of the hosts, where these are slower than the link between its GPUs. Example: rdma."
    )
    ttft: float = Field(gt=0, description="Promised TTFT, seconds. Example: 0.25.")
    tpot: float = Field(gt=0, description="Promised TPOT, seconds. Example: 0.1.")
    attainment: float = Field(ge=0, le=1, description="Share of requests that must meet both. Example: 0.9.")


class Search(ApiModel):
    """What finding the plan took, without imports and compiling."""

    seconds: float = Field(ge=0, description="Wall clock, seconds. Example: 0.4.")
    cpu_seconds: float = Field(ge=0, description="CPU, seconds. Example: 0.4.")
    simulations: int = Field(ge=0, description="Simulations run. Example: 120.")


class Plan(ApiModel):
    """Instances per role with their shapes and nodes, for one workload, with what was predicted."""

    revision: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Number of the committed revision. Example: 2."
    )
    algorithm: Literal["HighAffinity", "LowAffinity", "Joint", "ByHand"] = Field(
        description="Placement algorithm: Joint (both pools searched together), the paper's Algorithm 1 (HighAffinity) or 2 (LowAffinity), or a plan by hand."
    )
    affinity: Literal["High", "Low"] = Field(
        description="High: KV crosses nodes at RDMA speed. Low: it must stay inside a node."
    )
    affinity_reason: Text = Field(description="Why that affinity. Example: all 2 nodes have RDMA.")
    paired: bool = Field(
        default=False, description="True: each prefill stands with its decode in one container, on one node."
    )
    gpus: int = Field(ge=1, description="GPUs in all. Example: 3.")
    rate: float = Field(ge=0, description="Requests per second planned for. Example: 5.0.")
    goodput: float = Field(ge=0, description="Predicted goodput of the whole plan, req/s. Example: 6.2.")
    goodput_per_gpu: float = Field(ge=0, description="Goodput divided by GPUs, req/s. Example: 2.07.")
    cost: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="Price of its GPUs per hour, where hardware.prices are given. Example: 12.5.",
    )
    predicted: Prediction = Field(description="What the simulator says of this plan under this workload.")
    roles: tuple[RolePlan, ...] = Field(max_length=16, description="Shapes, counts and nodes by role.")
    prefill: Text = Field(default="", description="Prefill in short. Example: 1×tp2.")
    decode: Text = Field(default="", description="Decode in short. Example: 1×tp1.")
    mixed: Text = Field(default="", description="Mixed in short. Example: 3×tp2 with chunks of 2048.")
    bottleneck: Text = Field(
        default="", description="What binds each role. Example: prefill: TTFT; decode: KV memory."
    )
    bound: float = Field(
        default=0,
        ge=0,
        description="Physical bound of goodput per GPU, req/s; 0: not computed. Example: 7.6.",
    )
    bound_share: float = Field(
        default=0, ge=0, description="Share of the bound that is reached. Example: 0.31."
    )
    latency_source: Text = Field(
        description="Where the step times come from. Example: DistServe fit, A100-80G."
    )
    workload: WorkloadSummary = Field(description="What the plan was made for.")
    rejected: tuple[Rejected, ...] = Field(
        default=(), max_length=32, description="Alternatives and why they lost."
    )
    refused_nodes: tuple[RefusedNode, ...] = Field(
        default=(), max_length=256, description="Nodes not counted, and why."
    )
    emulated: bool = Field(
        default=False, description="True when nodes are simulated: figures served there are emulated."
    )
    setting: Setting | None = Field(default=None, description="What it takes to replay the plan.")
    search: Search | None = Field(default=None, description="What finding it took.")
    digest: Text = Field(default="", description="SHA-256 of the inputs and the discrete decisions.")

    def role(self, name: RoleName) -> tuple[RolePlan, ...]:
        return tuple(r for r in self.roles if r.role == name)


class Slot(ApiModel):
    """One planned pod: an instance, or a low-affinity pair of two. (resource, pairing key, shape, slot, attempt) is its
    identity; the rest may change in place."""

    slot: int = Field(
        ge=0, le=9999, description="Number of the instance among those of its shape. Example: 0."
    )
    role: SlotRole = Field(
        description="What it may do; a pair is a prefill and a decode instance in one container. Example: decode."
    )
    chunk: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Mixed: tokens of a step; left out: whole prompts first. Example: 512."
    )
    tp: int = Field(ge=1, description="Tensor parallelism; of a pair its prefill's. Example: 1.")
    pp: int = Field(ge=1, description="Pipeline parallelism; of a pair both instances'. Example: 1.")
    decode_tp: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Pair: tensor parallelism of its decode. Example: 2."
    )
    node: str = Field(description="The node that its pod is pinned to. Example: gpu-0.")
    pairing_key: str = Field(description="Hash of what must match for its KV to be readable elsewhere.")
    template: str = Field(description="Hash of everything else that its pod is made of.")

    @property
    def gpus(self) -> int:
        return (self.tp + (self.decode_tp or 0)) * self.pp

    @property
    def shape(self) -> str:
        """`tp2pp1`; of a pair prefill's and decode's, `tp2pp1-tp1pp1`."""
        prefill = f"tp{self.tp}pp{self.pp}"
        return f"{prefill}-tp{self.decode_tp}pp{self.pp}" if self.decode_tp else prefill

    @property
    def identity(self) -> Identity:
        """What names the pod, but for the attempt: pairing key, shape, slot number."""
        return (self.pairing_key, self.tp, self.pp, self.decode_tp or 0, self.slot)

    def of_role(self, role: SlotRole, chunk: int | None = None) -> Slot:
        """The same instance in another role."""
        return self.model_copy(update={"role": role, "chunk": chunk})


class ExcludedNode(ApiModel):
    """A node that a pod could not be scheduled to; not used again before `until`."""

    name: str = Field(description="Name of the node. Example: gpu-3.")
    until: str = Field(
        description="RFC 3339 time after which it counts again. Example: 2026-01-01T00:10:00Z."
    )
    reason: str = Field(description="The scheduler's words.")


class Commit(ApiModel):
    """What a `ControllerRevision` holds: the plan, the identity of every instance, and why it was committed. Immutable."""

    plan: Plan = Field(description="The plan, with its revision.")
    instances: tuple[Slot, ...] = Field(description="Every instance with its slot and node.")
    inputs: str = Field(description="Digest of the parts of the spec that the plan depends on.")
    workload_inputs: str = Field(description="Digest of the traffic that the spec told to expect.")
    cause: Literal["Spec", "Drift", "Nodes", "RollBack"] = Field(description="Why this revision was made.")
    reason: str = Field(description="The same in one sentence.")
    excluded_nodes: tuple[ExcludedNode, ...] = Field(default=(), description="Nodes left out for a while.")


def words(roles: tuple[RolePlan, ...], name: RoleName) -> str:
    """`2×tp1 + 1×tp2` for one role; empty when it has none."""
    return " + ".join(r.words() for r in roles if r.role == name)


def kind(roles: tuple[RolePlan, ...], name: RoleName) -> Kind:
    """A role as people call it: mixed instances that all take prompts alike keep their requests, and are colocated."""
    return "colocated" if name == "mixed" and len({r.chunk for r in roles if r.role == name}) == 1 else name


def in_words(roles: tuple[RolePlan, ...]) -> str:
    """All roles, as the rejected are named: `prefill 1×tp2, decode 1×tp1`, `colocated 3×tp1 with chunks of 512`."""
    names = dict.fromkeys(r.role for r in roles)
    return ", ".join(f"{kind(roles, name)} {words(roles, name)}" for name in names)


def digest(value: object) -> str:
    """SHA-256 of canonical JSON: equal inputs give equal digests on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()

"""The spec of a `DisaggServe` resource. `kubectl explain disaggserve.spec --recursive` prints these descriptions: they are the manual.

What a later release will do is a value here already, refused by a rule that says so; nothing is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from disaggserve.api.model import DURATION_PATTERN, ApiModel, Rule, seconds
from disaggserve.api.plan import RolePlan

Duration = Annotated[str, Field(pattern=DURATION_PATTERN, max_length=20)]
ShortText = Annotated[str, Field(max_length=253)]
LongText = Annotated[str, Field(max_length=1024)]
Labels = Annotated[dict[ShortText, ShortText], Field(max_length=64)]
Price = Annotated[float, Field(gt=0, le=1_000_000)]

OWNED_FLAGS = (
    "--model",
    "--weights",
    "--served-name",
    "--served-model-name",
    "--tp",
    "--pp",
    "--tensor-parallel-size",
    "-tp",
    "--pipeline-parallel-size",
    "-pp",
    "--context-length",
    "--max-model-len",
    "--dtype",
    "--pairing-key",
    "--port",
    "--host",
    "--kv-port",
    "--kv-transfer-config",
    "--block-size",
    "--kv-cache-dtype",
    "--shutdown-timeout",
    "--pace",
)


def _attribute(name: str) -> str:
    """`drainTimeout` → `drain_timeout`."""
    return "".join("_" + c.lower() if c.isupper() else c for c in name)


def _positive(name: str) -> Rule:
    attribute = _attribute(name)
    return Rule(
        f"duration(self.{name}) > duration('0s')",
        f"{name} must be longer than 0; write for example 250ms or 10m",
        lambda self: seconds(getattr(self, attribute)) > 0,
        name,
    )


def _one_of(names: tuple[str, ...], message: str) -> Rule:
    attributes = [_attribute(n) for n in names]
    return Rule(
        f"[{', '.join(f'has(self.{n})' for n in names)}].filter(x, x).size() == 1",
        message,
        lambda self: sum(getattr(self, a) is not None for a in attributes) == 1,
    )


def _later(field: str, cel: str, message: str, holds: Callable[[Any], bool]) -> Rule:
    """A value that a later release carries out."""
    return Rule(cel, message, holds, field)


class PvcWeights(ApiModel):
    claim_name: ShortText = Field(
        description="PersistentVolumeClaim in the same namespace. Example: opt-13b."
    )
    path: LongText = Field(
        default="", description="Folder inside the volume; empty is its root. Example: opt-13b."
    )


class HostPathWeights(ApiModel):
    path: LongText = Field(
        pattern=r"^/",
        description="Absolute folder on every node. Needs a namespace that allows hostPath. Example: /mnt/models/opt-13b.",
    )


class HubWeights(ApiModel):
    secret_name: ShortText | None = Field(
        default=None,
        description="Secret with key `token` for gated models; read by the pod, never by the operator. Example: hf-token.",
    )


class Weights(ApiModel):
    """Exactly one of pvc, hostPath, hub."""

    pvc: PvcWeights | None = Field(
        default=None, description="Weights on a PersistentVolumeClaim, mounted read-only."
    )
    host_path: HostPathWeights | None = Field(
        default=None, description="Weights in a folder of every node, mounted read-only."
    )
    hub: HubWeights | None = Field(
        default=None, description="Weights fetched from the model hub by an init container."
    )

    rules = (_one_of(("pvc", "hostPath", "hub"), "name exactly one of pvc, hostPath and hub"),)


class Model(ApiModel):
    id: ShortText = Field(
        min_length=1,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$",
        description="The model's id on the hub. Example: facebook/opt-13b.",
    )
    revision: ShortText = Field(
        default="main",
        min_length=1,
        pattern=r"^[A-Za-z0-9._/-]+$",
        description="Branch, tag or commit of the model. Example: main.",
    )
    served_name: ShortText | None = Field(
        default=None,
        min_length=1,
        description="The name clients send as `model`; the id when left out. Example: chat.",
    )
    weights: Weights | None = Field(default=None, description="Where the weights are; the hub when left out.")
    context_length: Annotated[int, Field(ge=16, le=10_000_000)] | None = Field(
        default=None,
        description="Tokens of prompt and output together; the model's own limit when left out. Example: 2048.",
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto",
        description="Type of weights and activations; auto is what the checkpoint says. float32 comes later and is refused. Example: bfloat16.",
    )
    kv_dtype: Literal["auto", "fp8"] = Field(
        default="auto",
        description="Type of KV; auto is dtype. fp8 comes later and is refused. Example: auto.",
    )
    config: Annotated[str, Field(max_length=16384)] | None = Field(
        default=None,
        description='The model\'s config.json as text, for a model that the catalogue does not know. Example: {"architectures": ["LlamaForCausalLM"], ...}.',
    )

    rules = (
        _later(
            "kvDtype",
            "self.kvDtype != 'fp8'",
            "fp8 KV is not carried out by this release; write auto",
            lambda s: s.kv_dtype != "fp8",
        ),
        _later(
            "dtype",
            "self.dtype != 'float32'",
            "float32 is not planned for by this release; write auto, float16 or bfloat16",
            lambda s: s.dtype != "float32",
        ),
        Rule(
            "!has(self.config) || self.config.trim().startsWith('{')",
            "config must be the text of a config.json: a JSON object",
            lambda s: s.config is None or s.config.strip().startswith("{"),
            "config",
        ),
    )

    @property
    def name(self) -> str:
        """What clients send as `model`."""
        return self.served_name or self.id


class Slo(ApiModel):
    ttft: Duration = Field(
        description="Time to first token that a request must meet, with a unit. Example: 250ms."
    )
    tpot: Duration = Field(
        description="Time per output token after the first that a request must meet, with a unit. Example: 100ms."
    )
    attainment: float = Field(
        default=0.90,
        ge=0.5,
        le=0.999,
        description="Share of requests that must meet both, 0.5 to 0.999. Example: 0.90.",
    )

    rules = (_positive("ttft"), _positive("tpot"))


class Lengths(ApiModel):
    preset: Literal["sharegpt", "humaneval", "longbench", "azure-conv", "azure-code"] = Field(
        description="A joint table of prompt and output lengths. Example: sharegpt (means 759 and 186 tokens)."
    )
    input_scale: float = Field(
        default=1.0,
        ge=0.01,
        le=100,
        description="Multiplies prompt lengths; the context length still bounds them. Example: 0.333.",
    )


class WorkloadSpec(ApiModel):
    """The first guess, until traffic has been seen."""

    rate: float = Field(gt=0, le=100_000, description="Requests per second. Example: 10.")
    lengths: Lengths = Field(description="Prompt and output lengths.")
    min_rate: float | None = Field(
        default=None,
        gt=0,
        le=100_000,
        description="Learned rates below this are raised to it, req/s. Example: 2.",
    )
    max_rate: float | None = Field(
        default=None,
        gt=0,
        le=100_000,
        description="Learned rates above this are cut to it, req/s. Example: 50.",
    )

    rules = (
        Rule(
            "!has(self.minRate) || !has(self.maxRate) || self.minRate <= self.maxRate",
            "minRate must not be above maxRate",
            lambda s: s.min_rate is None or s.max_rate is None or s.min_rate <= s.max_rate,
            "minRate",
        ),
    )


class HardwareSpec(ApiModel):
    min_gpus: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="GPUs kept even when traffic is low; 0 is none (above 0 comes later). Example: 0.",
    )
    max_gpus: int = Field(
        default=32, ge=1, le=4096, description="Most GPUs that a plan may use. Example: 32."
    )
    max_nodes_per_instance: int = Field(
        default=1, ge=1, le=16, description="Nodes one instance may span; above 1 comes later. Example: 1."
    )
    node_selector: Labels = Field(
        default_factory=dict, description="Labels that a node must have to be used. Example: {pool: a100}."
    )
    affinity: Literal["Auto", "High", "Low"] = Field(
        default="Auto",
        description="Fabric between nodes: High (KV crosses nodes by RDMA), Low (it must stay inside a node), Auto reads the nodes' labels. Example: Auto.",
    )

    prices: Annotated[dict[ShortText, Price], Field(max_length=16)] = Field(
        default_factory=dict,
        description="Price of a GPU-hour by product label: Joint then looks for the lowest cost on those products. Example: {NVIDIA-L40S: 0.9}.",
    )

    rules = (
        Rule(
            "self.minGPUs <= self.maxGPUs",
            "minGPUs must not be above maxGPUs",
            lambda s: s.min_gpus <= s.max_gpus,
            "minGPUs",
        ),
        _later(
            "minGPUs",
            "self.minGPUs == 0",
            "a floor of GPUs is not carried out by this release; write 0",
            lambda s: s.min_gpus == 0,
        ),
        _later(
            "maxNodesPerInstance",
            "self.maxNodesPerInstance == 1",
            "instances of more than one node are not carried out by this release; write 1",
            lambda s: s.max_nodes_per_instance == 1,
        ),
    )


class EnvVar(ApiModel):
    name: ShortText = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Name of the variable. Example: HF_HUB_OFFLINE."
    )
    value: LongText = Field(default="", description="Its value, as written. Example: 1.")

    rules = (
        Rule(
            "!(self.name in ['POD_IP', 'POD_NAME', 'POD_NAMESPACE', 'NODE_NAME'])",
            "name is set by the operator; choose another",
            lambda s: s.name not in ("POD_IP", "POD_NAME", "POD_NAMESPACE", "NODE_NAME"),
            "name",
        ),
    )


class Toleration(ApiModel):
    key: ShortText | None = Field(
        default=None, description="Key of the taint; none with Exists tolerates all. Example: nvidia.com/gpu."
    )
    operator: Literal["Exists", "Equal"] = Field(
        default="Equal", description="Exists or Equal. Example: Exists."
    )
    value: ShortText | None = Field(
        default=None, description="Value of the taint, with Equal. Example: present."
    )
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect; none is all. Example: NoSchedule."
    )

    rules = (
        Rule(
            "self.operator != 'Exists' || !has(self.value)",
            "value must be left out with operator Exists",
            lambda s: s.operator != "Exists" or s.value is None,
            "value",
        ),
        Rule(
            "self.operator != 'Equal' || has(self.key)",
            "key must be given with operator Equal",
            lambda s: s.operator != "Equal" or s.key is not None,
            "key",
        ),
    )


QUANTITY_PATTERN = r"^[0-9]{1,15}(\.[0-9]{1,3})?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
Quantity = Annotated[str, Field(pattern=QUANTITY_PATTERN, max_length=24)]


class Resources(ApiModel):
    cpu: Quantity | None = Field(default=None, description="CPU requested by a pod; left out: 1. Example: 4.")
    memory: Quantity | None = Field(
        default=None,
        description="Memory requested by a pod, also its limit; left out: 4Gi for a worker, 256Mi for a router, no limit. Example: 32Gi.",
    )
    ephemeral_storage: Quantity | None = Field(
        default=None, description="Ephemeral storage requested by a pod. Example: 10Gi."
    )
    rdma: Annotated[dict[ShortText, int], Field(max_length=4)] = Field(
        default_factory=dict,
        description="RDMA devices by resource name; IPC_LOCK is added when any is asked for. Example: {rdma/hca_shared_devices_a: 1}.",
    )


class PodSpec(ApiModel):
    """What a platform team may set on the pods; the operator owns the rest."""

    tolerations: tuple[Toleration, ...] = Field(
        default=(),
        max_length=16,
        description="Taints that the pods tolerate, beside nvidia.com/gpu. Example: [{key: team, operator: Exists}].",
    )
    resources: Resources = Field(
        default_factory=Resources,
        description="CPU, memory, storage and RDMA of one pod, whatever its shape; GPUs are the operator's. A pair of prefill and "
        "decode (planner.algorithm LowAffinity; Joint may choose it) is one pod, whose two engines share this.",
    )
    env: tuple[EnvVar, ...] = Field(
        default=(),
        max_length=32,
        description='Environment variables. Example: [{name: HF_HUB_OFFLINE, value: "1"}].',
    )
    annotations: Labels = Field(
        default_factory=dict, description="Annotations of the pods. Example: {team: search}."
    )
    image_pull_secrets: tuple[ShortText, ...] = Field(
        default=(), max_length=8, description="Names of pull secrets. Example: [registry]."
    )
    service_account_name: ShortText | None = Field(
        default=None,
        description="Service account of the pods; the operator makes one for the router. Example: serving.",
    )
    runtime_class_name: ShortText | None = Field(default=None, description="Runtime class. Example: nvidia.")
    scheduler_name: ShortText | None = Field(
        default=None, description="Scheduler; the cluster's default when left out. Example: volcano."
    )


def _flag(argument: str) -> str:
    return argument.split("=", 1)[0]


_OWNED_CEL = "[" + ", ".join(f"'{f}'" for f in OWNED_FLAGS) + "]"


class EngineSpec(ApiModel):
    type: Literal["torch", "vllm", "sglang"] = Field(
        description="The engine: torch is built in; vllm runs its own image; sglang is refused for now. No default. Example: torch."
    )
    image: LongText | None = Field(
        default=None,
        min_length=1,
        description="Image of the workers; when left out, the release's own for torch and the one it was tested with for vllm. Example: example.com/disaggserve-worker:0.1.0.",
    )
    args: tuple[LongText, ...] = Field(
        default=(),
        max_length=32,
        description='More arguments of the engine. Flags that the operator sets are refused by name. Example: [--kv-blocks, "4096"].',
    )
    pod: PodSpec = Field(default_factory=PodSpec, description="Parts of the worker pods.")

    rules = (
        _later(
            "type",
            "self.type != 'sglang'",
            "sglang is planned for but not started until it has been tested against a real one; write torch or vllm",
            lambda s: s.type != "sglang",
        ),
        Rule(
            f"!self.args.exists(a, a.split('=', 2)[0] in {_OWNED_CEL})",
            "args must not set a flag that the operator owns ("
            + ", ".join(OWNED_FLAGS)
            + "); use the spec's fields",
            lambda s: not any(_flag(a) in OWNED_FLAGS for a in s.args),
            "args",
        ),
    )


class PlannerSpec(ApiModel):
    algorithm: Literal["Joint", "DistServe", "HighAffinity", "LowAffinity"] = Field(
        default="Joint",
        description="Which search: Joint looks at shapes and numbers of both roles together; DistServe lets the fabric choose between the paper's Algorithm 1 (HighAffinity) and 2 (LowAffinity). Example: Joint.",
    )


class ReplanSpec(ApiModel):
    mode: Literal["Auto", "Approve", "Advise", "Off"] = Field(
        default="Auto",
        description="Auto carries out a better plan; Advise only writes it to status.proposal; Off looks at no traffic; Approve comes later and is refused. Example: Auto.",
    )
    interval: Duration = Field(default="30s", description="How often traffic is looked at. Example: 30s.")
    window: Duration = Field(default="10m", description="How much traffic one look covers. Example: 10m.")
    breaches: int = Field(
        default=3, ge=1, le=20, description="Windows in a row that must miss the promise. Example: 3."
    )
    min_dwell: Duration = Field(default="10m", description="Shortest time between two plans. Example: 10m.")
    horizon: Duration = Field(
        default="6h",
        description="Time over which a smaller plan must save more GPU time than the switch costs. Example: 6h.",
    )
    max_per_hour: int = Field(
        default=2, ge=1, le=60, description="Most new plans in an hour that traffic may cause. Example: 2."
    )
    headroom: float = Field(
        default=1.2, ge=1, le=10, description="Multiplies learned rates before planning. Example: 1.2."
    )

    rules = (
        _later(
            "mode",
            "self.mode != 'Approve'",
            "Approve is not carried out by this release; write Auto, Advise or Off",
            lambda s: s.mode != "Approve",
        ),
        _positive("interval"),
        _positive("window"),
        _positive("horizon"),
    )


class RolloutSpec(ApiModel):
    max_surge_gpus: int = Field(
        default=8,
        ge=0,
        le=4096,
        description="GPUs that a change of plan may hold beyond the larger of both plans. Example: 8.",
    )
    when_no_spare_gpus: Literal["Hold", "Degrade"] = Field(
        default="Hold",
        description="Hold keeps the old plan and says how many GPUs are missing; Degrade comes later and is refused. Example: Hold.",
    )
    drain_timeout: Duration = Field(
        default="10m", description="Longest wait for the requests of an instance that goes. Example: 10m."
    )
    schedule_timeout: Duration = Field(
        default="2m", description="Longest wait of a pod for its node. Example: 2m."
    )
    ready_timeout: Duration = Field(
        default="15m", description="Longest wait of a pod for its weights. Example: 15m."
    )

    rules = (
        _later(
            "whenNoSpareGPUs",
            "self.whenNoSpareGPUs == 'Hold'",
            "Degrade is not carried out by this release; write Hold",
            lambda s: s.when_no_spare_gpus == "Hold",
        ),
        _positive("drainTimeout"),
        _positive("scheduleTimeout"),
        _positive("readyTimeout"),
    )


class RouterSpec(ApiModel):
    replicas: int = Field(
        default=1,
        ge=1,
        le=16,
        description="Routers side by side: requests outlive the end of all but their own. Example: 3.",
    )
    image: LongText | None = Field(
        default=None,
        min_length=1,
        description="Image of the router; the release's own when left out. Example: example.com/disaggserve-router:0.1.0.",
    )
    pod: PodSpec = Field(default_factory=PodSpec, description="Parts of the router pods.")


class PinnedPlan(ApiModel):
    """A plan by hand: copy `status.plan.roles` here and change it."""

    roles: tuple[RolePlan, ...] = Field(
        min_length=1,
        max_length=16,
        description="The shape of status.plan.roles; nodes may be left out. Example: [{role: prefill, tp: 2, pp: 1, count: 1}, {role: decode, tp: 1, pp: 1, count: 2}].",
    )

    rules = (
        Rule(
            "self.roles.all(r, r.role == 'mixed') || (self.roles.all(r, r.role != 'mixed') && "
            "['prefill', 'decode'].all(n, self.roles.exists(r, r.role == n)))",
            "roles must name at least one prefill and one decode instance, or mixed ones and no others",
            lambda s: {r.role for r in s.roles} in ({"mixed"}, {"prefill", "decode"}),
            "roles",
        ),
    )


class Spec(ApiModel):
    model: Model = Field(description="Which model.")
    slo: Slo = Field(description="Which latency promise.")
    workload: WorkloadSpec = Field(description="Which traffic is expected.")
    hardware: HardwareSpec = Field(default_factory=HardwareSpec, description="Which GPUs may be used.")
    engine: EngineSpec = Field(description="What serves.")
    planner: PlannerSpec = Field(default_factory=PlannerSpec, description="How the plan is found.")
    replan: ReplanSpec = Field(default_factory=ReplanSpec, description="When the plan is changed.")
    rollout: RolloutSpec = Field(default_factory=RolloutSpec, description="How a plan is changed.")
    router: RouterSpec = Field(default_factory=RouterSpec, description="The router in front.")
    paused: bool = Field(default=False, description="true: nothing is written but status. Example: false.")
    plan: PinnedPlan | None = Field(
        default=None, description="A plan by hand: carried out as given, still simulated."
    )

    def json_value(self) -> dict[str, JsonValue]:
        """The spec as the API server stores it, defaults filled in."""
        value: dict[str, JsonValue] = self.model_dump(mode="json", exclude_none=True)
        return value

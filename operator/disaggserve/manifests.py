"""Every Kubernetes object that a plan becomes, as plain JSON values; equal inputs give equal bytes.

One instance, or one low-affinity pair, is one pod, pinned to its node and created once (pod specs are immutable). The router is a
Deployment behind a Service; it and the rest are applied server-side with one field manager.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from disaggserve import engines, wire
from disaggserve.api import manifest as api
from disaggserve.api.model import seconds
from disaggserve.api.plan import Slot
from disaggserve.api.spec import PodSpec, Spec
from disaggserve.hardware import GPU_RESOURCE
from disaggserve.plan import WORKER_CPU, WORKER_MEMORY, tolerations

LABEL = "disaggserve.dev/"
RESOURCE, ROLE, KEY, DRAIN = LABEL + "resource", LABEL + "role", LABEL + "pairing-key", LABEL + "drain"
# On each pod, and no flag of the router's: while a resource changes its engine, pods of both stand side by side.
ENGINE = LABEL + "engine"
SHAPE, SLOT, ATTEMPT, REVISION, TEMPLATE = (
    LABEL + n for n in ("shape", "slot", "attempt", "revision", "template")
)
CHUNK = LABEL + "chunk"  # of a mixed instance, where it cuts prompts
DRAIN_SINCE = LABEL + "drain-since"
TRANSPORT = LABEL + "kv-transport"  # annotation of a pair: how its KV goes, by its own word

HTTP_PORT, KV_PORT = 8000, 5600
# In a pair HTTP_PORT is the supervisor's, which answers for both; the router finds the two by the names of their ports.
PREFILL_PORT, DECODE_PORT = 8001, 8002
ROUTER_CLUSTER_ROLE = "disaggserve-router"
WEIGHTS_PATH = "/models/weights"
_USER = 2000  # the uid of upstream engine images; ours use the same


@dataclass(frozen=True)
class Owner:
    """The resource that everything belongs to."""

    name: str
    namespace: str
    uid: str

    def reference(self) -> Mapping[str, Any]:
        return {
            "apiVersion": api.API_VERSION,
            "kind": api.KIND,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": False,
        }


@dataclass(frozen=True)
class Images:
    """The release's own images, used where the spec names none."""

    worker: str
    router: str


def pod_name(resource: str, slot: Slot, attempt: int) -> str:
    """The identity (resource, pairing key, shape, slot, attempt) as a name."""
    return f"{resource}-{slot.pairing_key[:6]}-{slot.shape}-{slot.slot}-{attempt}"


def _labels(resource: str, component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "disaggserve",
        "app.kubernetes.io/managed-by": "disaggserve",
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/instance": resource,
        RESOURCE: resource,
    }


def _metadata(owner: Owner, name: str, component: str) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": owner.namespace,
        "labels": _labels(owner.name, component),
        "ownerReferences": [owner.reference()],
    }


def _field(path: str) -> dict[str, Any]:
    return {"fieldRef": {"fieldPath": path}}


def _env(
    pod: PodSpec, engine: Mapping[str, str] | None = None, labels: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    downward = {
        "POD_IP": "status.podIP",
        "POD_NAME": "metadata.name",
        "POD_NAMESPACE": "metadata.namespace",
        "NODE_NAME": "spec.nodeName",
        **{name: f"metadata.labels['{label}']" for name, label in (labels or {}).items()},
    }
    own: list[dict[str, Any]] = [{"name": n, "valueFrom": _field(path)} for n, path in downward.items()]
    own += [{"name": name, "value": value} for name, value in (engine or {}).items()]
    return own + [{"name": e.name, "value": e.value} for e in pod.env]


def _resources(pod: PodSpec, gpus: Mapping[str, int], default_memory: str) -> dict[str, Any]:
    requests = {"cpu": pod.resources.cpu or WORKER_CPU, "memory": pod.resources.memory or default_memory}
    limits: dict[str, Any] = {}
    if pod.resources.memory:
        limits["memory"] = pod.resources.memory
    if pod.resources.ephemeral_storage:
        requests["ephemeral-storage"] = pod.resources.ephemeral_storage
    devices = {name: str(n) for name, n in {**gpus, **pod.resources.rdma}.items()}
    return {"requests": requests | devices, "limits": limits | devices}


def _security(pod: PodSpec) -> dict[str, Any]:
    """The container half of Pod Security `restricted`; RDMA needs to lock memory, and only then is it asked for."""
    capabilities: dict[str, Any] = {"drop": ["ALL"]}
    if pod.resources.rdma:
        capabilities["add"] = ["IPC_LOCK"]
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": capabilities}


def _pod_security() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "fsGroup": _USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _probe(path: str, period_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": HTTP_PORT, "scheme": "HTTP"},
        "periodSeconds": period_s,
        "failureThreshold": failures,
        "timeoutSeconds": 2,
        "successThreshold": 1,
    }


_ROUTER_MEMORY = "256Mi"


def _optional(pod: PodSpec) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if pod.image_pull_secrets:
        out["imagePullSecrets"] = [{"name": n} for n in pod.image_pull_secrets]
    if pod.runtime_class_name:
        out["runtimeClassName"] = pod.runtime_class_name
    if pod.scheduler_name:
        out["schedulerName"] = pod.scheduler_name
    return out


def _weights(spec: Spec, image: str) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The volume, its mount and the init containers that fill it."""
    weights = spec.model.weights
    mount: dict[str, Any] = {"name": "weights", "mountPath": WEIGHTS_PATH, "readOnly": True}
    if weights and weights.pvc:
        claim = {"claimName": weights.pvc.claim_name, "readOnly": True}
        if weights.pvc.path:
            mount["subPath"] = weights.pvc.path
        return {"name": "weights", "persistentVolumeClaim": claim}, mount, []
    if weights and weights.host_path:
        return (
            {"name": "weights", "hostPath": {"path": weights.host_path.path, "type": "Directory"}},
            mount,
            [],
        )
    env = [{"name": "HF_HOME", "value": "/tmp/hub"}]
    if weights and weights.hub and weights.hub.secret_name:
        secret = {"secretKeyRef": {"name": weights.hub.secret_name, "key": "token"}}
        env.append({"name": "HF_TOKEN", "valueFrom": secret})  # type: ignore[dict-item]
    fetch = {
        "name": "fetch-weights",
        "image": image,
        "command": [
            "disaggworker",
            "fetch",
            "--model",
            spec.model.id,
            "--revision",
            spec.model.revision,
            "--to",
            WEIGHTS_PATH,
        ],
        "env": env,
        "securityContext": _security(PodSpec()),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "weights", "mountPath": WEIGHTS_PATH},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    return {"name": "weights", "emptyDir": {}}, mount, [fetch]


@dataclass(frozen=True)
class _Served:
    """What the engines' containers differ in."""

    command: tuple[str, ...]
    ready: str  # path that answers 200 only when requests can be served
    image: str = ""  # where the spec names none; empty: the release's own
    env: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)  # by the name of the variable that gives each
    drain: tuple[str, ...] = ()  # before SIGTERM; ends when nothing is in flight
    unready_after: int = 2  # looks, 2 s apart
    ports: Mapping[str, int] = field(default_factory=lambda: {"http": HTTP_PORT, "kv": KV_PORT})


def _torch(spec: Spec, slot: Slot, context_length: int) -> _Served:
    if slot.role == "pair":
        return _torch_pair(spec, slot, context_length)
    command = ["disaggworker", slot.role, *_torch_flags(spec, slot, context_length), "--tp", str(slot.tp)]
    command += ["--port", str(HTTP_PORT), "--kv-port", str(KV_PORT)]
    if slot.chunk is not None:
        command += ["--chunk", str(slot.chunk)]
    # The command says what the pod was made for; a container that starts again is what the pod has become.
    labels = {"WORKER_ROLE": ROLE, "WORKER_CHUNK": CHUNK}
    return _Served((*command, *spec.engine.args), "/ready", labels=labels)


def _torch_pair(spec: Spec, slot: Slot, context_length: int) -> _Served:
    """Both instances of a low-affinity pair under their supervisor: ready, drained and gone together."""
    assert slot.decode_tp is not None
    flags, gpus = _torch_flags(spec, slot, context_length), [str(n) for n in range(slot.gpus)]
    of_prefill = slot.tp * slot.pp  # GPUs, and as many KV ports: one per rank
    ports = {"http": HTTP_PORT, "prefill": PREFILL_PORT, "prefill-kv": KV_PORT}
    ports |= {"decode": DECODE_PORT, "decode-kv": KV_PORT + of_prefill}
    command = ["disaggworker", "pair", "--ready-port", str(HTTP_PORT)]
    command += ["--prefill-gpus", ",".join(gpus[:of_prefill]), "--decode-gpus", ",".join(gpus[of_prefill:])]
    for role, tp in (("prefill", slot.tp), ("decode", slot.decode_tp)):
        command += [role, *flags, "--tp", str(tp), "--port", str(ports[role])]
        command += ["--kv-port", str(ports[f"{role}-kv"]), *spec.engine.args]
    return _Served(tuple(command), "/ready", ports=ports)


def _torch_flags(spec: Spec, slot: Slot, context_length: int) -> list[str]:
    """What both of a pair have alike, too."""
    flags = ["--model", spec.model.id, "--weights", WEIGHTS_PATH, "--served-name", spec.model.name]
    flags += ["--pp", str(slot.pp), "--context-length", str(context_length), "--dtype", spec.model.dtype]
    return [*flags, "--pairing-key", slot.pairing_key]


# vLLM goes on answering /health with 200 while it drains, and answers new requests with 500: so it is emptied before it is
# told to end. Routers send nothing more from when they see the pod terminate; then its own counters must say twice in a
# row that nothing runs, waits, or holds KV for a decode that has not fetched it. A server that does not answer is gone.
_VLLM_DRAIN = """
import os, re, time, urllib.request
host, empty = os.environ["POD_IP"], 0
url = f"http://[{host}]:PORT/metrics" if ":" in host else f"http://{host}:PORT/metrics"
time.sleep(2)
while empty < 2:
    try:
        text = urllib.request.urlopen(url, timeout=5).read().decode()
    except OSError:
        break
    used = re.findall(r"^vllm:(?:num_requests_running|num_requests_waiting|kv_cache_usage_perc)\\{.*\\} (\\S+)$", text, re.M)
    empty = empty + 1 if used and not any(map(float, used)) else 0
    time.sleep(0.5)
"""


def _vllm(spec: Spec, slot: Slot, context_length: int) -> _Served:
    """`vllm serve`, alike for both roles: NixlConnector does not look at the role, so which of the two an instance plays is
    the router's decision. KV pairs only where `--model` is the same string on both sides: it is the mount's path."""
    engine = engines.VLLM
    transfer = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        # A pull that fails ends its request, and the router begins it anew: the other way (recompute) would make a decode
        # instance compute prompts behind the plan's back.
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"kv_lease_duration": wire.VLLM_LEASE_S},
    }
    command = ["vllm", "serve", WEIGHTS_PATH, "--served-model-name", spec.model.name]
    command += ["--tensor-parallel-size", str(slot.tp), "--pipeline-parallel-size", str(slot.pp)]
    command += ["--max-model-len", str(context_length), "--dtype", spec.model.dtype]
    command += ["--kv-cache-dtype", spec.model.kv_dtype, "--block-size", str(engine.block_tokens)]
    command += ["--host", "$(POD_IP)", "--port", str(HTTP_PORT)]
    command += ["--kv-transfer-config", json.dumps(transfer, sort_keys=True)]
    if slot.chunk is not None:
        command += ["--max-num-batched-tokens", str(slot.chunk)]
    # The default, 0, would cut off what is in flight at SIGTERM.
    command += ["--shutdown-timeout", str(int(seconds(spec.rollout.drain_timeout)))]
    # When its first token came, which an answer in one piece hides and the router must know; what of the prompt was cached.
    command += ["--enable-per-request-metrics", "--enable-prompt-tokens-details"]
    env = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "$(POD_IP)",  # what prefill tells decode to call; the default is localhost
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(KV_PORT),
        "HOME": "/tmp",  # the only place to write: caches of compiled kernels go there
        "HF_HUB_OFFLINE": "1",  # the weights are mounted
        "VLLM_NO_USAGE_STATS": "1",
    }
    drain = ("python3", "-c", _VLLM_DRAIN.strip().replace("PORT", str(HTTP_PORT)))
    return _Served((*command, *spec.engine.args), "/health", engine.image, env, drain=drain)


def worker_pod(
    owner: Owner, spec: Spec, slot: Slot, attempt: int, revision: int, context_length: int, images: Images
) -> dict[str, Any]:
    """The pod of one instance or pair. Created, never applied: 409 means that it is there already."""
    pod = spec.engine.pod
    served = (_vllm if spec.engine.type == "vllm" else _torch)(spec, slot, context_length)
    # Weights are fetched by our own worker: no other engine's image need know how.
    volume, mount, init = _weights(
        spec, images.worker if served.image else spec.engine.image or images.worker
    )
    metadata = _metadata(owner, pod_name(owner.name, slot, attempt), "worker")
    metadata["labels"] |= {
        ROLE: slot.role,
        ENGINE: spec.engine.type,
        KEY: slot.pairing_key,
        SHAPE: slot.shape,
        SLOT: str(slot.slot),
        ATTEMPT: str(attempt),
        TEMPLATE: slot.template,
        REVISION: str(revision),
    }
    if slot.chunk is not None:
        metadata["labels"][CHUNK] = str(slot.chunk)
    metadata["annotations"] = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(HTTP_PORT),
        **pod.annotations,
    }
    startup_period_s = 2
    container = {
        "name": "worker",
        "image": spec.engine.image or served.image or images.worker,
        "command": list(served.command),
        "env": _env(pod, served.env, served.labels),
        "ports": [{"name": name, "containerPort": port} for name, port in served.ports.items()],
        "resources": _resources(pod, {GPU_RESOURCE: slot.gpus}, WORKER_MEMORY),
        "securityContext": _security(pod),
        "startupProbe": _probe(
            served.ready,
            startup_period_s,
            max(1, int(seconds(spec.rollout.ready_timeout) // startup_period_s)),
        ),
        "readinessProbe": _probe(served.ready, 2, served.unready_after),
        "livenessProbe": _probe("/health", 10, 6),
        "terminationMessagePolicy": "FallbackToLogsOnError",  # why it ended, in its own last words, for the condition
        "volumeMounts": [
            mount,
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if served.drain:
        container["lifecycle"] = {"preStop": {"exec": {"command": list(served.drain)}}}
    affinity = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [slot.node]}]}
    body: dict[str, Any] = {
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": int(seconds(spec.rollout.drain_timeout)),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _pod_security(),
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [affinity]}
            }
        },
        "tolerations": tolerations(pod),
        "containers": [container],
        "volumes": [
            volume,
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
        **_optional(pod),
    }
    if init:
        body["initContainers"] = init
    if pod.service_account_name:
        body["serviceAccountName"] = pod.service_account_name
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": body}


def _router_deployment(owner: Owner, spec: Spec, context_length: int, images: Images) -> dict[str, Any]:
    pod = spec.router.pod
    name = f"{owner.name}-router"
    labels = _labels(owner.name, "router") | {ROLE: "router"}
    command = ["disaggworker", "router", "--namespace", owner.namespace, "--resource", owner.name]
    command += ["--model-name", spec.model.name, "--context-length", str(context_length)]
    command += [
        "--ttft",
        f"{seconds(spec.slo.ttft):g}",
        "--tpot",
        f"{seconds(spec.slo.tpot):g}",
        "--port",
        str(HTTP_PORT),
    ]
    container = {
        "name": "router",
        "image": spec.router.image or images.router,
        "command": command,
        "env": _env(pod),
        "ports": [{"name": "http", "containerPort": HTTP_PORT, "protocol": "TCP"}],
        "resources": _resources(pod, {}, _ROUTER_MEMORY),
        "securityContext": _security(pod),
        "readinessProbe": _probe("/ready", 2, 2),
        "livenessProbe": _probe("/health", 10, 6),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    template = {
        "metadata": {
            "labels": labels,
            "annotations": {
                "prometheus.io/scrape": "true",
                "prometheus.io/port": str(HTTP_PORT),
                **pod.annotations,
            },
        },
        "spec": {
            "serviceAccountName": pod.service_account_name or name,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": int(seconds(spec.rollout.drain_timeout)),
            "securityContext": _pod_security(),
            "tolerations": [t.model_dump(mode="json", exclude_none=True) for t in pod.tolerations],
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
            **_optional(pod),
        },
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(owner, name, "router"),
        "spec": {
            "replicas": spec.router.replicas,
            "selector": {"matchLabels": {RESOURCE: owner.name, ROLE: "router"}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": template,
        },
    }


def around(owner: Owner, spec: Spec, context_length: int, images: Images) -> Sequence[dict[str, Any]]:
    """Everything but the instances, in the order in which it is applied."""
    name = f"{owner.name}-router"
    metadata = _metadata(owner, name, "router")
    rbac = "rbac.authorization.k8s.io"
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata,
        "automountServiceAccountToken": True,
    }
    binding = {
        "apiVersion": f"{rbac}/v1",
        "kind": "RoleBinding",
        "metadata": metadata,
        "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": ROUTER_CLUSTER_ROLE},
        "subjects": [
            {
                "kind": "ServiceAccount",
                "name": spec.router.pod.service_account_name or name,
                "namespace": owner.namespace,
            }
        ],
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(owner, owner.name, "router"),
        "spec": {
            "selector": {RESOURCE: owner.name, ROLE: "router"},
            "ports": [{"name": "http", "port": HTTP_PORT, "protocol": "TCP", "targetPort": HTTP_PORT}],
        },
    }
    router = _router_deployment(owner, spec, context_length, images)
    return [account, binding, service, _network_policy(owner), router]


def _network_policy(owner: Owner) -> dict[str, Any]:
    """KV may be read by whoever reaches the KV port, or the one that was free for streams, so only pods of the same resource do.

    HTTP stays open, for probes and for Prometheus wherever it runs.
    """
    workers = {RESOURCE: owner.name, "app.kubernetes.io/component": "worker"}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(owner, f"{owner.name}-workers", "worker"),
        "spec": {
            "podSelector": {"matchLabels": workers},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": {RESOURCE: owner.name}}}]},
                {"ports": [{"port": HTTP_PORT, "protocol": "TCP"}]},
            ],
        },
    }


def disruption_budget(owner: Owner, pods: int) -> dict[str, Any]:
    """Evictions of instances are refused (an integer: nothing else works over bare pods) and turned into a move."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(owner, f"{owner.name}-workers", "worker"),
        "spec": {
            "minAvailable": pods,
            "selector": {"matchLabels": {RESOURCE: owner.name, "app.kubernetes.io/component": "worker"}},
        },
    }


def url(owner: Owner) -> str:
    return f"http://{owner.name}.{owner.namespace}.svc:{HTTP_PORT}/v1"


PLAN_SELECTOR = "app.kubernetes.io/managed-by=disaggserve"


def plan_labels(owner: Owner) -> dict[str, str]:
    return _labels(owner.name, "plan")

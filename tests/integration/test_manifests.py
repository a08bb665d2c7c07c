"""What a plan becomes, against a real API server with Pod Security `restricted` enforced: accepted, pinned, and equal bytes."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from disaggserve import manifests, plan
from disaggserve.api import manifest
from disaggserve.api.plan import Slot
from disaggserve.api.spec import Spec
from disaggserve.cluster import observe
from disaggserve.manifests import Images, Owner
from disaggworker.worker import pair
from e2e.controlplane import ControlPlane, ensure
from tests.contract.broken import GOOD

OWNER = Owner("chat", "tight", "00000000-0000-0000-0000-000000000001")
IMAGES = Images(worker="disaggserve-worker:0", router="disaggserve-router:0")


def spec(**more: Any) -> Spec:
    return manifest.parse_spec({**GOOD["spec"], **more})


def slot(of: Spec, **more: Any) -> Slot:
    value = {"slot": 0, "role": "prefill", "tp": 2, "pp": 1, "node": "gpu-0"}
    value |= {"pairing_key": plan.pairing_key(of), "template": plan.template(of)} | more
    return Slot.model_validate(value)


RICH = spec(
    model={
        "id": "facebook/opt-13b",
        "weights": {"pvc": {"claimName": "w", "path": "opt"}},
        "servedName": "chat",
    },
    engine={
        "type": "torch",
        "args": ["--max-batch", "64"],
        "pod": {
            "tolerations": [{"key": "team", "operator": "Exists"}],
            "resources": {"cpu": "4", "memory": "32Gi", "ephemeralStorage": "1Gi"},
            "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
            "annotations": {"team": "search"},
            "imagePullSecrets": ["registry"],
            "schedulerName": "default-scheduler",
        },
    },
)

VLLM = spec(
    model={"id": "facebook/opt-13b", "weights": {"hub": {}}, "servedName": "chat"},
    engine={
        "type": "vllm",
        "args": ["--max-num-seqs", "64"],
        "pod": {"resources": {"rdma": {"rdma/hca": 1}}},
    },
    rollout={"drainTimeout": "5m"},
)
PAIR = {"role": "pair", "tp": 2, "decode_tp": 1}
VLLM_AS_RESTRICTED = spec(engine={"type": "vllm"})  # without RDMA, which needs IPC_LOCK


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("manifests"), ensure()) as plane:
        plane.kubectl("create", "namespace", "tight")
        plane.kubectl("label", "namespace", "tight", "pod-security.kubernetes.io/enforce=restricted")
        yield plane


@pytest.mark.parametrize(
    ("of", "more"),
    [(spec(), {}), (RICH, {}), (VLLM_AS_RESTRICTED, {}), (RICH, PAIR)],
    ids=["plain", "rich", "vllm", "pair"],
)
def test_everything_is_accepted_under_restricted(cluster: ControlPlane, of: Spec, more: Any) -> None:
    pod = manifests.worker_pod(OWNER, of, slot(of, **more), 0, 1, 2048, IMAGES)
    objects = [pod, manifests.disruption_budget(OWNER, 3), *manifests.around(OWNER, of, 2048, IMAGES)]
    for body in objects:
        said = cluster.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", input=json.dumps(body))
        assert json.loads(said)["metadata"]["ownerReferences"][0]["uid"] == OWNER.uid
    deployment = next(o for o in objects if o["kind"] == "Deployment")
    template = deployment["spec"]["template"]
    router = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "r", "namespace": "tight", "labels": template["metadata"]["labels"]},
    }
    router["spec"] = {k: v for k, v in template["spec"].items() if k != "serviceAccountName"}
    cluster.kubectl("create", "--dry-run=server", "-f", "-", input=json.dumps(router))


def test_the_pod_is_pinned_and_asks_for_its_shape() -> None:
    of = spec()
    pod = manifests.worker_pod(OWNER, of, slot(of, tp=2, pp=2), 3, 7, 2048, IMAGES)
    assert pod["metadata"]["name"] == f"chat-{plan.pairing_key(of)[:6]}-tp2pp2-0-3"
    assert pod["metadata"]["labels"]["disaggserve.dev/revision"] == "7"
    container = pod["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    assert container["command"][:2] == ["disaggworker", "prefill"]
    assert "nodeName" not in pod["spec"]
    assert "gpu-0" in json.dumps(pod["spec"]["affinity"])
    assert pod["spec"]["automountServiceAccountToken"] is False


def test_a_pair_is_one_container_with_both_instances() -> None:
    of = spec(engine={"type": "torch", "args": ["--max-batch", "64"]})
    made = slot(of, **PAIR, pp=2)
    pod = manifests.worker_pod(OWNER, of, made, 0, 7, 2048, IMAGES)
    key = plan.pairing_key(of)
    assert pod["metadata"]["name"] == f"chat-{key[:6]}-tp2pp2-tp1pp2-0-0"
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "6"}
    model = ["--model", "facebook/opt-13b", "--weights", "/models/weights", "--served-name", of.model.name]
    model += ["--pp", "2", "--context-length", "2048", "--dtype", "auto", "--pairing-key", key]
    assert container["command"] == [
        *(
            "disaggworker",
            "pair",
            "--ready-port",
            "8000",
            "--prefill-gpus",
            "0,1,2,3",
            "--decode-gpus",
            "4,5",
        ),
        *("prefill", *model, "--tp", "2", "--port", "8001", "--kv-port", "5600", "--max-batch", "64"),
        *("decode", *model, "--tp", "1", "--port", "8002", "--kv-port", "5604", "--max-batch", "64"),
    ]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert ports == {"http": 8000, "prefill": 8001, "prefill-kv": 5600, "decode": 8002, "decode-kv": 5604}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == 8000
    # What supervises takes the command, and what the operator reads back is the slot.
    read = pair.read(container["command"][2:], {"POD_IP": "10.0.0.1"})
    assert (read.ready_port, read.prefill.gpus, read.decode.gpus) == (8000, "0,1,2,3", "4,5")
    assert not read.prefill.ports() & read.decode.ports()
    pod["metadata"] |= {"uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
    found = observe.instance(pod, {"gpu-0"}, set(), 0.0)
    assert (found.slot, found.role_change) == (made, None)


def test_resources_are_those_of_one_pod_whatever_its_shape() -> None:
    def asked(**more: Any) -> Any:
        pod = manifests.worker_pod(OWNER, RICH, slot(RICH, **more), 0, 1, 2048, IMAGES)
        return pod["spec"]["containers"][0]["resources"]

    limits = {"memory": "32Gi", "nvidia.com/gpu": "3"}
    assert asked(**PAIR) == {
        "requests": {"cpu": "4", "ephemeral-storage": "1Gi", **limits},
        "limits": limits,
    }
    assert asked(tp=3) == asked(**PAIR)


def test_ipc_lock_only_with_rdma() -> None:
    def capabilities(of: Spec) -> Any:
        pod = manifests.worker_pod(OWNER, of, slot(of), 0, 1, 2048, IMAGES)
        return pod["spec"]["containers"][0]["securityContext"]["capabilities"]

    assert capabilities(spec()) == {"drop": ["ALL"]}
    rdma = spec(engine={"type": "torch", "pod": {"resources": {"rdma": {"rdma/hca": 1}}}})
    assert capabilities(rdma) == {"drop": ["ALL"], "add": ["IPC_LOCK"]}


def test_equal_inputs_give_equal_bytes() -> None:
    def text() -> str:
        of = spec()
        return json.dumps(
            [
                manifests.worker_pod(OWNER, of, slot(of), 0, 1, 2048, IMAGES),
                *manifests.around(OWNER, of, 2048, IMAGES),
            ]
        )

    assert text() == text()


def test_identity_follows_what_it_hashes() -> None:
    base = spec()
    other_image = spec(engine={"type": "torch", "image": "x/disaggserve-worker:1"})
    other_args = spec(engine={"type": "torch", "args": ["--max-batch=8"]})
    other_slo = spec(slo={"ttft": "1s", "tpot": "100ms"})
    assert plan.pairing_key(base) != plan.pairing_key(other_image)
    assert (plan.pairing_key(base), plan.template(base)) == (
        plan.pairing_key(other_slo),
        plan.template(other_slo),
    )
    assert plan.pairing_key(base) == plan.pairing_key(other_args)
    assert plan.template(base) != plan.template(other_args)


def test_a_vllm_pod_is_the_same_server_whatever_its_role() -> None:
    """Exact, because every flag is there for a reason that was measured (REFERENCE § 7)."""
    prefill, decode = (
        manifests.worker_pod(OWNER, VLLM, slot(VLLM, role=role), 0, 1, 2048, IMAGES)
        for role in ("prefill", "decode")
    )
    assert prefill["spec"] == decode["spec"]
    assert {p["metadata"]["labels"][manifests.ENGINE] for p in (prefill, decode)} == {"vllm"}
    [container], [fetch] = prefill["spec"]["containers"], prefill["spec"]["initContainers"]
    assert (container["image"], fetch["image"]) == ("vllm/vllm-openai:v0.32.0", IMAGES.worker)
    command = container["command"]
    transfer = json.loads(command.pop(command.index("--kv-transfer-config") + 1))
    assert transfer == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"kv_lease_duration": 30},
    }
    assert command == [
        *("vllm", "serve", "/models/weights", "--served-model-name", "chat"),
        *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "1", "--max-model-len", "2048"),
        *("--dtype", "auto", "--kv-cache-dtype", "auto", "--block-size", "16"),
        *("--host", "$(POD_IP)", "--port", "8000", "--kv-transfer-config", "--shutdown-timeout", "300"),
        *("--enable-per-request-metrics", "--enable-prompt-tokens-details", "--max-num-seqs", "64"),
    ]
    env = [e["name"] for e in container["env"]]
    assert env.index("POD_IP") < env.index("VLLM_NIXL_SIDE_CHANNEL_HOST"), (
        "expanded from what stands before it"
    )
    values = {e["name"]: e.get("value") for e in container["env"]}
    assert (values["VLLM_NIXL_SIDE_CHANNEL_HOST"], values["VLLM_NIXL_SIDE_CHANNEL_PORT"]) == (
        "$(POD_IP)",
        "5600",
    )
    probes = [container[k]["httpGet"]["path"] for k in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert probes == ["/health"] * 3
    assert prefill["spec"]["terminationGracePeriodSeconds"] == 300


@pytest.mark.parametrize("held", ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"])
def test_a_vllm_pod_ends_when_its_counters_say_so(held: str) -> None:
    """The very command of the manifest's preStop, against a server that holds something for a while."""
    pod = manifests.worker_pod(OWNER, VLLM, slot(VLLM), 0, 1, 2048, IMAGES)
    [_, flag, script] = pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    busy = 3
    asked: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            numbers = {name: 0.5 if name == held and len(asked) <= busy else 0.0 for name in names}
            lines = [f'vllm:{n}{{engine="0",model_name="a {{b}}"}} {v}' for n, v in numbers.items()]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(("\n".join(lines) + "\n").encode())

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = script.replace("8000", str(server.server_port)).replace("time.sleep", "(lambda _: None)")
    try:
        subprocess.run([sys.executable, flag, script], env={"POD_IP": "127.0.0.1"}, check=True, timeout=30)
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/metrics"] * (busy + 2), "it ends at the second empty answer in a row, and not before"
    subprocess.run(
        [sys.executable, flag, script], env={"POD_IP": "127.0.0.1"}, check=True, timeout=30
    )  # gone: at once


def test_vllm_flags_and_image_are_part_of_its_pairing_key() -> None:
    """It compares more than we set; a new image of the release is another vLLM."""
    more = spec(engine={"type": "vllm", "args": ["--attention-backend", "FLASHINFER"]})
    other = spec(engine={"type": "vllm", "image": "vllm/vllm-openai:v0.33.0"})
    keys = {plan.pairing_key(s) for s in (spec(), spec(engine={"type": "vllm"}), more, other)}
    assert len(keys) == 4

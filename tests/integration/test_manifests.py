"""What a plan becomes, against a real API server with Pod Security `restricted` enforced: accepted, pinned, and equal bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from disaggserve import manifests, plan
from disaggserve.api import manifest
from disaggserve.api.plan import Slot
from disaggserve.api.spec import Spec
from disaggserve.manifests import Images, Owner
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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("manifests"), ensure()) as plane:
        plane.kubectl("create", "namespace", "tight")
        plane.kubectl("label", "namespace", "tight", "pod-security.kubernetes.io/enforce=restricted")
        yield plane


@pytest.mark.parametrize("of", [spec(), RICH], ids=["plain", "rich"])
def test_everything_is_accepted_under_restricted(cluster: ControlPlane, of: Spec) -> None:
    pod = manifests.worker_pod(OWNER, of, slot(of), 0, 1, 2048, IMAGES)
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

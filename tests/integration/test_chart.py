"""The chart against the real API server: it installs, refuses wrong values, and gives no more rights than are used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from e2e.controlplane import CommandFailed, ControlPlane, ensure

CHART = str(Path(__file__).parents[2] / "charts/disaggserve")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("chart"), ensure()) as plane:
        yield plane


def test_lint_and_wrong_values(cluster: ControlPlane) -> None:
    assert "0 chart(s) failed" in cluster.helm("lint", CHART)
    for wrong, named in (
        ("replicas=0", "replicas"),
        ("prometheus.url=prom", "prometheus"),
        ("image.tga=1", "tga"),
    ):
        with pytest.raises(CommandFailed, match=named):
            cluster.helm("template", "x", CHART, "--set", wrong)


def test_a_pod_monitor_selects_whatever_has_metrics(cluster: ControlPlane) -> None:
    args = ("template", "x", CHART, "-n", "system", "--set", "prometheus.podMonitor=true")
    rendered = [d for d in yaml.safe_load_all(cluster.helm(*args)) if d]
    monitor = next(d for d in rendered if d["kind"] == "PodMonitor")["spec"]
    template = next(d for d in rendered if d["kind"] == "Deployment")["spec"]["template"]
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = [p["name"] for p in template["spec"]["containers"][0]["ports"]]
    assert [e["port"] in ports for e in monitor["podMetricsEndpoints"]] == [True]
    assert monitor["namespaceSelector"] == {"any": True}
    named = cluster.helm(*args, "--set", "watchNamespaces={chat}")
    monitor = next(d for d in yaml.safe_load_all(named) if d and d["kind"] == "PodMonitor")
    assert monitor["spec"]["namespaceSelector"] == {"matchNames": ["chat", "system"]}


def test_installs_upgrades_and_keeps_the_crd(cluster: ControlPlane) -> None:
    args = ("disaggserve", CHART, "-n", "system", "--create-namespace")
    cluster.helm("install", *args)
    assert cluster.kubectl("get", "crd", "disaggserves.disaggserve.dev", "-o", "name")
    cluster.helm("upgrade", *args, "--set", "replicas=2")
    cluster.helm("uninstall", "disaggserve", "-n", "system")
    assert cluster.kubectl("get", "crd", "disaggserves.disaggserve.dev", "-o", "name")


def test_the_pod_is_admitted_by_pod_security_restricted(cluster: ControlPlane) -> None:
    cluster.kubectl("create", "namespace", "tight")
    cluster.kubectl("label", "namespace", "tight", "pod-security.kubernetes.io/enforce=restricted")
    rendered = cluster.helm("template", "x", CHART, "-n", "tight", "--set", "crd.install=false")
    deployment = next(d for d in yaml.safe_load_all(rendered) if d and d["kind"] == "Deployment")
    template = deployment["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "namespace": "tight"},
        "spec": template["spec"],
    }
    pod["spec"].pop("serviceAccountName")
    cluster.kubectl("apply", "--dry-run=server", "-f", "-", input=json.dumps(pod))


def test_nothing_is_written_outside_the_namespaces_that_are_served(cluster: ControlPlane) -> None:
    for namespace in ("served", "other"):
        cluster.kubectl("create", "namespace", namespace)
    rendered = cluster.helm(
        "template", "x", CHART, "-n", "served", "--set", "watchNamespaces={served},crd.install=false"
    )
    rbac = [d for d in yaml.safe_load_all(rendered) if d and d["kind"] != "Deployment"]
    cluster.kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": rbac}))
    operator = "--as=system:serviceaccount:served:disaggserve-operator"

    def may(verb: str, what: str, namespace: str) -> bool:
        try:
            return cluster.kubectl("auth", "can-i", verb, what, "-n", namespace, operator).strip() == "yes"
        except CommandFailed:  # kubectl's exit code of a no
            return False

    writes = [
        ("create", "pods"),
        ("delete", "pods"),
        ("patch", "deployments.apps"),
        ("create", "rolebindings"),
    ]
    assert [may(*w, "served") for w in writes] == [True] * 4
    assert [may(*w, "other") for w in writes] == [False] * 4
    assert may("list", "pods", "other"), "they use up GPUs"
    assert not may("get", "secrets", "served")


def test_rights_are_the_ones_that_are_used(cluster: ControlPlane) -> None:
    rendered = [d for d in yaml.safe_load_all(cluster.helm("template", "x", CHART)) if d]
    roles = {d["metadata"]["name"]: d["rules"] for d in rendered if d["kind"] == "ClusterRole"}
    assert roles["disaggserve-router"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]
    operator = roles["disaggserve-operator"]
    granted = {(r, v) for rule in operator for r in rule["resources"] for v in rule["verbs"]}
    assert not {r for r, _ in granted} & {"secrets", "configmaps", "pods/exec"}
    assert "*" not in {part for pair in granted for part in pair}
    inventory = roles["disaggserve-operator-inventory"]
    assert {v for rule in inventory for v in rule["verbs"]} == {"list", "watch"}
    bind = [rule for rule in operator if "bind" in rule["verbs"]]
    assert [rule["resourceNames"] for rule in bind] == [["disaggserve-router"]]

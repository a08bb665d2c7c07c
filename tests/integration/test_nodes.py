"""Simulated nodes under the real control plane: pods run, are probed, restarted and ended as a kubelet would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.controlplane import ControlPlane, ensure
from e2e.controlplane.polling import wait_until
from e2e.nodes import TOPOLOGIES, AgentError, Nodes, OrderError, TopologyError
from e2e.nodes.environment import Mounts, expand
from e2e.nodes.errors import Refused
from e2e.nodes.images import IMAGES, find, image_name, localise, paced
from e2e.nodes.processes import ForkServerClient
from e2e.nodes.quantities import in_units, pod_requests, quantity
from e2e.nodes.tiny import TinyModelError, make_tiny
from e2e.nodes.topology import SimulatedNode, load

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0
"""Nothing here should take that long; a busy machine may."""

TOPOLOGY = """
nodes:
  - {name: gpu, count: 2, gpus: 8, product: NVIDIA-A100-SXM4-80GB, rdma: true, fabric: {leaf: l0}, zone: z}
  - {name: cpu, cpu: 32, memory: 128Gi}
"""

SERVER = textwrap.dedent(
    """
    import os, signal, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer

    broken = set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(500 if self.path in broken else 200)
            self.end_headers()
            self.wfile.write(os.environ["POD_NAME"].encode())

        def do_POST(self):  # POST /live: from now on GET /live fails, or works again
            broken.symmetric_difference_update({self.path})
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words):
            pass

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    HTTPServer((os.environ["POD_IP"], 8000), Handler).serve_forever()
    """
)


class Cluster:
    """The API server as administrator, one request at a time."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self._tls = ssl.create_default_context(cafile=plane.ca_certificate)
        self._tls.load_cert_chain(plane.folder / "pki" / "admin.crt", plane.folder / "pki" / "admin.key")

    def call(self, method: str, path: str, body: Json | None = None) -> Json:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.plane.server + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, context=self._tls, timeout=10) as answer:
            found: Json = json.load(answer)
            return found

    def create(self, thing: Json, namespace: str = "default") -> Json:
        prefix = "/api/v1" if thing["apiVersion"] == "v1" else f"/apis/{thing['apiVersion']}"
        return self.call("POST", f"{prefix}/namespaces/{namespace}/{thing['kind'].lower()}s", thing)

    def pod(self, name: str) -> Json:
        return self.call("GET", f"/api/v1/namespaces/default/pods/{name}")

    def delete(self, name: str) -> None:
        self.call("DELETE", f"/api/v1/namespaces/default/pods/{name}")

    def wait(self, name: str, condition: Callable[[Json], bool], what: str) -> Json:
        """The pod, as soon as the condition holds for it."""
        found: list[Json] = []

        def met() -> bool:
            found[:] = [self.pod(name)]
            return condition(found[0])

        try:
            wait_until(met, f"pod {name} {what}", timeout_s=PATIENCE_S)
        except Exception as error:
            error.add_note(json.dumps(found[0]["status"], indent=1))
            raise
        return found[0]

    def wait_ready(self, name: str) -> Json:
        return self.wait(name, is_ready, "is Ready")

    def wait_gone(self, name: str) -> None:
        def gone() -> bool:
            try:
                self.pod(name)
            except urllib.error.HTTPError as error:
                return error.code == 404
            return False

        wait_until(gone, f"pod {name} is gone", timeout_s=PATIENCE_S)


def is_ready(pod: Json) -> bool:
    return condition(pod, "Ready") == "True"


def condition(thing: Json, kind: str) -> str:
    found = {entry["type"]: entry["status"] for entry in thing["status"].get("conditions", [])}
    return str(found.get(kind, ""))


def container(pod: Json, index: int = 0) -> Json:
    statuses = pod["status"].get("containerStatuses", [])
    found: Json = statuses[index] if statuses else {"state": {}, "lastState": {}, "restartCount": 0}
    return found


def restarts(pod: Json) -> int:
    return int(container(pod)["restartCount"])


def waiting(pod: Json) -> Json:
    found: Json = container(pod)["state"].get("waiting", {})
    return found


def a_pod(name: str, *containers: Json, **spec: Any) -> Json:
    spec.setdefault("terminationGracePeriodSeconds", 5)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"containers": list(containers), **spec},
    }


def python(script: str, **more: Any) -> Json:
    return {"name": "main", "image": "python:3.12", "command": ["python", "-c", script], **more}


def server(**more: Any) -> Json:
    fields = {"POD_IP": "status.podIP", "POD_NAME": "metadata.name"}
    env = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()]
    more.setdefault("readinessProbe", {"httpGet": {"path": "/ready", "port": 8000}, "periodSeconds": 1})
    return python(SERVER, env=env, ports=[{"name": "http", "containerPort": 8000}], **more)


def ask(pod: Json, path: str, method: str = "GET") -> str:
    url = f"http://{pod['status']['podIP']}:8000{path}"
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5) as answer:
        text: str = answer.read().decode()
        return text


def processes_of(folder: Path) -> set[int]:
    """Every process that names the folder in its arguments or environment."""
    found = set()
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and any(
                str(folder).encode() in (process / part).read_bytes() for part in ("cmdline", "environ")
            ):
                found.add(int(process.name))
    return found - {os.getpid()}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with ControlPlane(folder, ensure(), node_monitor_grace_period="5s") as plane:
        yield Cluster(plane)


@pytest.fixture(scope="module")
def nodes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "topology.yaml").write_text(TOPOLOGY)
    host = {"/mnt/shared": folder / "shared"}
    with Nodes(
        cluster.plane.kubeconfig, folder / "topology.yaml", folder, heartbeat_s=1.0, host_paths=host
    ) as running:
        yield running


def test_nodes_are_ready_and_labelled_as_real_ones(cluster: Cluster, nodes: Nodes) -> None:
    assert nodes.names == ("gpu-0", "gpu-1", "cpu")
    gpu, cpu = (cluster.call("GET", f"/api/v1/nodes/{name}") for name in ("gpu-0", "cpu"))
    assert condition(gpu, "Ready") == condition(cpu, "Ready") == "True"
    assert gpu["status"]["allocatable"]["nvidia.com/gpu"] == "8"
    assert gpu["status"]["allocatable"]["rdma/hca_shared_devices_a"] == "64"
    expected = {
        "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB",
        "nvidia.com/gpu.memory": "81920",
        "nvidia.com/gpu.count": "8",
        "feature.node.kubernetes.io/pci-0207_15b3.present": "true",
        "network.topology.nvidia.com/leaf": "l0",
        "topology.kubernetes.io/zone": "z",
    }
    assert expected.items() <= gpu["metadata"]["labels"].items()
    assert "nvidia.com/gpu" in [taint["key"] for taint in gpu["spec"]["taints"]]
    assert "nvidia.com/gpu" not in cpu["status"]["allocatable"]


def test_two_pods_serve_on_the_same_port_at_addresses_of_their_own(cluster: Cluster, nodes: Nodes) -> None:
    for name in ("one", "two"):
        cluster.create(a_pod(name, server()))
    one, two = cluster.wait_ready("one"), cluster.wait_ready("two")
    assert one["status"]["podIP"] != two["status"]["podIP"]
    assert (ask(one, "/"), ask(two, "/")) == ("one", "two")
    assert one["status"]["phase"] == "Running"
    assert {entry["type"]: entry["status"] for entry in one["status"]["conditions"]} == {
        "PodReadyToStartContainers": "True",
        "Initialized": "True",
        "ContainersReady": "True",
        "Ready": "True",
        "PodScheduled": "True",
    }
    log = nodes.log("one", "main")
    for name in ("one", "two"):
        cluster.delete(name)
        cluster.wait_gone(name)
    assert nodes.pods() == []
    assert log.exists()


def test_environment_downward_api_and_mounts(cluster: Cluster, nodes: Nodes) -> None:
    cluster.create(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"k": "s3"}}
    )
    show = textwrap.dedent(
        """
        import json, os, sys, pathlib
        names = ("PLAIN", "COMPOSED", "ESCAPED", "CPU", "NODE", "APP", "FROM_a", "SECRET", "HOSTNAME")
        found = {name: os.environ.get(name) for name in names}
        found["config"] = pathlib.Path(sys.argv[1]).read_text()
        found["env path"] = pathlib.Path(os.environ["CONFIG_FILE"]).read_text()
        found["secret"] = pathlib.Path(sys.argv[2].partition("=")[2]).read_text()
        found["labels"] = pathlib.Path(sys.argv[3]).read_text()
        found["from init"] = pathlib.Path(sys.argv[4], "note").read_text()
        found["sub path"] = os.listdir(sys.argv[5])
        found["host"] = pathlib.Path(sys.argv[6]).read_text()
        found["path"] = os.environ["PATH"].partition(":")[0]
        print(json.dumps(found))
        """
    )
    pod = a_pod(
        "surroundings",
        {
            "name": "main",
            "image": "example.com:5000/library/python:3.12@sha256:" + "0" * 64,
            "command": ["python", "-c", show],
            "args": [
                "/etc/app/file.conf",
                "--secret=/keys/k",
                "/about/labels",
                "$(WORK)",
                "/deep",
                "/mnt/there/greeting",
            ],
            "resources": {"limits": {"cpu": "1500m"}},
            "envFrom": [{"prefix": "FROM_", "configMapRef": {"name": "settings"}}],
            "env": [
                {"name": "PLAIN", "value": "p"},
                {"name": "COMPOSED", "value": "$(PLAIN)-$(NOBODY)"},
                {"name": "ESCAPED", "value": "$$(PLAIN)"},
                {"name": "WORK", "value": "/scratch-space"},
                {"name": "CONFIG_FILE", "value": "/etc/app/file.conf"},
                {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
                {"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "key", "key": "k"}}},
                {
                    "name": "NONE",
                    "valueFrom": {"configMapKeyRef": {"name": "no", "key": "k", "optional": True}},
                },
            ],
            "volumeMounts": [
                {"name": "settings", "mountPath": "/etc/app"},
                {"name": "keys", "mountPath": "/keys"},
                {"name": "about", "mountPath": "/about"},
                {"name": "scratch", "mountPath": "/scratch-space"},
                {"name": "scratch", "mountPath": "/deep", "subPath": "a/b"},
                {"name": "shared", "mountPath": "/mnt/there"},
                # Where the local Python lies, too: what is local already is not rewritten.
                {"name": "scratch", "mountPath": "/" + Path(sys.executable).parts[1]},
            ],
        },
        initContainers=[
            {
                "name": "init",
                "image": "busybox",
                "command": ["sh", "-c", "echo -n hello > /data/note; echo -n hi > /mnt/greeting"],
                "volumeMounts": [
                    {"name": "scratch", "mountPath": "/data"},
                    {"name": "shared", "mountPath": "/mnt"},
                ],
            }
        ],
        volumes=[
            {
                "name": "settings",
                "configMap": {"name": "settings", "items": [{"key": "a", "path": "file.conf"}]},
            },
            {"name": "keys", "secret": {"secretName": "key"}},
            {
                "name": "about",
                "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]},
            },
            {"name": "scratch", "emptyDir": {}},
            {"name": "shared", "hostPath": {"path": "/mnt/shared/deep", "type": "DirectoryOrCreate"}},
        ],
        restartPolicy="Never",
        nodeName="cpu",
    )
    cluster.create(pod)
    cluster.wait(
        "surroundings", lambda pod: "settings" in waiting(pod).get("message", ""), "misses its ConfigMap"
    )
    cluster.create(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "settings"},
            "data": {"a": "value of a"},
        }
    )
    done = cluster.wait(
        "surroundings", lambda pod: pod["status"]["phase"] in ("Succeeded", "Failed"), "has ended"
    )
    output = nodes.log("surroundings", "main").read_text()
    assert done["status"]["phase"] == "Succeeded", output
    assert json.loads(output) == {
        "PLAIN": "p",
        "COMPOSED": "p-$(NOBODY)",
        "ESCAPED": "$(PLAIN)",
        "CPU": "2",
        "NODE": "cpu",
        "APP": "surroundings",
        "FROM_a": "value of a",
        "SECRET": "s3",
        "HOSTNAME": "surroundings",
        "config": "value of a",
        "env path": "value of a",
        "secret": "s3",
        "labels": 'app="surroundings"',
        "from init": "hello",
        "sub path": [],
        "host": "hi",
        "path": str(Path(sys.executable).parent),
    }
    assert (nodes.folder / "shared" / "deep" / "greeting").read_text() == "hi"
    assert done["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
    cluster.delete("surroundings")
    cluster.wait_gone("surroundings")


def test_probes_decide_on_readiness_and_life(cluster: Cluster, nodes: Nodes) -> None:
    probe = {"periodSeconds": 1, "failureThreshold": 1}
    cluster.create(
        a_pod(
            "probed",
            server(
                startupProbe={**probe, "tcpSocket": {"port": "http"}, "failureThreshold": 30},
                readinessProbe={**probe, "httpGet": {"path": "/ready", "port": "http"}},
                livenessProbe={**probe, "httpGet": {"path": "/live", "port": "http"}},
            ),
        )
    )
    pod = cluster.wait_ready("probed")
    assert container(pod)["started"] is True
    ask(pod, "/ready", "POST")
    unready = cluster.wait("probed", lambda pod: not is_ready(pod), "is not Ready")
    assert "running" in container(unready)["state"]
    assert condition(unready, "ContainersReady") == "False"
    ask(pod, "/ready", "POST")
    cluster.wait_ready("probed")
    ask(pod, "/live", "POST")
    restarted = cluster.wait("probed", lambda pod: restarts(pod) == 1 and is_ready(pod), "is restarted")
    assert container(restarted)["lastState"]["terminated"]["exitCode"] == 0
    assert restarted["status"]["podIP"] == pod["status"]["podIP"]
    cluster.delete("probed")
    cluster.wait_gone("probed")


def test_exec_probe_runs_in_the_containers_surroundings(cluster: Cluster, nodes: Nodes) -> None:
    command = {"command": ["sh", "-c", 'test "$WHO" = me && cat /data/up']}
    cluster.create(
        a_pod(
            "execed",
            {
                "name": "main",
                "image": "busybox",
                "command": ["sh", "-c", "sleep 0.5; echo 1 > /data/up; exec sleep 1000"],
                "env": [{"name": "WHO", "value": "me"}],
                "readinessProbe": {"exec": command, "periodSeconds": 1},
                "volumeMounts": [{"name": "data", "mountPath": "/data"}],
            },
            volumes=[{"name": "data", "emptyDir": {}}],
        )
    )
    cluster.wait_ready("execed")
    cluster.delete("execed")
    cluster.wait_gone("execed")


def test_a_crash_is_restarted_and_a_crash_loop_backs_off(cluster: Cluster, nodes: Nodes) -> None:
    cluster.create(a_pod("steady", server()))
    cluster.create(a_pod("looping", python("import sys; print('no'); sys.exit(3)")))
    first = cluster.wait_ready("steady")
    assert nodes.crash("steady") == ["main"]
    again = cluster.wait("steady", lambda pod: restarts(pod) == 1 and is_ready(pod), "is back")
    assert container(again)["lastState"]["terminated"]["exitCode"] == 137
    assert container(again)["containerID"] != container(first)["containerID"]
    looping = cluster.wait(
        "looping",
        lambda pod: waiting(pod).get("reason") == "CrashLoopBackOff" and restarts(pod) >= 2,
        "backs off",
    )
    assert container(looping)["lastState"]["terminated"]["exitCode"] == 3
    assert "back-off" in waiting(looping)["message"]
    assert looping["status"]["phase"] == "Running"
    assert nodes.log("looping", "main").read_text().splitlines() == ["no"] * (restarts(looping) + 1)
    for options in ([], ["--previous"], ["--follow"], ["--tail=5"], ["--limit-bytes=3"]):
        assert cluster.plane.kubectl("logs", "looping", *options) == "no\n"
    assert cluster.plane.kubectl("logs", "steady", "--tail=0") == ""
    for name in ("steady", "looping"):
        cluster.delete(name)
        cluster.wait_gone(name)


def test_restart_policies_and_jobs(cluster: Cluster, nodes: Nodes) -> None:
    cluster.create(a_pod("fails", python("raise SystemExit(4)"), restartPolicy="Never"))
    cluster.create(
        a_pod(
            "second-time",
            {
                "name": "main",
                "image": "busybox",
                "command": ["sh", "-c", "echo >> /d/n; test $(wc -l < /d/n) -ge 2"],
                "volumeMounts": [{"name": "d", "mountPath": "/d"}],
            },
            volumes=[{"name": "d", "emptyDir": {}}],
            restartPolicy="OnFailure",
        )
    )
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "work"},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [python("print('worked')")]}}},
    }
    cluster.create(job)
    failed = cluster.wait("fails", lambda pod: pod["status"]["phase"] == "Failed", "has failed")
    assert container(failed)["state"]["terminated"]["exitCode"] == 4
    succeeded = cluster.wait(
        "second-time", lambda pod: pod["status"]["phase"] == "Succeeded", "has succeeded"
    )
    assert restarts(succeeded) == 1

    def complete() -> bool:
        return (
            condition(cluster.call("GET", "/apis/batch/v1/namespaces/default/jobs/work"), "Complete")
            == "True"
        )

    wait_until(complete, "the job is complete", timeout_s=PATIENCE_S)
    cluster.plane.kubectl("delete", "job", "work")
    for name in ("fails", "second-time"):
        cluster.delete(name)
        cluster.wait_gone(name)


def test_ending_runs_the_hook_then_sigterm_then_sigkill(cluster: Cluster, nodes: Nodes) -> None:
    script = textwrap.dedent(
        """
        import signal, sys, time
        def term(*_):
            print("term", flush=True)
            if sys.argv[1] == "polite":
                sys.exit(0)
        signal.signal(signal.SIGTERM, term)
        open("up", "w").close()
        print("up", flush=True)
        while True:
            time.sleep(60)
        """
    )

    def obstinate(kind: str) -> Json:
        main = python(
            script,
            args=[kind],
            lifecycle={"preStop": {"exec": {"command": ["sh", "-c", "echo hook"]}}},
            readinessProbe={"exec": {"command": ["cat", "up"]}, "periodSeconds": 1},
        )
        return a_pod(kind, main, terminationGracePeriodSeconds=60 if kind == "polite" else 2)

    for kind in ("polite", "stubborn"):
        cluster.create(obstinate(kind))
    processes = {}
    for kind in ("polite", "stubborn"):
        cluster.wait_ready(kind)
    for pod in nodes.pods():
        processes[pod["name"]] = pod["processes"]["main"]
    for kind in ("polite", "stubborn"):
        cluster.delete(kind)
    for kind in ("polite", "stubborn"):
        cluster.wait_gone(kind)
        assert nodes.log(kind, "main").read_text().split() == ["up", "hook", "term"]
        assert not Path(f"/proc/{processes[kind]}").exists()


def test_a_deleted_pod_leaves_no_process_and_no_file(cluster: Cluster, nodes: Nodes) -> None:
    before = processes_of(nodes.folder)
    brood = textwrap.dedent(
        """
        import os, subprocess, time
        subprocess.Popen(["/bin/sleep", "1000"])
        subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True)
        print("up", flush=True)
        time.sleep(1000)
        """
    )
    cluster.create(a_pod("brood", python(brood), terminationGracePeriodSeconds=1))
    log = nodes.log("brood", "main")
    wait_until(lambda: log.exists() and "up" in log.read_text(), "the brood is up", timeout_s=PATIENCE_S)
    assert len(processes_of(nodes.folder) - before) == 3
    cluster.delete("brood")
    cluster.wait_gone("brood")
    wait_until(lambda: processes_of(nodes.folder) <= before, "no process is left", timeout_s=PATIENCE_S)
    assert list((nodes.folder / "pods").iterdir()) == []


def test_a_pod_removed_by_force_is_killed(cluster: Cluster, nodes: Nodes) -> None:
    cluster.create(a_pod("forced", server()))
    cluster.wait_ready("forced")
    process = nodes.pods()[0]["processes"]["main"]
    cluster.plane.kubectl("delete", "pod", "forced", "--force", "--grace-period=0")
    wait_until(lambda: not Path(f"/proc/{process}").exists(), "its process is gone", timeout_s=PATIENCE_S)


@pytest.mark.parametrize(
    ("name", "change", "reason", "words"),
    [
        ("image", {"image": "nobody/knows-it:1"}, "ErrImagePull", "knows-it:1' has no local stand-in"),
        (
            "program",
            {"command": ["/usr/bin/perl"]},
            "RunContainerError",
            "/usr/bin/perl' has no local stand-in",
        ),
        ("directory", {"workingDir": "/srv"}, "CreateContainerError", "workingDir /srv lies in no mount"),
        (
            "host-path",
            {"volumeMounts": [{"name": "v", "mountPath": "/v"}]},
            "FailedMount",
            "maps only those it was told of",
        ),
        (
            "grpc",
            {"livenessProbe": {"grpc": {"port": 1}}},
            "CreateContainerError",
            "grpc, which is not supported",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_the_status(
    cluster: Cluster, nodes: Nodes, name: str, change: Json, reason: str, words: str
) -> None:
    volumes = [{"name": "v", "hostPath": {"path": "/etc"}}] if name == "host-path" else []
    cluster.create(a_pod(name, {**python("pass"), **change}, volumes=volumes))
    pod = cluster.wait(name, lambda pod: waiting(pod).get("reason") == reason, f"is refused with {reason}")
    assert words in waiting(pod)["message"]
    assert pod["status"]["phase"] == "Pending"
    cluster.delete(name)
    cluster.wait_gone(name)


def test_the_scheduler_counts_gpus_and_the_node_admits_no_more(cluster: Cluster, nodes: Nodes) -> None:
    gpu = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    spec = {
        "nodeSelector": {"kubernetes.io/hostname": "gpu-0"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "terminationGracePeriodSeconds": 0,
    }
    sleep = {"name": "main", "image": "busybox", "command": ["sleep", "1000"], **gpu}
    names = [f"gpu-{index}" for index in range(8)]
    for name in names:
        cluster.create(a_pod(name, sleep, **spec))
    for name in names:
        cluster.wait_ready(name)
    cluster.create(a_pod("ninth", sleep, **spec))
    pending = cluster.wait("ninth", lambda pod: condition(pod, "PodScheduled") == "False", "is not scheduled")
    assert "Insufficient nvidia.com/gpu" in pending["status"]["conditions"][0]["message"]
    cluster.create(a_pod("by-hand", sleep, nodeName="gpu-0"))
    rejected = cluster.wait("by-hand", lambda pod: pod["status"]["phase"] == "Failed", "is rejected")
    assert rejected["status"]["reason"] == "OutOfnvidia.com/gpu"
    cluster.create(a_pod("untolerated", {**sleep, "resources": {}}))
    assert cluster.wait_ready("untolerated")["spec"]["nodeName"] == "cpu"
    for name in [*names, "ninth", "by-hand", "untolerated"]:
        cluster.delete(name)
        cluster.wait_gone(name)


def test_a_service_account_may_do_what_rbac_grants_it(cluster: Cluster, nodes: Nodes) -> None:
    script = textwrap.dedent(
        """
        import os, time
        from kubernetes import client, config
        config.load_kube_config(os.environ["KUBECONFIG"])
        api = client.CoreV1Api()
        namespace = open("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read()
        while True:
            try:
                api.list_namespaced_pod(namespace)
                print("allowed", flush=True)
                break
            except client.ApiException as error:
                print(error.status, flush=True)
                time.sleep(0.3)
        """
    )
    cluster.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "reader"}})
    # The path stands in the script itself, which is an argument: it is rewritten there too.
    cluster.create(a_pod("reader", python(script), serviceAccountName="reader", restartPolicy="Never"))
    cluster.create(
        a_pod(
            "anonymous",
            python("import os; print(os.environ.get('KUBECONFIG'))"),
            automountServiceAccountToken=False,
            restartPolicy="Never",
        )
    )
    log = nodes.log("reader", "main")
    wait_until(
        lambda: log.exists() and "403" in log.read_text(), "the reader is refused", timeout_s=PATIENCE_S
    )
    cluster.plane.kubectl("create", "role", "reader", "--verb=list", "--resource=pods")
    cluster.plane.kubectl(
        "create", "rolebinding", "reader", "--role=reader", "--serviceaccount=default:reader"
    )
    cluster.wait("reader", lambda pod: pod["status"]["phase"] == "Succeeded", "is allowed")
    cluster.wait("anonymous", lambda pod: pod["status"]["phase"] == "Succeeded", "has ended")
    assert nodes.log("anonymous", "main").read_text().strip() == "None"
    for name in ("reader", "anonymous"):
        cluster.delete(name)
        cluster.wait_gone(name)


def test_drain_evicts_within_the_disruption_budget(cluster: Cluster, nodes: Nodes) -> None:
    cluster.create(a_pod("evicted", server(), terminationGracePeriodSeconds=1))
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "keep"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "evicted"}}},
    }
    cluster.create(budget)
    cluster.wait_ready("evicted")
    with pytest.raises(OrderError, match="disruption budget"):
        nodes.drain("cpu", timeout_s=2)
    cluster.call("DELETE", "/apis/policy/v1/namespaces/default/poddisruptionbudgets/keep")
    nodes.drain("cpu")
    cluster.wait_gone("evicted")
    assert cluster.call("GET", "/api/v1/nodes/cpu")["spec"]["unschedulable"] is True
    nodes.uncordon("cpu")


def test_a_failed_node_becomes_not_ready_and_comes_back(cluster: Cluster, nodes: Nodes) -> None:
    cluster.create(a_pod("survivor", server()))
    cluster.create(a_pod("doomed", server()))
    cluster.wait_ready("doomed")
    before = cluster.wait_ready("survivor")
    processes = [pod["processes"]["main"] for pod in nodes.pods()]
    nodes.fail("cpu")
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    assert is_ready(cluster.pod("survivor"))  # nobody has said otherwise yet
    cluster.wait("survivor", lambda pod: not is_ready(pod), "is marked unready by the node controller")
    node = cluster.call("GET", "/api/v1/nodes/cpu")
    assert condition(node, "Ready") == "Unknown"
    assert "node.kubernetes.io/unreachable" in [taint["key"] for taint in node["spec"]["taints"]]
    cluster.delete("doomed")
    assert cluster.pod("doomed")["metadata"]["deletionTimestamp"]  # and stays, as nobody can confirm its end
    nodes.recover("cpu")
    cluster.wait_gone("doomed")
    after = cluster.wait("survivor", lambda pod: is_ready(pod) and restarts(pod) == 1, "is back")
    assert container(after)["lastState"]["terminated"]["reason"] == "ContainerStatusUnknown"
    assert after["status"]["podIP"] != before["status"]["podIP"]
    assert after["status"]["podIPs"] == [{"ip": after["status"]["podIP"]}]
    assert ask(after, "/") == "survivor"
    with pytest.raises(OrderError, match="there is no node nowhere"):
        nodes.fail("nowhere")
    cluster.delete("survivor")
    cluster.wait_gone("survivor")


def test_a_late_heartbeat_is_made_good(cluster: Cluster, nodes: Nodes) -> None:
    cluster.create(a_pod("patient", server()))
    cluster.wait_ready("patient")
    os.kill(nodes.pid, signal.SIGSTOP)
    try:
        cluster.wait("patient", lambda pod: not is_ready(pod), "is marked unready by the node controller")
    finally:
        os.kill(nodes.pid, signal.SIGCONT)
    assert restarts(cluster.wait_ready("patient")) == 0

    def ready() -> bool:
        return all(
            condition(cluster.call("GET", f"/api/v1/nodes/{name}"), "Ready") == "True" for name in nodes.names
        )

    wait_until(ready, "all nodes are Ready again", timeout_s=PATIENCE_S)
    cluster.delete("patient")
    cluster.wait_gone("patient")


def test_nothing_outlives_the_agent_or_its_owner(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "others"
    (tmp_path / "topology.yaml").write_text("nodes: [{name: other, labels: {mine: 'yes'}}]")
    spawn = "import subprocess, time; subprocess.Popen(['/bin/sleep', '1000']); print('up'); time.sleep(1000)"
    cluster.create(a_pod("orphan", python(spawn), nodeSelector={"mine": "yes"}))
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from e2e.nodes import Nodes
        arguments = [Path(argument) for argument in sys.argv[1:]]
        with Nodes(*arguments) as nodes:
            print(nodes.pid, flush=True)
            time.sleep(1000)
        """
    )
    arguments = [cluster.plane.kubeconfig, tmp_path / "topology.yaml", folder]
    log = folder / "logs" / "default_orphan_main.log"
    for victim in ("agent", "owner"):
        owner = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert owner.stdout is not None
        agent = int(owner.stdout.readline())
        lives = 1 if victim == "agent" else 2
        wait_until(
            lambda lives=lives: log.exists() and log.read_text().count("up") == lives,
            f"the pod runs (life {lives})",
            timeout_s=PATIENCE_S,
        )
        # The agent, its fork server, and the pod's two.
        assert len(processes_of(folder) - {owner.pid}) == 4
        os.kill(agent if victim == "agent" else owner.pid, signal.SIGKILL)
        wait_until(lambda me=owner.pid: processes_of(folder) <= {me}, "nothing is left", timeout_s=PATIENCE_S)
        owner.kill()
        owner.wait()
        owner.stdout.close()
    assert restarts(cluster.pod("orphan")) == 1
    cluster.plane.kubectl("delete", "pod", "orphan", "--force", "--grace-period=0")
    cluster.call("DELETE", "/api/v1/nodes/other")


def test_a_worker_is_forked_from_the_server_that_has_imported_torch(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table, the fork server, the pace and the tiny model, with a stand-in for the worker's own code."""
    code = textwrap.dedent(
        """
        import json, os, sys
        from http.server import HTTPServer, SimpleHTTPRequestHandler

        def main():
            seen = {"argv": sys.argv, "torch": "torch" in sys.modules, "shell": os.environ.get("SHELL")}
            print(json.dumps(seen))
            HTTPServer((os.environ["POD_IP"], 8000), SimpleHTTPRequestHandler).serve_forever()
        """
    )
    (tmp_path / "disaggworker").mkdir()
    (tmp_path / "disaggworker" / "__init__.py").touch()
    (tmp_path / "disaggworker" / "__main__.py").write_text(code)
    (tmp_path / "topology.yaml").write_text(
        TOPOLOGY.replace("name: gpu", "name: fast").replace("cpu,", "slow,")
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    argv = ["disaggworker", "prefill", "--model", "facebook/opt-13b", "--weights", "/models/weights"]
    worker = {
        "name": "main",
        "image": "ghcr.io/x/disaggserve-worker:dev",
        "command": argv,
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1},
        "resources": {"limits": {"nvidia.com/gpu": "2"}},
        "volumeMounts": [{"name": "weights", "mountPath": "/models"}],
    }
    spec = {
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "nodeSelector": {"kubernetes.io/hostname": "fast-1"},
        "volumes": [{"name": "weights", "hostPath": {"path": "/mnt/weights", "type": "Directory"}}],
    }
    with Nodes(cluster.plane.kubeconfig, tmp_path / "topology.yaml", tmp_path / "nodes") as nodes:
        cluster.create(a_pod("worker", worker, **spec))
        cluster.wait_ready("worker")
        seen = json.loads(nodes.log("worker", "main").read_text())
        weights = nodes.folder / "models" / "facebook--opt-13b"
        assert seen["argv"][:-1] == [*argv[:4], "--weights", str(weights), "--pace"]
        assert json.loads(seen["argv"][-1])["node"] == "fast-1"
        assert (weights / "model.safetensors").exists()
        assert seen["torch"] is True
        assert seen["shell"] is None
        cluster.delete("worker")
        cluster.wait_gone("worker")
    for name in nodes.names:
        cluster.call("DELETE", f"/api/v1/nodes/{name}")


def test_an_agent_that_has_lost_its_fork_server_says_so(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "topology.yaml").write_text("nodes: [{name: short-lived}]")
    with Nodes(cluster.plane.kubeconfig, tmp_path / "topology.yaml", tmp_path) as nodes:
        nodes.check()
        with pytest.raises(AgentError, match=f"other simulated nodes run in {tmp_path}"):
            Nodes(cluster.plane.kubeconfig, tmp_path / "topology.yaml", tmp_path).start()
        (server,) = processes_of(tmp_path) - {nodes.pid}
        os.kill(server, signal.SIGKILL)

        def ended() -> bool:
            try:
                nodes.check()
            except AgentError as error:
                return "the fork server has ended" in str(error)
            return False

        wait_until(ended, "the agent has ended", timeout_s=PATIENCE_S)
        with pytest.raises(AgentError):
            nodes.pods()
    cluster.call("DELETE", "/api/v1/nodes/short-lived")


def test_an_agent_that_cannot_start_says_why(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "topology.yaml").write_text("nodes: [{name: n, gpus: 8}]")
    with (
        pytest.raises(AgentError, match=r"nodes\[0\] must give gpus and product together"),
        Nodes(cluster.plane.kubeconfig, tmp_path / "topology.yaml", tmp_path),
    ):
        pass
    assert not processes_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: [{name: a, colour: red}]", r"nodes\[0\].colour is unknown"),
        ("nodes: [{name: a}, {name: a}]", "names node a twice"),
        ("nodes: [{name: A}]", "is not a DNS label"),
        ("nodes: [{name: a, gpus: -1, product: P}]", "gpus -1 is not a whole number"),
        ("nodes: [{name: a, gpus: 1, product: P}]", "memory of P is not known"),
        ("nodes: [{name: a, rdma: 7}]", "rdma 7 is neither true nor false"),
        ("nodes: [{name: a, fabric: {rack: r}}]", "fabric.rack is unknown"),
        ("nodes: [{name: a, memory: 1GB}]", "memory '1GB' is not a quantity"),
        ("machines: []", "must hold one key, `nodes`"),
        ("{", "is not YAML"),
    ],
)
def test_a_faulty_topology_is_told_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(TopologyError, match=message):
        load(path)


def test_the_shipped_topology_is_two_machines_of_eight() -> None:
    nodes = load(TOPOLOGIES / "two-dgx.yaml")
    assert [(node.name, node.gpus, node.nvlink, node.rdma) for node in nodes] == [
        ("dgx-0", 8, True, True),
        ("dgx-1", 8, True, True),
        ("cpu", 0, False, False),
    ]


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$(A)/$(B)", "1/$(B)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$A $", "$A $"),
        ("$(A", "$(A"),
    ],
)
def test_variables_expand_as_in_kubernetes(text: str, expanded: str) -> None:
    assert expand(text, {"A": "1"}) == expanded


def test_mount_paths_are_rewritten_whole_and_once() -> None:
    mounts = Mounts(
        {"/data": Path("/pod/v/data"), "/data/deep/": Path("/pod/v/deep"), "/pod": Path("/no")}, Path("/pod")
    )
    for text, rewritten in {
        "/data/x": "/pod/v/data/x",
        "--in=/data/deep/x,/data": "--in=/pod/v/deep/x,/pod/v/data",
        "/database /data-2 /my/data http://host/data": "/database /data-2 /my/data http://host/data",
        "open('/data')": "open('/pod/v/data')",
        "/pod/v/data": "/pod/v/data",
    }.items():
        assert mounts.rewrite(text) == rewritten
    with pytest.raises(Refused, match="mounted at /"):
        Mounts({"/": Path("/x")}, Path("/pod"))


def test_quantities() -> None:
    assert [quantity(text) for text in ("1500m", "2Ki", "1e3", "3M", "8")] == [1.5, 2048, 1000, 3_000_000, 8]
    assert in_units("1500m", "1") == "2"
    assert in_units("1Gi", "1Mi") == "1024"
    two = {"resources": {"requests": {"cpu": "1", "nvidia.com/gpu": "1"}}}
    spec = {"containers": [two, two], "initContainers": [{"resources": {"requests": {"cpu": "3"}}}]}
    assert pod_requests(spec) == {"cpu": 3, "nvidia.com/gpu": 2}


DGX = SimulatedNode("dgx", gpus=8, product="NVIDIA-A100-SXM4-80GB", nvlink=True, rdma=True)


def test_a_worker_is_paced_by_its_node_and_gets_tiny_weights() -> None:
    image = find(IMAGES, "registry.example:5000/x/disaggserve-worker:v1@sha256:0")
    argv = [
        "disaggworker",
        "prefill",
        "--model",
        "facebook/opt-13b",
        "--weights",
        "/models/weights",
        "--tp",
        "2",
    ]
    command = localise(image, argv)
    assert command.paced
    assert command.nice == 0
    assert command.call == "disaggworker.__main__:main"
    *kept, pace_flag, pace = paced(command.argv, DGX, Path("/tiny"))
    assert kept == [*argv[:4], "--tp", "2", "--weights", "/tiny"]
    assert pace_flag == "--pace"
    assert json.loads(pace) == {
        "gpu": "NVIDIA-A100-SXM4-80GB",
        "node": "dgx",
        "nvlink": True,
        "rdma": True,
        "model": "facebook/opt-13b",
    }
    with pytest.raises(Refused, match="has no GPU"):
        paced(command.argv, SimulatedNode("cpu"), Path("/tiny"))
    with pytest.raises(Refused, match="needs --model"):
        paced(["disaggworker", "decode"], DGX, Path("/tiny"))
    both = localise(image, ["disaggworker", "pair", "prefill", *argv[2:6], "decode", *argv[2:6]])
    assert (both.paced, both.call) == (True, None), "it starts two programs, and is no fork itself"
    local = paced(both.argv, DGX, Path("/tiny"))
    flags = ("--model", "facebook/opt-13b", "--weights", "/tiny", "--pace", pace)
    assert local[-15:] == ("pair", "prefill", *flags, "decode", *flags)
    assert localise(image, ["disaggworker", "fetch", "--to", "/models"]).argv == (shutil.which("true"),)
    router = localise(find(IMAGES, "disaggserve-router"), ["disaggworker", "router"])
    assert not router.paced
    assert router.call is None
    assert image_name("a/b:c") == "b"


def test_the_fork_server_calls_what_it_has_imported(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('{"b": 1}')

    async def run() -> list[int]:
        server = await ForkServerClient.start(tmp_path / "server.log", ["json.tool"])
        codes = []
        for arguments in (["in.json", "out.json"], ["missing.json"]):
            process = await server.spawn(
                ["tool", *arguments], env={}, cwd=tmp_path, log=tmp_path / "log", call="json.tool:main"
            )
            codes.append(await process.wait())
        await server.close()
        return codes

    assert asyncio.run(run()) == [0, 2]
    assert json.loads((tmp_path / "out.json").read_text()) == {"b": 1}
    assert "missing.json" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("model_id", "architecture", "context"),
    [
        ("facebook/opt-13b", "OPTForCausalLM", 2048),
        ("meta-llama/Meta-Llama-3-8B", "LlamaForCausalLM", 8192),
        ("Qwen/Qwen3-8B", "Qwen3ForCausalLM", 40960),
        ("Qwen/Qwen3-0.6B", "Qwen3ForCausalLM", 40960),
    ],
)
def test_tiny_models_are_what_transformers_loads(
    tmp_path: Path, model_id: str, architecture: str, context: int
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = make_tiny(model_id, tmp_path / "a")
    other = make_tiny(model_id, tmp_path / "b")
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    written = (folder / "config.json").stat().st_mtime_ns
    assert make_tiny(model_id, folder) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == architecture
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.max_position_embeddings == context
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
    text = "What is the capital of France? Ünï-cødé ✓"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert "assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    answer = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :].tolist()
    assert len(answer) == 64  # no end of sequence on the way
    assert len(set(answer)) > 8  # nor the same token again and again
    assert model.config.tie_word_embeddings == (model_id in ("facebook/opt-13b", "Qwen/Qwen3-0.6B"))
    if architecture != "OPTForCausalLM":
        assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_tiny_models_of_other_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TinyModelError, match="no tiny model for 'Qwen/Qwen3-30B-A3B'"):
        make_tiny("Qwen/Qwen3-30B-A3B", tmp_path / "q")
    with pytest.raises(TinyModelError, match="not a multiple"):
        make_tiny("facebook/opt-13b", tmp_path / "o", hidden=30, heads=4)

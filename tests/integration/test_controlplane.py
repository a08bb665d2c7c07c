"""The local control plane against its own promises, on the real programs."""

from __future__ import annotations

import dataclasses
import os
import signal
import ssl
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.controlplane import (
    Binaries,
    CommandFailed,
    ComponentDied,
    ControlPlane,
    ControlPlaneError,
    FolderInUse,
    Prometheus,
    ToolchainError,
    ensure,
    supervised_popen,
    writes,
)
from e2e.controlplane.polling import wait_until
from e2e.controlplane.targets import COMPONENTS
from e2e.controlplane.web import get

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def binaries() -> Binaries:
    return ensure()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, binaries: Binaries) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("cluster"), binaries) as running:
        yield running


def processes_of(folder: Path) -> set[int]:
    """Every process that names the folder in its arguments or environment."""
    found = set()
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and any(
                str(folder).encode() in (process / part).read_bytes() for part in ("cmdline", "environ")
            ):
                found.add(int(process.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found - {os.getpid()}


def test_is_ready_when_start_returns(cluster: ControlPlane) -> None:
    cluster.check()
    assert cluster.kubectl("get", "--raw", "/readyz") == "ok"
    cluster.kubectl("get", "serviceaccount", "default")
    assert cluster.server.startswith("https://127.0.0.1:")


def test_kubectl_and_helm_read_the_servers_version(cluster: ControlPlane) -> None:
    assert "Server Version: v1." in cluster.kubectl("version")
    assert cluster.helm("list", "--all-namespaces", "--output", "json").strip() == "[]"


def test_rbac_denies_strangers(cluster: ControlPlane) -> None:
    stranger = str(cluster.user_kubeconfig("nobody", ["nothing"]))
    with pytest.raises(CommandFailed, match=r"nobody.*cannot list"):
        cluster.kubectl("--kubeconfig", stranger, "get", "pods")
    anonymous = ssl.create_default_context(cafile=cluster.ca_certificate)
    status, answer = get(f"{cluster.server}/api/v1/pods", context=anonymous)
    assert (status, b"system:anonymous" in answer) == (403, True)


def test_node_users_may_register_their_own_node_only(cluster: ControlPlane) -> None:
    node = str(cluster.user_kubeconfig("system:node:a", ["system:nodes"]))
    manifest = '{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "%s"}}'
    cluster.kubectl("--kubeconfig", node, "create", "-f", "-", input=manifest % "a")
    with pytest.raises(CommandFailed, match="not allowed to modify node"):
        cluster.kubectl("--kubeconfig", node, "create", "-f", "-", input=manifest % "b")
    cluster.kubectl("delete", "node", "a")


def test_audit_log_counts_writes_by_whom(cluster: ControlPlane) -> None:
    def mine() -> list[tuple[str, str, int]]:
        return [
            (write.verb, write.resource, write.code)
            for write in writes(cluster.audit_log)
            if write.user == "kubernetes-admin" and write.user_agent.startswith("kubectl/")
            and write.name == "counted"
        ]  # fmt: skip

    cluster.kubectl("create", "configmap", "counted")
    cluster.kubectl("get", "configmap", "counted")
    cluster.kubectl("delete", "configmap", "counted")
    assert mine() == [("create", "configmaps", 201), ("delete", "configmaps", 200)]


def test_two_side_by_side_know_nothing_of_each_other(
    cluster: ControlPlane, binaries: Binaries, tmp_path: Path
) -> None:
    with ControlPlane(tmp_path / "other", binaries) as other:
        assert other.server != cluster.server
        other.kubectl("create", "namespace", "only-here")
        assert "only-here" not in cluster.kubectl("get", "namespaces")
        with pytest.raises(FolderInUse):
            ControlPlane(tmp_path / "other", binaries).start()
        other.kubectl("get", "namespace", "only-here")
    assert processes_of(tmp_path) == set()


def test_a_strange_folder_is_left_alone(binaries: Binaries, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(FolderInUse, match="logs"):
        ControlPlane(tmp_path, binaries).start()
    assert (tmp_path / "logs").exists()


def test_a_component_that_dies_shows_the_end_of_its_log(binaries: Binaries, tmp_path: Path) -> None:
    broken = tmp_path / "etcd"
    broken.write_text("#!/bin/sh\necho cannot breathe >&2\nexit 3\n")
    broken.chmod(0o700)
    plane = ControlPlane(tmp_path / "run", dataclasses.replace(binaries, etcd=broken))
    with pytest.raises(ComponentDied, match="cannot breathe") as died:
        plane.start()
    assert (died.value.name, died.value.returncode) == ("etcd", 3)
    assert str(died.value.log) in str(died.value)
    assert processes_of(tmp_path) == set()


OWNER = """
    import os, sys, time
    from pathlib import Path
    from e2e.controlplane import ControlPlane, Prometheus, ensure, supervised_popen

    folder = Path(sys.argv[1])
    binaries = ensure()
    ControlPlane(folder / "cluster", binaries).start()
    Prometheus(folder / "prometheus", binaries, "{}").start()
    stubborn = "trap '' TERM; setsid sleep 1000 & sleep 1000"
    supervised_popen(binaries, ["/bin/sh", "-c", stubborn], env={"OF": str(folder)}, grace_s=0.5)
    owner = os.getpid()
    forked = os.fork()
    if forked == 0:  # a fork server: keeps our ends of all pipes open for longer than we live
        deadline = time.monotonic() + 60
        while not (folder / "let-go").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os._exit(0)
    print(forked, flush=True)
    time.sleep(1000)
"""


def test_nothing_outlives_a_killed_owner(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout is not None
        forked = {int(owner.stdout.readline())}
        # 4 components, Prometheus, the stubborn one: each with its supervisor; and two sleeps.
        wait_until(lambda: len(processes_of(tmp_path)) >= 2 + 2 * 6, "all processes up", timeout_s=20)
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        wait_until(lambda: processes_of(tmp_path) <= forked, "all processes gone", timeout_s=20)
    finally:
        owner.kill()
        (tmp_path / "let-go").touch()
    wait_until(lambda: not processes_of(tmp_path), "the forked one gone", timeout_s=10)
    owner.stdout.close()


@pytest.mark.parametrize(
    ("script", "returncode"), [("exit 7", 7), ("kill -TERM $$", 128 + 15), ("kill -KILL $$", 128 + 9)]
)
def test_a_supervised_command_gives_its_exit_code(binaries: Binaries, script: str, returncode: int) -> None:
    with supervised_popen(binaries, ["/bin/sh", "-c", script], env={}) as process:
        assert process.wait(5) == returncode


def test_a_command_that_is_not_there_says_so_in_the_log(binaries: Binaries, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with supervised_popen(binaries, [tmp_path / "nothing"], env={}, log=log) as process:
        assert process.wait(5) == 127
    assert "no such file" in log.read_text()


def test_stopping_takes_the_whole_group_and_what_left_it(binaries: Binaries, tmp_path: Path) -> None:
    script = "trap '' TERM; sleep 1000 & setsid sleep 1000 & wait; wait"
    process = supervised_popen(binaries, ["/bin/sh", "-c", script], env={"OF": str(tmp_path)}, grace_s=0.3)
    wait_until(lambda: len(processes_of(tmp_path)) == 4, "four processes", timeout_s=5)
    assert process.child_pid in processes_of(tmp_path)
    start_s = time.monotonic()
    assert process.stop() == 128 + 9
    assert 0.25 < time.monotonic() - start_s < 3
    assert processes_of(tmp_path) == set()


def test_kill_does_not_wait_for_the_grace_period(binaries: Binaries) -> None:
    with supervised_popen(
        binaries, ["/bin/sh", "-c", "trap '' TERM; sleep 1000"], env={}, grace_s=60
    ) as process:
        wait_until(lambda: process.child_pid is not None, "started", timeout_s=5)
        process.kill()
        assert process.wait(5) == 128 + 9


def test_prometheus_answers_and_reloads(binaries: Binaries, tmp_path: Path) -> None:
    folder = tmp_path / "prometheus"
    with Prometheus(folder, binaries, "{}", address="127.0.0.9") as prometheus:
        assert prometheus.query("1 + 1")[0]["value"][1] == "2"
        itself = f"[{{targets: ['127.0.0.9:{prometheus.port}']}}]"
        prometheus.reload(
            f"global: {{scrape_interval: 1s}}\nscrape_configs: [{{job_name: self, static_configs: {itself}}}]"
        )
        wait_until(
            lambda: [sample["value"][1] for sample in prometheus.query("up{job='self'}")] == ["1"],
            "it has scraped itself",
            timeout_s=10,
        )
        with pytest.raises(ControlPlaneError, match="refuses"):
            prometheus.query("sum(")
    assert processes_of(tmp_path) == set()


def test_prometheus_says_what_is_wrong_with_its_configuration(binaries: Binaries, tmp_path: Path) -> None:
    with pytest.raises(ComponentDied, match="not_a_field"):
        Prometheus(tmp_path, binaries, "not_a_field: 1").start()


def test_ready_binaries_are_used_as_they_are(
    binaries: Binaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in COMPONENTS:
        (tmp_path / name).symlink_to(getattr(binaries, name.replace("-", "_")))
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    assert ensure().kube_apiserver == tmp_path / "kube-apiserver"
    (tmp_path / "kube-apiserver").unlink()  # a kubectl and an etcd alone are no control plane
    assert ensure() == binaries


def test_missing_or_old_go_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match=r"^Go is missing: [^\n]+\.$"):
        ensure()
    old = tmp_path / "go"
    old.write_text("#!/bin/sh\necho go version go1.22.1 linux/amd64\n")
    old.chmod(0o700)
    with pytest.raises(ToolchainError, match=r"^Go is too old \(go1\.22\.1[^\n]+\.$"):
        ensure()

"""One running control plane."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from e2e.controlplane import audit
from e2e.controlplane.binaries import Binaries
from e2e.controlplane.components import (
    ADDRESS,
    Ports,
    apiserver_arguments,
    controller_manager_arguments,
    etcd_arguments,
    scheduler_arguments,
)
from e2e.controlplane.errors import CommandFailed, ComponentDied, ControlPlaneError, FolderInUse
from e2e.controlplane.kubeconfig import write_kubeconfig
from e2e.controlplane.pki import Pki
from e2e.controlplane.polling import wait_until
from e2e.controlplane.ports import ATTEMPTS, free_ports
from e2e.controlplane.progress import Progress, silent
from e2e.controlplane.supervised import Supervised, supervised_popen
from e2e.controlplane.web import get

READY_WITHIN_S = 60.0
"""Generous: ready means 3–5 s on two idle cores, and CI machines are not idle."""

SUBFOLDERS = ("etcd", "pki", "logs", "users", "home", "tmp")

ADMIN = ("kubernetes-admin", ("system:masters",))


class ControlPlane:
    """etcd, API server, controller manager and scheduler in one folder, on free loopback ports.

    All files are below ``folder``, which is emptied of an earlier run's when starting:
    ``kubeconfig`` (administrator), ``logs/NAME.log``, ``audit.jsonl``, ``pki/``, ``etcd/``, ``users/``,
    ``home/``, ``tmp/``.

    It has no nodes, no kubelet and no network: pods stay pending until somebody plays the node.
    """

    def __init__(self, folder: Path, binaries: Binaries, *, node_monitor_grace_period: str = "40s") -> None:
        self.folder = folder.absolute()
        self.binaries = binaries
        self.node_monitor_grace_period = node_monitor_grace_period
        self.kubeconfig = self.folder / "kubeconfig"
        self.audit_log = self.folder / "audit.jsonl"
        self.logs = self.folder / "logs"
        self._pki: Pki | None = None
        self._ports: Ports | None = None
        self._lock: int | None = None
        self._running: dict[str, Supervised] = {}
        self._commands: dict[str, tuple[Path, Sequence[str]]] = {}

    @property
    def server(self) -> str:
        """``https://127.0.0.1:PORT``."""
        if self._ports is None:
            raise ControlPlaneError(f"the control plane in {self.folder} has not been started")
        return self._ports.server

    @property
    def ca_certificate(self) -> Path:
        """Who signed the server's certificate, PEM."""
        return self.folder / "pki" / "ca.crt"

    @property
    def env(self) -> dict[str, str]:
        """Environment in which kubectl and helm reach this cluster and write nothing outside ``folder``."""
        home = self.folder / "home"
        return {
            "PATH": f"{self.binaries.kubectl.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "HOME": str(home),
            "TMPDIR": str(self.folder / "tmp"),
            "KUBECONFIG": str(self.kubeconfig),
            "KUBECACHEDIR": str(home / "kube"),
            "HELM_CACHE_HOME": str(home / "helm" / "cache"),
            "HELM_CONFIG_HOME": str(home / "helm" / "config"),
            "HELM_DATA_HOME": str(home / "helm" / "data"),
        }

    def start(self, progress: Progress = silent) -> Self:
        """Ready on return: ``/readyz`` says ok and namespace default has its service account.

        Raises ``ComponentDied`` with the end of the log, ``NotReady``, ``FolderInUse``; nothing is left
        running then.
        """
        self._lock = _lock(self.folder)
        try:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    self._start(progress)
                    return self
                except ComponentDied as died:
                    self._stop_components()
                    if not died.port_taken or attempt == ATTEMPTS:
                        raise
                    progress("a port was taken meanwhile: once more")
            raise AssertionError("unreachable")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop everything; harmless when nothing runs. Logs and audit log stay in ``folder``."""
        self._stop_components()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self) -> None:
        """Raise ``ComponentDied`` if a component has ended by itself."""
        for name, process in self._running.items():
            returncode = process.poll()
            if returncode is not None:
                raise ComponentDied(name, returncode, self.logs / f"{name}.log")

    def take_down(self, component: str) -> None:
        """SIGKILL to a component (`kube-apiserver`), as when its machine fails. `bring_up` starts it again."""
        process = self._running.pop(component)
        process.kill()
        process.wait()
        process.close()

    def bring_up(self, component: str) -> None:
        """Start what `take_down` ended; the API server answers on return. Raises as `start` does."""
        self._run(component, *self._commands[component])
        answers = self._api_client()
        self._wait(lambda: answers("/readyz"), "the API server is ready")

    def kubectl(self, *args: str, input: str | None = None) -> str:
        """What kubectl printed, as administrator; raises ``CommandFailed`` with what it complained."""
        return self._tool(self.binaries.kubectl, args, input)

    def helm(self, *args: str, input: str | None = None) -> str:
        """What helm printed, as administrator; raises ``CommandFailed``."""
        return self._tool(self.binaries.helm, args, input)

    def user_kubeconfig(self, user: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig for any user: ``system:node:gpu-0`` of ``system:nodes``, or a nobody."""
        if self._pki is None:
            raise ControlPlaneError(f"the control plane in {self.folder} has not been started")
        readable = re.sub(r"[^A-Za-z0-9.-]+", "-", user)
        name = f"{readable}-{hashlib.sha256(repr((user, tuple(groups))).encode()).hexdigest()[:8]}"
        users = self.folder / "users"
        users.mkdir(mode=0o700, exist_ok=True)
        return self._issue_kubeconfig(users / f"{name}.kubeconfig", f"user-{name}", user, groups)

    def __enter__(self) -> Self:
        return self if self._running else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Starting, in the order of the file.

    def _start(self, progress: Progress) -> None:
        self._prepare()
        self._pki = pki = Pki.create(self.folder / "pki", ADDRESS)
        self._ports = ports = Ports(*free_ports(3))
        self._issue_kubeconfig(self.kubeconfig, "admin", *ADMIN)
        for name in ("controller-manager", "scheduler"):
            self._issue_kubeconfig(
                self.folder / "pki" / f"{name}.kubeconfig", f"kube-{name}", f"system:kube-{name}", ()
            )
        binaries = self.binaries
        progress(f"starting the control plane at {ports.server}")
        self._run("etcd", binaries.etcd, etcd_arguments(self.folder, pki, ports))
        self._run("kube-apiserver", binaries.kube_apiserver, apiserver_arguments(self.folder, pki, ports))
        answers = self._api_client()
        self._wait(lambda: answers("/readyz"), "the API server is ready")
        self._run(
            "kube-controller-manager",
            binaries.kube_controller_manager,
            controller_manager_arguments(self.folder, pki, self.node_monitor_grace_period),
        )
        self._run("kube-scheduler", binaries.kube_scheduler, scheduler_arguments(self.folder))
        self._wait(
            lambda: answers("/api/v1/namespaces/default/serviceaccounts/default"),
            "namespace default has its service account",
        )
        progress("the control plane is ready")

    def _prepare(self) -> None:
        for name in SUBFOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(mode=0o700)
        self.audit_log.unlink(missing_ok=True)
        (self.folder / "audit-policy.json").write_text(json.dumps(audit.POLICY, indent=2))

    def _issue_kubeconfig(self, path: Path, name: str, user: str, groups: Sequence[str]) -> Path:
        assert self._pki is not None
        client = self._pki.authority.client(name, user, groups)
        return write_kubeconfig(
            path, server=self.server, authority=self.ca_certificate, user=user, client=client
        )

    def _run(self, name: str, binary: Path, arguments: Sequence[str]) -> None:
        environment = {"PATH": os.defpath, "HOME": self.env["HOME"], "TMPDIR": self.env["TMPDIR"]}
        self._commands[name] = binary, arguments
        self._running[name] = supervised_popen(
            self.binaries,
            [binary, *arguments],
            env=environment,
            log=self.logs / f"{name}.log",
            cwd=self.folder,
            # What it would still tidy up is thrown away.
            grace_s=3.0,
        )

    def _api_client(self) -> Callable[[str], bool]:
        context = ssl.create_default_context(cafile=self.ca_certificate)
        context.load_cert_chain(self.folder / "pki" / "admin.crt", self.folder / "pki" / "admin.key")
        return lambda path: get(self.server + path, context=context)[0] == 200

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        def met() -> bool:
            self.check()
            return condition()

        wait_until(met, what, timeout_s=READY_WITHIN_S)

    def _stop_components(self) -> None:
        # All at once, then wait for each: the data are of no further use.
        for process in self._running.values():
            process.terminate()
        for process in reversed(self._running.values()):
            process.stop()
        self._running.clear()

    def _tool(self, binary: Path, args: Sequence[str], input: str | None) -> str:
        return run_tool([str(binary), *args], self.env, input)


def run_tool(command: Sequence[str], env: Mapping[str, str], input: str | None = None) -> str:
    """Run a command-line tool to its end; what it printed. Raises ``CommandFailed`` with its stderr."""
    done = subprocess.run(command, env=env, input=input or "", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CommandFailed(command, done.returncode, done.stderr or done.stdout)
    return done.stdout


def _lock(folder: Path) -> int:
    """Make the folder ours until we die; refuse one whose contents are not an earlier run's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    strange = [name for name in SUBFOLDERS if (folder / name).exists()]
    if strange and not (folder / ".lock").exists():
        raise FolderInUse(f"{folder} holds {', '.join(strange)} of something else: give an empty folder")
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise FolderInUse(f"another control plane runs in {folder}") from None
    return lock

"""The whole local installation: control plane, simulated nodes, Prometheus, and the operator from its Helm chart.

    with Stack(folder, topology) as stack:
        stack.apply(Path("examples/chat.yaml"))
        stack.wait("chat", ready, timeout_s=60)

Everything is below `folder` and ends with this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from e2e.controlplane import Binaries, ControlPlane, Prometheus, ensure
from e2e.controlplane.polling import wait_until
from e2e.controlplane.ports import free_ports
from e2e.nodes import TOPOLOGIES, Nodes

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "disaggserve-system"
Json = dict[str, Any]
Progress = Callable[[str], None]


def _prometheus_config(kubeconfig: Path, scrape_s: int) -> str:
    """Every pod that asks to be scraped, found through the API server; pod addresses are what discovery gives."""
    annotation = "__meta_kubernetes_pod_annotation_prometheus_io_"
    return json.dumps(
        {
            "global": {"scrape_interval": f"{scrape_s}s", "scrape_timeout": f"{scrape_s}s"},
            "scrape_configs": [
                {
                    "job_name": "pods",
                    "kubernetes_sd_configs": [{"role": "pod", "kubeconfig_file": str(kubeconfig)}],
                    "relabel_configs": [
                        {"source_labels": [f"{annotation}scrape"], "regex": "true", "action": "keep"},
                        {
                            "source_labels": ["__meta_kubernetes_pod_phase"],
                            "regex": "Running",
                            "action": "keep",
                        },
                        {
                            "source_labels": ["__meta_kubernetes_pod_ip", f"{annotation}port"],
                            "separator": ":",
                            "target_label": "__address__",
                        },
                        {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
                        {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
                    ],
                }
            ],
        }
    )


class Stack:
    """One installation. `operator=False` leaves the chart out, for tests that run the operator themselves."""

    def __init__(
        self,
        folder: Path,
        topology: Path = TOPOLOGIES / "two-dgx.yaml",
        *,
        progress: Progress = lambda _: None,
        operator: bool = True,
        scrape_s: int = 2,
        node_monitor_grace_period: str = "40s",
        cold_start_s: float = 0.0,
        images: Mapping[str, Sequence[str]] | None = None,
        host_paths: Mapping[str, Path] | None = None,
    ) -> None:
        self.folder = folder.absolute()
        self._topology = topology
        self._progress = progress
        self._operator = operator
        self._scrape_s = scrape_s
        self._grace = node_monitor_grace_period
        self._cold_start_s = cold_start_s
        self._images, self._host_paths = images, host_paths
        self._open = ExitStack()
        self.binaries: Binaries
        self.plane: ControlPlane
        self.nodes: Nodes
        self.prometheus: Prometheus

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _start(self) -> None:
        say = self._progress
        self.binaries = ensure(say)
        say("starting etcd, API server, controller manager, scheduler")
        plane = ControlPlane(self.folder / "plane", self.binaries, node_monitor_grace_period=self._grace)
        self.plane = self._open.enter_context(plane)
        say("starting simulated nodes")
        nodes = Nodes(
            self.plane.kubeconfig,
            self._topology,
            self.folder / "nodes",
            cold_start_s=self._cold_start_s,
            preload=True,
            images=self._images,
            host_paths=self._host_paths,
        )
        self.nodes = self._open.enter_context(nodes)
        say("starting Prometheus")
        config = _prometheus_config(self.plane.kubeconfig, self._scrape_s)
        port = free_ports(1, "127.0.0.1")[0]
        prometheus = Prometheus(self.folder / "prometheus", self.binaries, config, port=port)
        self.prometheus = self._open.enter_context(prometheus)
        if self._operator:
            say(
                "installing the chart; the operator is ready when its simulator is compiled (the first time) and loaded"
            )
            self.install()

    def install(self, *more: str) -> None:
        """Installs or upgrades the chart, and waits until a search would begin at once: the first time, for a compiler."""
        self.plane.helm(
            *("upgrade", "--install", "disaggserve", str(ROOT / "charts/disaggserve")),
            *("--namespace", NAMESPACE, "--create-namespace", "--wait", "--timeout", "240s"),
            *("--set", f"prometheus.url={self.prometheus.url}", *more),
        )

    # ---- what tests and the demo ask

    def apply(self, manifest: Path | Json) -> None:
        if isinstance(manifest, Path):
            self.plane.kubectl("apply", "-f", str(manifest))
        else:
            self.plane.kubectl("apply", "-f", "-", input=json.dumps(manifest))

    def get(self, what: str, *selectors: str, namespace: str = "default") -> Any:
        """One object, or the items of a list."""
        found = json.loads(
            self.plane.kubectl("get", what, *selectors, "-n", namespace, "-o", "json", "--ignore-not-found")
            or "{}"
        )
        return found["items"] if found.get("kind") == "List" else found

    def resource(self, name: str) -> Json:
        found: Json = self.get(f"dsv/{name}")
        return found

    def pods(self, name: str, role: str | None = None) -> list[Json]:
        selector = f"disaggserve.dev/resource={name}" + (f",disaggserve.dev/role={role}" if role else "")
        found: list[Json] = self.get("pods", "-l", selector)
        return found

    def revisions(self, name: str) -> list[Json]:
        """Committed plans, oldest first."""
        found = self.get("controllerrevisions", "-l", f"disaggserve.dev/resource={name}")
        return sorted(found, key=lambda r: int(r["revision"]))

    def url(self, name: str) -> str:
        """The router's own address: there is no kube-proxy here, so services are names only."""
        ready = [p for p in self.pods(name, "router") if condition(p, "Ready") == "True"]
        return f"http://{ready[0]['status']['podIP']}:8000"

    def wait(self, name: str, what: str, holds: Callable[[Json], bool], *, timeout_s: float) -> Json:
        """Waits until the resource satisfies `holds`; it is the last word in the error when it never does."""
        last: Json = {}

        def ask() -> bool:
            nonlocal last
            last = self.resource(name)
            return holds(last)

        try:
            wait_until(ask, what, timeout_s=timeout_s, interval_s=0.25)
        except Exception as error:
            error.add_note(json.dumps(last.get("status", {}).get("conditions", []), indent=1))
            for log in self.folder.glob("nodes/logs/*disaggserve-operator*.log"):
                error.add_note("\n".join(log.read_text().splitlines()[-15:]))
            raise
        return last

    def crash(self, name: str, *, timeout_s: float) -> None:
        """SIGKILL to a pod's processes, and until it is Ready again."""
        self.nodes.crash(name)

        def again() -> bool:
            pod = self.get(f"pod/{name}")
            started = bool(pod["status"]["containerStatuses"][0]["restartCount"])
            return started and condition(pod, "Ready") == "True"

        wait_until(again, f"{name} to be Ready again", timeout_s=timeout_s)


def condition(obj: Json, kind: str) -> str:
    """The status of a condition; empty when there is none."""
    found = obj.get("status", {}).get("conditions", [])
    return next((str(c["status"]) for c in found if c["type"] == kind), "")


def carried_out(revision: int) -> Callable[[Json], bool]:
    """Whether a resource serves by this revision of its plan."""
    return lambda resource: ready(resource) and resource["status"]["plan"]["revision"] == revision


def ready(resource: Json) -> bool:
    """Serving, and nothing left to carry out."""
    status = resource.get("status", {})
    return (
        condition(resource, "Ready") == "True"
        and condition(resource, "Progressing") == "False"
        and status.get("observedGeneration") == resource["metadata"]["generation"]
    )

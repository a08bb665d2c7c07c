"""Simulated nodes as a child process of this one."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from e2e.nodes.errors import AgentError, OrderError

_CHECKOUT = Path(__file__).resolve().parents[2]
_STOP_WITHIN_S = 10.0
_TAIL_BYTES = 2000


class Nodes:
    """The nodes of one topology, Ready when started; they and all their pods' processes end with this process.

        with Nodes(cluster.kubeconfig, topology, folder) as nodes:
            nodes.fail("dgx-0")

    All files are below `folder`: `logs/NAMESPACE_POD_CONTAINER.log`, `agent.log`, `forkserver*.log`, `models/`.
    """

    def __init__(
        self,
        kubeconfig: Path,
        topology: Path,
        folder: Path,
        *,
        heartbeat_s: float = 2.0,
        cold_start_s: float = 0.0,
        preload: bool = False,
        images: Mapping[str, Sequence[str]] | None = None,
        host_paths: Mapping[str, Path] | None = None,
    ) -> None:
        """`heartbeat_s`: between lease renewals, well below the controller manager's grace period.
        `cold_start_s`: a paced worker's process starts so much later, as a real one would. `preload`: import
        torch for the workers' fork server now and not when the first worker comes. `images`: more stand-ins, image
        name → entry point. `host_paths`: what a hostPath volume may use, path on the node → folder here.
        """
        self.folder = folder.absolute()
        options = [
            *("--kubeconfig", kubeconfig, "--topology", topology, "--folder", self.folder),
            *("--heartbeat", heartbeat_s, "--cold-start", cold_start_s, "--owner", os.getpid()),
            *(["--preload"] if preload else []),
        ]
        for name, command in (images or {}).items():
            options += ["--image", f"{name}={shlex.join(str(part) for part in command)}"]
        for path, local in (host_paths or {}).items():
            options += ["--host-path", f"{path}={local}"]
        self._argv = [sys.executable, "-m", "e2e.nodes", *map(str, options)]
        self._popen: subprocess.Popen[str] | None = None
        self._asking = threading.Lock()
        self.names: tuple[str, ...] = ()

    def start(self) -> Self:
        """All nodes are registered and Ready on return. Raises AgentError with the end of the agent's log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, [str(_CHECKOUT), os.environ.get("PYTHONPATH")]))
        with self._log.open("a") as log:
            self._popen = subprocess.Popen(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                # Ctrl-C in the terminal is ours to handle: it stops the nodes in its own order.
                start_new_session=True,
            )
        try:
            self.names = tuple(self._read()["nodes"])
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the agent and all that it runs; nodes and pods stay in the API as they were."""
        if self._popen is None:
            return
        popen, self._popen = self._popen, None
        assert popen.stdin is not None
        assert popen.stdout is not None
        # An order that found nobody may still be in the buffer.
        with contextlib.suppress(BrokenPipeError):
            popen.stdin.close()
        try:
            popen.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
        popen.stdout.close()

    def check(self) -> None:
        """Raise AgentError, with the end of its log, if the agent has ended by itself."""
        if self._popen is not None and self._popen.poll() is not None:
            raise self._ended()

    def fail(self, node: str) -> None:
        """The node loses power: no heartbeats, its processes die, its pods' statuses stay as they were."""
        self._ask(do="fail", node=node)

    def recover(self, node: str) -> None:
        """A failed node is back; what is still bound to it starts anew."""
        self._ask(do="recover", node=node)

    def drain(self, node: str, timeout_s: float = 60.0) -> None:
        """Cordon, evict, and wait until the node's pods are gone. Raises OrderError at the deadline."""
        self._ask(do="drain", node=node, timeout_s=timeout_s)

    def uncordon(self, node: str) -> None:
        """Pods may be scheduled there again."""
        self._ask(do="uncordon", node=node)

    def crash(self, pod: str, namespace: str = "default", container: str | None = None) -> list[str]:
        """SIGKILL to a pod's processes, or to one container's; the names of the containers that were hit."""
        return list(self._ask(do="crash", pod=pod, namespace=namespace, container=container))

    def pods(self) -> list[dict[str, Any]]:
        """What lives here: `namespace`, `name`, `uid`, `node`, `address`, `processes` (container → pid)."""
        return list(self._ask(do="pods"))

    def log(self, pod: str, container: str, namespace: str = "default") -> Path:
        """Where a container's output goes, of all its runs and of all pods of that name."""
        return self.folder / "logs" / f"{namespace}_{pod}_{container}.log"

    @property
    def pid(self) -> int:
        """The agent's process id."""
        if self._popen is None:
            raise AgentError("the simulated nodes have not been started")
        return self._popen.pid

    @property
    def _log(self) -> Path:
        return self.folder / "agent.log"

    def _ask(self, **order: Any) -> Any:
        if self._popen is None:
            raise AgentError("the simulated nodes have not been started")
        assert self._popen.stdin is not None
        with self._asking:
            # Nobody there to read it: nobody answers either, and the answer tells why.
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.write(json.dumps(order) + "\n")
                self._popen.stdin.flush()
            answer = self._read()
        if "error" in answer:
            raise OrderError(answer["error"])
        return answer["answer"]

    def _read(self) -> dict[str, Any]:
        assert self._popen is not None
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> AgentError:
        tail = self._log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()
        return AgentError(f"the agent of the simulated nodes has ended; the end of {self._log}:\n{tail}")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

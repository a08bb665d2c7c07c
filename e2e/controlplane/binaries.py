"""Which programs are used: the user's own where they are ready and fit, else built here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from e2e.controlplane.build import build
from e2e.controlplane.progress import Progress, to_stderr
from e2e.controlplane.targets import COMPONENTS

SERVER = ("etcd", "kube-apiserver", "kubectl")
"""From one place or not at all: a kubectl of another release than its server must not be mixed in."""

TOOLS: dict[str, tuple[str, int]] = {
    "helm": ("version --short", 4),
    "prometheus": ("--version", 3),
    "promtool": ("--version", 3),
    "kubeconform": ("-v", 0),
    "helm-docs": ("--version", 1),
}
"""How each tool says its version, and the oldest major version that knows what we ask of it."""


@dataclass(frozen=True)
class Binaries:
    """Executable files. Those built by us lie in one folder, under these names with ``-`` for ``_``."""

    supervise: Path
    etcd: Path
    kube_apiserver: Path
    kube_controller_manager: Path
    kube_scheduler: Path
    kubectl: Path
    helm: Path
    prometheus: Path
    promtool: Path
    kubeconform: Path
    helm_docs: Path


def ensure(progress: Progress = to_stderr) -> Binaries:
    """All programs, built where they are not there yet (minutes the first time, then milliseconds).

    Taken as they are: etcd, kube-apiserver and kubectl together from the folder that ``KUBEBUILDER_ASSETS``
    names, or from the one where PATH finds a kube-apiserver, with kube-controller-manager and kube-scheduler
    where they lie there too; helm, prometheus, promtool, kubeconform and helm-docs from PATH.

    Raises ``ToolchainError``, ``BuildError``.
    """
    found = {**ready_components(), **ready_tools(progress)}
    missing = [name for name in (*COMPONENTS, *TOOLS) if name not in found]
    wanted = {"supervise", *("controlplane" if name in COMPONENTS else name for name in missing)}
    folder = build(sorted(wanted), progress)
    paths = {name: found.get(name, folder / name) for name in ("supervise", *COMPONENTS, *TOOLS)}
    return Binaries(**{name.replace("-", "_"): path for name, path in paths.items()})


def ready_components() -> dict[str, Path]:
    """The user's own control plane; empty when it is not whole."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    server = shutil.which("kube-apiserver")
    for folder in (Path(assets) if assets else None, Path(server).parent if server else None):
        if folder is not None and all(_executable(folder / name) for name in SERVER):
            return {name: (folder / name).absolute() for name in COMPONENTS if _executable(folder / name)}
    return {}


def ready_tools(progress: Progress) -> dict[str, Path]:
    """The user's own tools that run and are new enough."""
    found: dict[str, Path] = {}
    for name, (question, oldest) in TOOLS.items():
        path = shutil.which(name)
        if path is None:
            continue
        version = _major([path, *question.split()])
        if version is not None and version >= oldest:
            found[name] = Path(path).absolute()
        else:
            progress(f"{path} is too old or does not run: using our own {name}")
    return found


def _executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _major(command: Sequence[str]) -> int | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"v?(\d+)\.\d+\.\d+", done.stdout + done.stderr)
    return int(match[1]) if done.returncode == 0 and match else None

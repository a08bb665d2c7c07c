"""What is built from the Go module, and how. The versions are read from go.mod: they are said once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

MODULE = Path(__file__).parent

COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")


@dataclass(frozen=True)
class Target:
    """One ``go build``: a file in the cache folder, and names by which the same file is known as well."""

    name: str
    package: str
    flags: tuple[str, ...] = ()
    stamps: dict[str, str] = field(default_factory=dict)
    """Variables set by the linker, without which the program does not know its own version."""
    aliases: tuple[str, ...] = ()
    remark: str = ""
    """Said when the build begins."""

    def build_command(self, go: Path, output: Path) -> list[str]:
        linker = " ".join(
            ["-s", "-w", *(f"-X {variable}={value}" for variable, value in self.stamps.items())]
        )
        return [
            str(go),
            "build",
            "-v",
            "-trimpath",
            # Else go asks git, which refuses a checkout that another user owns.
            "-buildvcs=false",
            "-mod=readonly",
            *self.flags,
            f"-ldflags={linker}",
            "-o",
            str(output),
            self.package,
        ]


def targets() -> dict[str, Target]:
    """Every target by name, quickest first."""
    kubernetes = _version("k8s.io/kubernetes")
    major, minor = kubernetes.removeprefix("v").split(".")[:2]
    # Prometheus 3.16.0 is the Go module v0.316.0.
    release = re.fullmatch(r"v0\.(\d)(\d\d)\.(\d+)", _version("github.com/prometheus/prometheus"))
    assert release is not None
    prometheus = ("-tags=remove_all_sd,enable_kubernetes_sd",)
    prometheus_stamps = {
        "github.com/prometheus/common/version.Version": f"{release[1]}.{int(release[2])}.{release[3]}"
    }
    all_targets = (
        Target("supervise", "./supervise"),
        Target(
            "controlplane",
            ".",
            stamps={
                "k8s.io/component-base/version.gitVersion": kubernetes,
                "k8s.io/component-base/version.gitMajor": major,
                "k8s.io/component-base/version.gitMinor": minor,
                "k8s.io/client-go/pkg/version.gitVersion": kubernetes,
                "k8s.io/client-go/pkg/version.gitMajor": major,
                "k8s.io/client-go/pkg/version.gitMinor": minor,
            },
            aliases=COMPONENTS,
            remark=": some 2,700 packages, 5 to 10 minutes on two cores",
        ),
        Target(
            "helm",
            "helm.sh/helm/v4/cmd/helm",
            stamps={"helm.sh/helm/v4/internal/version.version": _version("helm.sh/helm/v4")},
        ),
        Target("kubeconform", "github.com/yannh/kubeconform/cmd/kubeconform"),
        Target("helm-docs", "github.com/norwoodj/helm-docs/cmd/helm-docs"),
        Target(
            "prometheus",
            "github.com/prometheus/prometheus/cmd/prometheus",
            flags=prometheus,
            stamps=prometheus_stamps,
        ),
        Target(
            "promtool",
            "github.com/prometheus/prometheus/cmd/promtool",
            flags=prometheus,
            stamps=prometheus_stamps,
        ),
    )
    return {target.name: target for target in all_targets}


def sources() -> list[Path]:
    """The files that decide what is built."""
    return sorted([MODULE / "go.mod", MODULE / "go.sum", *MODULE.glob("*.go"), *MODULE.glob("*/*.go")])


def _version(module: str) -> str:
    match = re.search(
        rf"^\s*(?:require )?{re.escape(module)} (v\S+)", (MODULE / "go.mod").read_text(), re.MULTILINE
    )
    if match is None:
        raise LookupError(f"go.mod does not require {module}")
    return match[1]

"""What each program of the control plane is told. Pure: paths and ports in, argument lists out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from e2e.controlplane.pki import Pki

ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class Ports:
    """The ports of one run. Controllers and scheduler listen on none."""

    etcd: int
    etcd_peer: int
    apiserver: int

    @property
    def server(self) -> str:
        return f"https://{ADDRESS}:{self.apiserver}"


def etcd_arguments(folder: Path, pki: Pki, ports: Ports) -> list[str]:
    """One member, TLS with client certificates, nothing synced: the data live as long as the run."""
    client = f"https://{ADDRESS}:{ports.etcd}"
    peer = f"https://{ADDRESS}:{ports.etcd_peer}"
    return [
        "--name=default",
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        f"--cert-file={pki.etcd.certificate}",
        f"--key-file={pki.etcd.key}",
        f"--trusted-ca-file={pki.etcd_authority}",
        "--client-cert-auth",
        f"--peer-cert-file={pki.etcd.certificate}",
        f"--peer-key-file={pki.etcd.key}",
        f"--peer-trusted-ca-file={pki.etcd_authority}",
        "--peer-client-cert-auth",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def apiserver_arguments(folder: Path, pki: Pki, ports: Ports) -> list[str]:
    """As kubeadm would start it, but for the loopback address and the missing endpoint reconciler
    (EndpointSlices refuse loopback addresses)."""
    return [
        f"--etcd-servers=https://{ADDRESS}:{ports.etcd}",
        f"--etcd-cafile={pki.etcd_authority}",
        f"--etcd-certfile={pki.etcd.certificate}",
        f"--etcd-keyfile={pki.etcd.key}",
        f"--bind-address={ADDRESS}",
        f"--advertise-address={ADDRESS}",
        f"--secure-port={ports.apiserver}",
        f"--cert-dir={folder / 'pki'}",
        f"--tls-cert-file={pki.serving.certificate}",
        f"--tls-private-key-file={pki.serving.key}",
        f"--client-ca-file={pki.authority.pair.certificate}",
        f"--kubelet-client-certificate={pki.kubelet_client.certificate}",
        f"--kubelet-client-key={pki.kubelet_client.key}",
        f"--kubelet-certificate-authority={pki.authority.pair.certificate}",
        "--kubelet-preferred-address-types=InternalIP",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--endpoint-reconciler-type=none",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki.service_account_public}",
        f"--service-account-signing-key-file={pki.service_account_key}",
        f"--requestheader-client-ca-file={pki.front_proxy_authority.certificate}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={pki.front_proxy.certificate}",
        f"--proxy-client-key-file={pki.front_proxy.key}",
        f"--audit-policy-file={folder / 'audit-policy.json'}",
        f"--audit-log-path={folder / 'audit.jsonl'}",
        # A write is in the log before its answer is sent, and the log is one file.
        "--audit-log-mode=blocking",
        "--audit-log-maxsize=4096",
        "--event-ttl=1h",
        "--profiling=false",
        "--v=0",
    ]


def controller_manager_arguments(folder: Path, pki: Pki, node_monitor_grace_period: str) -> list[str]:
    """Every default controller, with clients fast enough not to be what a small cluster waits for."""
    return [
        f"--kubeconfig={folder / 'pki' / 'controller-manager.kubeconfig'}",
        f"--root-ca-file={pki.authority.pair.certificate}",
        f"--service-account-private-key-file={pki.service_account_key}",
        f"--cluster-signing-cert-file={pki.authority.pair.certificate}",
        f"--cluster-signing-key-file={pki.authority.pair.key}",
        f"--cert-dir={folder / 'pki'}",
        "--use-service-account-credentials",
        "--leader-elect=false",
        "--secure-port=0",
        "--kube-api-qps=300",
        "--kube-api-burst=400",
        "--node-monitor-period=1s",
        f"--node-monitor-grace-period={node_monitor_grace_period}",
        "--profiling=false",
        "--v=0",
    ]


def scheduler_arguments(folder: Path) -> list[str]:
    return [
        f"--kubeconfig={folder / 'pki' / 'scheduler.kubeconfig'}",
        f"--cert-dir={folder / 'pki'}",
        "--leader-elect=false",
        "--secure-port=0",
        "--kube-api-qps=300",
        "--kube-api-burst=400",
        "--profiling=false",
        "--v=0",
    ]

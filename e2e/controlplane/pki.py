"""The keys and certificates of one control plane, made anew for each run.

Elliptic-curve keys: making the dozen of them takes milliseconds, where RSA would take seconds.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID_FOR = datetime.timedelta(days=30)


@dataclass(frozen=True)
class KeyPair:
    """Two PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """Signs certificates and files them, key beside certificate, readable by their owner only."""

    folder: Path
    name: str
    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey

    @property
    def pair(self) -> KeyPair:
        return KeyPair(self.folder / f"{self.name}.crt", self.folder / f"{self.name}.key")

    @classmethod
    def create(cls, folder: Path, name: str) -> Authority:
        """A self-signed authority in ``folder/name.crt`` and ``.key``."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(f"disaggserve-{name}", ())
        builder = (
            _builder(subject, subject, key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
        )
        authority = cls(folder, name, builder.sign(key, hashes.SHA256()), key)
        _file(authority.pair, authority.certificate, key)
        return authority

    def server(self, name: str, hosts: Sequence[str]) -> KeyPair:
        """A certificate for a server known by these names and addresses (it may be a client as well)."""
        names: list[x509.GeneralName] = []
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        return self._issue(name, _subject(name, ()), x509.SubjectAlternativeName(names))

    def client(self, name: str, user: str, groups: Sequence[str] = ()) -> KeyPair:
        """A certificate by which Kubernetes knows ``user`` of ``groups``; ``name`` names the files."""
        return self._issue(name, _subject(user, groups), None)

    def _issue(
        self, name: str, subject: x509.Name, alternatives: x509.SubjectAlternativeName | None
    ) -> KeyPair:
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            _builder(subject, self.certificate.subject, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.private_key.public_key()),
                critical=False,
            )
        )
        if alternatives is not None:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
            builder = builder.add_extension(alternatives, critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        pair = KeyPair(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        _file(pair, builder.sign(self.private_key, hashes.SHA256()), key)
        return pair


@dataclass(frozen=True)
class Pki:
    """All that the components need. The authority stays, to issue certificates for more users."""

    authority: Authority
    serving: KeyPair
    etcd: KeyPair
    """Serves etcd, and is the API server's client certificate there."""
    kubelet_client: KeyPair
    """With it the API server calls kubelets (logs, exec)."""
    front_proxy: KeyPair
    front_proxy_authority: KeyPair
    service_account_public: Path
    service_account_key: Path

    @classmethod
    def create(cls, folder: Path, address: str) -> Pki:
        """Fill ``folder`` (made with mode 0700) for servers at ``address``."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = Authority.create(folder, "ca")
        front = Authority.create(folder, "front-proxy-ca")
        # An authority of its own: else whoever has any client certificate of the cluster could read etcd.
        etcd = Authority.create(folder, "etcd-ca")
        key = ec.generate_private_key(ec.SECP256R1())
        public, private = folder / "service-account.pub", folder / "service-account.key"
        _write(public, _public_pem(key))
        _write(private, _private_pem(key))
        hosts = (
            address,
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        )
        return cls(
            authority=authority,
            serving=authority.server("kube-apiserver", hosts),
            etcd=etcd.server("etcd", (address, "localhost")),
            kubelet_client=authority.client(
                "kubelet-client", "kube-apiserver-kubelet-client", ["system:masters"]
            ),
            front_proxy=front.client("front-proxy", "front-proxy-client"),
            front_proxy_authority=front.pair,
            service_account_public=public,
            service_account_key=private,
        )

    @property
    def etcd_authority(self) -> Path:
        return self.authority.folder / "etcd-ca.crt"


def _subject(user: str, groups: Sequence[str]) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, user)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _file(pair: KeyPair, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    _write(pair.certificate, certificate.public_bytes(serialization.Encoding.PEM))
    _write(pair.key, _private_pem(key))


def _write(path: Path, content: bytes) -> None:
    """Never readable by others, not even for the moment between creating and chmod."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)

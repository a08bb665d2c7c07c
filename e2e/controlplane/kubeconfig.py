"""A kubeconfig that stands alone: certificates inside, no paths, so that it can be handed around."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

from e2e.controlplane.pki import KeyPair


def write_kubeconfig(path: Path, *, server: str, authority: Path, user: str, client: KeyPair) -> Path:
    """Written as JSON, which is YAML too; readable by its owner only; replaced at one stroke."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "disaggserve",
        "clusters": [
            {
                "name": "disaggserve",
                "cluster": {"server": server, "certificate-authority-data": _base64(authority)},
            }
        ],
        "users": [
            {
                "name": user,
                "user": {
                    "client-certificate-data": _base64(client.certificate),
                    "client-key-data": _base64(client.key),
                },
            }
        ],
        "contexts": [
            {
                "name": "disaggserve",
                "context": {"cluster": "disaggserve", "user": user, "namespace": "default"},
            }
        ],
    }
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(document, file, indent=2)
    temporary.rename(path)
    return path


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()

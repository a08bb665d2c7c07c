"""A pod's volumes as folders below its own root.

ConfigMaps, Secrets, projected sources and the downward API are written once, before the first container
starts (a kubelet would also carry later changes in). emptyDir lives as long as the pod. hostPath is what the
agent was told to map; the weights of a paced worker are an empty folder, since it never reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from e2e.nodes.environment import Facts, Mounts, Objects, expand
from e2e.nodes.errors import Refused

Json = dict[str, Any]

TOKEN_MOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where the API server's admission mounts the service account's token, unless the pod declines it."""

_REASON = "FailedMount"
_WEIGHTS = ("hostPath", "persistentVolumeClaim")


def token_requests(pod: Json) -> list[tuple[str, int]]:
    """(audience, seconds) of each service account token in the pod's volumes; "" is the server's own."""
    return [
        (
            source["serviceAccountToken"].get("audience", ""),
            source["serviceAccountToken"]["expirationSeconds"],
        )
        for volume in pod["spec"].get("volumes", [])
        for source in volume.get("projected", {}).get("sources", [])
        if "serviceAccountToken" in source
    ]


class Volumes:
    """The volumes of one pod, made in `root`."""

    def __init__(
        self,
        root: Path,
        facts: Facts,
        objects: Objects,
        tokens: Mapping[tuple[str, int], str],
        host_paths: Mapping[str, Path],
        weights_unread: bool,
    ) -> None:
        """`tokens` by (audience, seconds); `weights_unread`: the pod holds paced workers only."""
        self._root = root
        self._facts = facts
        self._objects = objects
        self._tokens = tokens
        self._host_paths = host_paths
        self._weights_unread = weights_unread

    def make(self) -> None:
        """Write everything. Raises Refused for what cannot be had, NotYet for what may still come."""
        for volume in self._facts.pod["spec"].get("volumes", []):
            self._make(volume)

    def mounts(self, container: Json, env: Mapping[str, str]) -> Mounts:
        """Where the container's mounts are. `env` is for subPathExpr."""
        if container.get("volumeDevices"):
            raise Refused("CreateContainerError", "simulated nodes have no block devices for volumeDevices")
        folders: dict[str, Path] = {}
        for mount in container.get("volumeMounts", []):
            folder = self._folder(mount["name"])
            below = mount.get("subPath") or expand(mount.get("subPathExpr", ""), env)
            if below:
                folder = folder / _inside(below)
                if not folder.exists():
                    folder.mkdir(parents=True)
            folders[mount["mountPath"]] = folder
        return Mounts(folders, self._root)

    def _folder(self, name: str) -> Path:
        for volume in self._facts.pod["spec"].get("volumes", []):
            if volume["name"] == name and "hostPath" in volume and not self._weights_unread:
                return self._host_path(name, volume["hostPath"]["path"])
        return self._root / name

    def _host_path(self, name: str, path: str) -> Path:
        for prefix in sorted(self._host_paths, key=len, reverse=True):
            if PurePosixPath(path).is_relative_to(prefix):
                return self._host_paths[prefix] / PurePosixPath(path).relative_to(prefix)
        raise Refused(
            _REASON,
            f"volume {name} wants the host path {path}; a simulated node maps only those it was told of",
        )

    def _make(self, volume: Json) -> None:
        folder = self._root / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        kind = next(key for key in volume if key != "name")
        if kind == "projected":
            for source in volume["projected"].get("sources", []):
                self._fill(folder, volume["name"], source)
        elif kind in ("configMap", "secret", "downwardAPI"):
            self._fill(folder, volume["name"], volume)
        elif kind == "emptyDir" or (kind in _WEIGHTS and self._weights_unread):
            pass
        elif kind == "hostPath":
            local, wanted = (
                self._host_path(volume["name"], volume["hostPath"]["path"]),
                volume["hostPath"].get("type"),
            )
            if wanted in ("DirectoryOrCreate", "", None):
                local.mkdir(parents=True, exist_ok=True)
            elif not local.exists():
                raise Refused(
                    _REASON, f"volume {volume['name']}: {volume['hostPath']['path']} is not a {wanted}"
                )
        else:
            raise Refused(
                _REASON, f"volume {volume['name']} is of kind {kind}, which simulated nodes do not have"
            )

    def _fill(self, folder: Path, volume: str, source: Json) -> None:
        if "configMap" in source:
            self._write_items(folder, "configMap", source["configMap"]["name"], source["configMap"])
        elif "secret" in source:
            name = source["secret"].get("secretName") or source["secret"]["name"]
            self._write_items(folder, "secret", name, source["secret"])
        elif "downwardAPI" in source:
            for item in source["downwardAPI"].get("items", []):
                if "fieldRef" in item:
                    text = self._facts.field(item["fieldRef"]["fieldPath"])
                else:
                    text = self._facts.resource(item["resourceFieldRef"], "")
                _write(folder / _inside(item["path"]), text.encode())
        elif "serviceAccountToken" in source:
            token = source["serviceAccountToken"]
            text = self._tokens[(token.get("audience", ""), token["expirationSeconds"])]
            _write(folder / _inside(token["path"]), text.encode())
        else:
            kinds = ", ".join(key for key in source if key != "name")
            raise Refused(_REASON, f"volume {volume} projects {kinds}, which simulated nodes do not have")

    def _write_items(self, folder: Path, kind: str, name: str, source: Json) -> None:
        optional = bool(source.get("optional"))
        if "items" in source:
            for item in source["items"]:
                value = self._objects.value(kind, name, item["key"], optional)
                if value is not None:
                    _write(folder / _inside(item["path"]), value)
        else:
            for key, value in self._objects.data(kind, name, optional).items():
                _write(folder / _inside(key), value)


def _inside(path: str) -> str:
    if path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise Refused(_REASON, f"the path {path!r} leads out of its volume")
    return path


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)

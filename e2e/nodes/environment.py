"""What a container sees as text: environment, `$(VAR)` expansion, downward API, and rewritten mount paths.

Pure: objects in, values out. Faults are Refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.nodes.errors import NotYet, Refused
from e2e.nodes.quantities import in_units

Json = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What the downward API can say of a pod beyond its own object."""

    pod: Json
    pod_ip: str
    host_ip: str
    allocatable: Mapping[str, str]
    """Of the node: the default of a limit that is not set."""

    def field(self, path: str) -> str:
        """The value of a fieldRef, as in env and downwardAPI volumes."""
        metadata, spec = self.pod["metadata"], self.pod["spec"]
        simple = {
            "metadata.name": metadata["name"],
            "metadata.namespace": metadata["namespace"],
            "metadata.uid": metadata["uid"],
            "metadata.labels": _lines(metadata.get("labels", {})),
            "metadata.annotations": _lines(metadata.get("annotations", {})),
            "spec.nodeName": spec.get("nodeName", ""),
            "spec.serviceAccountName": spec.get("serviceAccountName", ""),
            "status.hostIP": self.host_ip,
            "status.hostIPs": self.host_ip,
            "status.podIP": self.pod_ip,
            "status.podIPs": self.pod_ip,
        }
        if path in simple:
            return str(simple[path])
        keyed = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
        if keyed:
            return str(metadata.get(keyed[1], {}).get(keyed[2], ""))
        raise Refused("CreateContainerConfigError", f"fieldRef {path!r} is no field of the downward API")

    def resource(self, reference: Mapping[str, str], container: str) -> str:
        """The value of a resourceFieldRef; `container` is the default of its containerName."""
        name = reference.get("containerName", container)
        spec = self.pod["spec"]
        for candidate in [*spec["containers"], *spec.get("initContainers", [])]:
            if candidate["name"] == name:
                kind, _, resource = reference["resource"].partition(".")
                resources = candidate.get("resources", {})
                amount = resources.get(kind, {}).get(resource)
                if amount is None:
                    amount = self.allocatable.get(resource, "0") if kind == "limits" else "0"
                return in_units(amount, str(reference.get("divisor", "1")))
        raise Refused(
            "CreateContainerConfigError", f"resourceFieldRef names container {name!r}, which is not there"
        )


def _lines(items: Mapping[str, str]) -> str:
    """Labels as a downwardAPI file holds them: sorted, quoted, one a line."""
    return "\n".join(f'{key}="{_escaped(value)}"' for key, value in sorted(items.items()))


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Objects:
    """The ConfigMaps and Secrets that a pod needs, read beforehand: (kind, name) → values, None if not there."""

    def __init__(self, found: Mapping[tuple[str, str], Mapping[str, bytes] | None]) -> None:
        self._found = found

    def data(self, kind: str, name: str, optional: bool) -> Mapping[str, bytes]:
        """All values; empty when it is not there but optional, else NotYet."""
        found = self._found[(kind, name)]
        if found is None and not optional:
            raise NotYet("CreateContainerConfigError", f"{kind} {name!r} not found")
        return found or {}

    def value(self, kind: str, name: str, key: str, optional: bool) -> bytes | None:
        data = self.data(kind, name, optional)
        if key not in data and not optional:
            raise NotYet("CreateContainerConfigError", f"couldn't find key {key!r} in {kind} {name!r}")
        return data.get(key)


def needed_objects(pod: Json) -> set[tuple[str, str]]:
    """(kind, name) of every ConfigMap and Secret that the pod's environment and volumes refer to."""
    needed: set[tuple[str, str]] = set()
    spec = pod["spec"]
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        for source in container.get("envFrom", []):
            needed |= {(kind, source[f"{kind}Ref"]["name"]) for kind in _KINDS if f"{kind}Ref" in source}
        for entry in container.get("env", []):
            source = entry.get("valueFrom", {})
            needed |= {
                (kind, source[f"{kind}KeyRef"]["name"]) for kind in _KINDS if f"{kind}KeyRef" in source
            }
    for volume in spec.get("volumes", []):
        for source in [volume, *volume.get("projected", {}).get("sources", [])]:
            if "configMap" in source:
                needed.add(("configMap", source["configMap"]["name"]))
            if "secret" in source:
                needed.add(("secret", source["secret"].get("secretName") or source["secret"]["name"]))
    return needed


_KINDS = ("configMap", "secret")


def container_env(container: Json, facts: Facts, objects: Objects, base: Mapping[str, str]) -> dict[str, str]:
    """`base` (the image's), then envFrom, then env, in the order and with the expansion of Kubernetes."""
    env = dict(base)
    for source in container.get("envFrom", []):
        for kind in _KINDS:
            if f"{kind}Ref" in source:
                reference = source[f"{kind}Ref"]
                data = objects.data(kind, reference["name"], bool(reference.get("optional")))
                env |= {source.get("prefix", "") + key: _text(value) for key, value in data.items()}
    for entry in container.get("env", []):
        if "valueFrom" in entry:
            value = _from(entry["name"], entry["valueFrom"], container["name"], facts, objects)
            if value is not None:
                env[entry["name"]] = value
        else:
            env[entry["name"]] = expand(entry.get("value", ""), env)
    return env


def _from(name: str, source: Json, container: str, facts: Facts, objects: Objects) -> str | None:
    if "fieldRef" in source:
        return facts.field(source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        return facts.resource(source["resourceFieldRef"], container)
    for kind in _KINDS:
        if f"{kind}KeyRef" in source:
            reference = source[f"{kind}KeyRef"]
            value = objects.value(kind, reference["name"], reference["key"], bool(reference.get("optional")))
            return None if value is None else _text(value)
    raise Refused(
        "CreateContainerConfigError",
        f"the environment variable {name} comes from {', '.join(source)}, which simulated nodes do not have",
    )


def _text(value: bytes) -> str:
    return value.decode(errors="surrogateescape")


def expand(text: str, env: Mapping[str, str]) -> str:
    """`$(NAME)` by its value, `$$` by `$`; what is not defined stays as it is."""

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return env.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, text)


class Mounts:
    """Container paths and the local folders or files that stand for them."""

    def __init__(self, folders: Mapping[str, Path], root: Path) -> None:
        """`root`: the pod's own folder; a path that is in there already stays as it is."""
        self._root = str(root)
        self._folders = {path.rstrip("/"): folder for path, folder in folders.items()}
        if "" in self._folders:
            raise Refused(
                "CreateContainerError", "a volume is mounted at /, which a simulated node cannot do"
            )
        longest_first = sorted(self._folders, key=len, reverse=True)
        paths = "|".join(re.escape(path) for path in longest_first)
        # A whole path, not a part of another one or of a URL.
        self._pattern = re.compile(rf"(?<![\w./~-])({paths})(?![\w.-])") if paths else None

    def rewrite(self, text: str) -> str:
        """`text` with each mount path in it replaced by its local folder."""
        if self._pattern is None:
            return text

        def local(match: re.Match[str]) -> str:
            if text.startswith(self._root, match.start()):
                return match[0]
            return str(self._folders[match[1]])

        return self._pattern.sub(local, text)

    def working_directory(self, path: str) -> Path:
        """A container's workingDir. Raises Refused when it lies in no mount."""
        local = self.rewrite(path.rstrip("/"))
        if local == path.rstrip("/"):
            raise Refused(
                "CreateContainerError",
                f"workingDir {path} lies in no mount; a simulated node has no image's file system",
            )
        return Path(local)

    def get(self, path: str) -> Path | None:
        """The local folder of a mount path, if there is such a mount."""
        return self._folders.get(path.rstrip("/"))

"""What one pod's processes find around them: volumes, environment, credentials, and the commands themselves."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e.nodes import images
from e2e.nodes.environment import Facts, Mounts, Objects, container_env, expand, needed_objects
from e2e.nodes.errors import ApiError, NotYet, Refused
from e2e.nodes.host import Host, Place
from e2e.nodes.processes import Process
from e2e.nodes.volumes import TOKEN_MOUNT, Volumes, token_requests

Json = dict[str, Any]


class Surroundings:
    """Made for a pod in `root`, `mount` first, then `start` and `execute` as often as needed."""

    def __init__(self, host: Host, place: Place, pod: Json, address: str, root: Path) -> None:
        self._host = host
        self._place = place
        self.pod = pod
        """The newest object of the pod."""
        self._address = address
        self._root = root
        self._namespace: str = pod["metadata"]["namespace"]
        self._name: str = pod["metadata"]["name"]
        self._uid: str = pod["metadata"]["uid"]
        self._volumes: Volumes | None = None
        self._made: dict[str, tuple[dict[str, str], Mounts]] = {}
        """Environment, before its paths are rewritten, and mounts of each container that has started."""

    async def mount(self) -> None:
        """Make the volumes. Raises Refused for what a simulated node cannot do, NotYet for what may still come."""
        _refuse_features(self.pod)
        spec = self.pod["spec"]
        tokens = {request: await self._token(*request) for request in token_requests(self.pod)}
        weights_unread = all(
            images.is_paced(self._host.images, container) for container in spec["containers"]
        )
        self._volumes = Volumes(
            self._root / "volumes",
            self._facts(),
            await self._objects(),
            tokens,
            self._host.host_paths,
            weights_unread,
        )
        try:
            self._volumes.make()
        except OSError as error:
            raise Refused("FailedMount", f"the volumes cannot be made: {error}") from error

    async def start(self, container: Json) -> Process:
        """Start the container's own command. Raises Refused, NotYet."""
        try:
            return await self._start(container)
        except OSError as error:
            raise Refused("CreateContainerError", f"its files cannot be made: {error}") from error

    async def _start(self, container: Json) -> Process:
        image = images.find(self._host.images, container["image"])
        env, mounts = self._made[container["name"]] = await self._compose(container)
        argv = [*(container.get("command") or image.entrypoint), *container.get("args", [])]
        command = images.localise(image, [mounts.rewrite(expand(argument, env)) for argument in argv])
        local, server = command.argv, self._host.plain
        if command.paced:
            model = images.model_of(local)
            local = images.paced(local, self._place.node, await self._host.tiny(model))
            await asyncio.sleep(self._host.cold_start_s)
        if command.call is not None:
            server = await self._host.workers()
        return await server.spawn(
            local,
            env=self._localised(container, env, mounts),
            cwd=self._working_directory(container, mounts),
            log=self.log(container["name"]),
            nice=command.nice,
            call=command.call,
        )

    def log(self, container: str) -> Path:
        return self._host.log(self._namespace, self._name, container)

    async def execute(self, container: Json, command: Sequence[str], quiet: bool) -> Process:
        """Start another command beside it, for a hook (output in the container's log) or, `quiet`, a probe."""
        image = images.find(self._host.images, container["image"])
        env, mounts = self._made[container["name"]]
        local = images.localise(image, [mounts.rewrite(argument) for argument in command], fork=False)
        return await self._host.plain.spawn(
            local.argv,
            env=self._localised(container, env, mounts),
            cwd=self._working_directory(container, mounts),
            log=Path(os.devnull) if quiet else self.log(container["name"]),
            nice=local.nice,
        )

    async def _compose(self, container: Json) -> tuple[dict[str, str], Mounts]:
        """The container's environment and mounts. Raises Refused, NotYet."""
        assert self._volumes is not None
        home = self._home(container)
        for folder in (home, home / "tmp"):
            folder.mkdir(parents=True, exist_ok=True)
        base = self._base(container)
        mounts = self._volumes.mounts(container, base)
        token = mounts.get(TOKEN_MOUNT)
        if token is not None and (token / "token").exists():
            base["KUBECONFIG"] = str(self._kubeconfig(token))
        return container_env(container, self._facts(), await self._objects(), base), mounts

    def _base(self, container: Json) -> dict[str, str]:
        """What an image's own environment would be."""
        home = self._home(container)
        return {
            "PATH": f"{Path(images.PYTHON).parent}:{os.defpath}",
            "HOME": str(home),
            "TMPDIR": str(home / "tmp"),
            "HOSTNAME": self._name,
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            # Our images bring their simulator compiled; here the user's own cache is where it is.
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
        }

    def _localised(self, container: Json, env: Mapping[str, str], mounts: Mounts) -> dict[str, str]:
        """The environment with mount paths rewritten, but for what is local already."""
        local = self._base(container) | {"KUBECONFIG": str(self._root / "kubeconfig")}
        return {
            name: value if local.get(name) == value else mounts.rewrite(value) for name, value in env.items()
        }

    def _home(self, container: Json) -> Path:
        return self._root / "containers" / str(container["name"])

    def _working_directory(self, container: Json, mounts: Mounts) -> Path:
        if container.get("workingDir"):
            return mounts.working_directory(container["workingDir"])
        return self._home(container)

    def _kubeconfig(self, token: Path) -> Path:
        """A kubeconfig with the pod's own token, for what cannot look under /var/run/secrets."""
        path = self._root / "kubeconfig"
        if path.exists():
            return path
        api = self._host.api
        name = "in-cluster"
        authority = base64.b64encode(api.authority).decode()
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "clusters": [
                {"name": name, "cluster": {"server": api.server, "certificate-authority-data": authority}}
            ],
            "users": [{"name": name, "user": {"token": (token / "token").read_text()}}],
            "contexts": [
                {"name": name, "context": {"cluster": name, "user": name, "namespace": self._namespace}}
            ],
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(document))
        return path

    def _facts(self) -> Facts:
        return Facts(self.pod, self._address, self._place.address, self._place.node.resources())

    async def _token(self, audience: str, seconds: int) -> str:
        """A token of the pod's service account, bound to the pod. With the usual 3607 s the API server makes
        it live for a year, so it is not renewed."""
        account = self.pod["spec"].get("serviceAccountName", "default")
        spec: Json = {
            "audiences": [audience] if audience else [],
            "expirationSeconds": seconds,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": self._name, "uid": self._uid},
        }
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"/api/v1/namespaces/{self._namespace}/serviceaccounts/{account}/token"
        try:
            answer = await self._host.api.insist(
                lambda: self._host.api.post(path, request), f"token of {account}"
            )
        except ApiError as error:
            raise NotYet("FailedMount", f"no token for service account {account}: {error}") from error
        token: str = answer["status"]["token"]
        return token

    async def _objects(self) -> Objects:
        found: dict[tuple[str, str], Mapping[str, bytes] | None] = {}
        for kind, name in needed_objects(self.pod):
            path = f"/api/v1/namespaces/{self._namespace}/{kind.lower()}s/{name}"
            try:
                answer = await self._host.api.insist(lambda path=path: self._host.api.get(path), path)  # type: ignore[misc]
            except ApiError as error:
                if error.status != 404:
                    raise NotYet("CreateContainerConfigError", str(error)) from error
                found[(kind, name)] = None
                continue
            binary = answer.get("data", {}) if kind == "secret" else answer.get("binaryData", {})
            plain = {} if kind == "secret" else answer.get("data", {})
            found[(kind, name)] = {
                **{key: value.encode() for key, value in (plain or {}).items()},
                **{key: base64.b64decode(value) for key, value in (binary or {}).items()},
            }
        return Objects(found)


def _refuse_features(pod: Json) -> None:
    """What would be silently different here is refused."""
    spec = pod["spec"]
    for key in ("hostNetwork", "hostPID", "hostIPC", "activeDeadlineSeconds"):
        if spec.get(key):
            raise Refused("CreateContainerError", f"spec.{key} is not supported on simulated nodes")
    for container in spec.get("initContainers", []):
        if container.get("restartPolicy"):
            raise Refused(
                "CreateContainerError",
                f"init container {container['name']} has a restartPolicy; simulated nodes run no such sidecars",
            )
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "grpc" in container.get(kind, {}):
                raise Refused(
                    "CreateContainerError", f"{kind} of {container['name']} is grpc, which is not supported"
                )
        if any(port.get("hostPort") for port in container.get("ports", [])):
            raise Refused(
                "CreateContainerError", f"container {container['name']} asks for a hostPort; pods have IPs"
            )

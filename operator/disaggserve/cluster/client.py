"""The API server, in seven verbs over plain JSON values.

`kubernetes.aio` does authentication, TLS, serialization and errors; paths are explicit, so nothing is discovered. Every
write passes the fence first: a process that may have lost its lease exits instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
from kubernetes.aio import client as k8s
from kubernetes.aio import config
from kubernetes.aio.client.rest import ApiException
from kubernetes.aio.dynamic import DynamicClient
from kubernetes.aio.dynamic.exceptions import DynamicApiError

from disaggserve.api.errors import DisaggServeError
from disaggserve.cluster import settings

MANAGER = "disaggserve"
Json = dict[str, Any]


class ApiError(DisaggServeError):
    """The API server said no. `status` is HTTP's; 0 when it could not be reached."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(status, message)

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class Kind:
    """Where objects of a kind live: `group_version` is `v1` or `apps/v1`."""

    group_version: str
    plural: str
    namespaced: bool = True

    def path(
        self, namespace: str | None = None, name: str | None = None, subresource: str | None = None
    ) -> str:
        parts = ["api" if "/" not in self.group_version else "apis", self.group_version]
        if namespace and self.namespaced:
            parts += ["namespaces", namespace]
        parts += [p for p in (self.plural, name, subresource) if p]
        return "/" + "/".join(parts)


NODES = Kind("v1", "nodes", namespaced=False)
PODS = Kind("v1", "pods")
EVENTS = Kind("events.k8s.io/v1", "events")
REVISIONS = Kind("apps/v1", "controllerrevisions")
RESOURCES = Kind("disaggserve.dev/v1alpha1", "disaggserves")
KINDS = {
    "ServiceAccount": Kind("v1", "serviceaccounts"),
    "Service": Kind("v1", "services"),
    "RoleBinding": Kind("rbac.authorization.k8s.io/v1", "rolebindings"),
    "NetworkPolicy": Kind("networking.k8s.io/v1", "networkpolicies"),
    "Deployment": Kind("apps/v1", "deployments"),
    "PodDisruptionBudget": Kind("policy/v1", "poddisruptionbudgets"),
}


def _message(error: ApiException | DynamicApiError) -> str:
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or "")
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body[:500] or str(error.reason)


class Cluster:
    """One connection. `fence` is called before every write and does not return when the lease may be lost."""

    def __init__(self, api: k8s.ApiClient, fence: Callable[[], None] = lambda: None) -> None:
        self._api = api
        self._dynamic = DynamicClient(api)
        self._fence = fence

    async def _request(self, method: str, path: str, body: Any = None, **params: Any) -> Json:
        if method != "get":
            self._fence()
        try:
            response = await self._dynamic.request(
                method, path, body=body, serialize=False, _request_timeout=30, **params
            )
            return cast(Json, await response.json())
        except (ApiException, DynamicApiError) as error:
            raise ApiError(int(error.status or 0), _message(error)) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, f"the API server cannot be reached: {error}") from error

    def may_write(self) -> None:
        """The same fence for a write that does not go to the API server."""
        self._fence()

    async def close(self) -> None:
        await self._api.close()

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Json | None:
        """The object, or None when there is none."""
        try:
            return await self._request("get", kind.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(
        self,
        kind: Kind,
        namespace: str | None = None,
        *,
        labels: str | None = None,
        fields: str | None = None,
    ) -> list[Json]:
        answer = await self._request(
            "get", kind.path(namespace), label_selector=labels, field_selector=fields
        )
        return cast(list[Json], answer["items"])

    async def create(self, kind: Kind, body: Json) -> bool:
        """True when created, False when it was there already."""
        try:
            await self._request("post", kind.path(body["metadata"]["namespace"]), body, field_manager=MANAGER)
        except ApiError as error:
            if error.status == 409:
                return False
            raise
        return True

    async def apply(self, kind: Kind, body: Json) -> None:
        """Server-side apply with our one field manager."""
        metadata = body["metadata"]
        await self._request(
            "patch",
            kind.path(metadata["namespace"], metadata["name"]),
            body,
            content_type="application/apply-patch+yaml",
            field_manager=MANAGER,
            force_conflicts="true",
        )

    async def merge(
        self, kind: Kind, namespace: str, name: str, body: Json, subresource: str | None = None
    ) -> None:
        """A merge patch; one that names `metadata.uid` fails with 409 when the object is another by now."""
        await self._request(
            "patch",
            kind.path(namespace, name, subresource),
            body,
            content_type="application/merge-patch+json",
            field_manager=MANAGER,
        )

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str) -> None:
        """Deletes this very object and no successor of the same name; gone already is right as well."""
        try:
            await self._request("delete", kind.path(namespace, name), {"preconditions": {"uid": uid}})
        except ApiError as error:
            if error.status not in (404, 409):
                raise


async def connect(kubeconfig: str | None = None) -> k8s.ApiClient:
    """The kubeconfig given, then KUBECONFIG, then the pod's service account."""
    configuration = k8s.Configuration()
    chosen = kubeconfig or settings.kubeconfig()
    if chosen:
        await config.load_kube_config(config_file=chosen, client_configuration=configuration)
    else:
        config.load_incluster_config(client_configuration=configuration)
    return k8s.ApiClient(configuration)


def condition(conditions: list[Json], kind: str) -> Mapping[str, Any]:
    """One condition of a Kubernetes object, empty when it has none."""
    return next((c for c in conditions if c["type"] == kind), {})

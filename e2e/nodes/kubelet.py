"""The one thing that others ask of a kubelet here: a container's log, for `kubectl logs`.

The API server calls the node's address and checks its certificate, so one is requested from the cluster, as a
kubelet with `serverTLSBootstrap` does, and approved by us. All nodes share it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import ssl
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from e2e.nodes.api import Api
from e2e.nodes.errors import AgentError
from e2e.nodes.pod import Pod

PORT = 10250

_REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
_SIGNED_WITHIN_S = 30.0
_POLL_S = 0.25
_CHUNK_BYTES = 1 << 16
_NOT_HERE = ("sinceSeconds", "sinceTime", "timestamps")

FindPod = Callable[[str, str], Pod | None]
"""(namespace, name) → the pod, if it lives here."""


async def serve_logs(api: Api, addresses: Mapping[str, str], find: FindPod) -> None:
    """Answer for every node (name → address) until cancelled. Raises AgentError, ApiError, OSError."""
    tls = await _server_tls(api, addresses)
    application = web.Application()
    application.router.add_get("/containerLogs/{namespace}/{pod}/{container}", lambda ask: _answer(ask, find))
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.0)
    await runner.setup()
    try:
        for address in addresses.values():
            await web.TCPSite(runner, address, PORT, ssl_context=tls).start()
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def _answer(request: web.Request, find: FindPod) -> web.StreamResponse:
    certificate = request.transport.get_extra_info("peercert") if request.transport else None
    subject = [field for part in (certificate or {}).get("subject", ()) for field in part]
    if ("organizationName", "system:masters") not in subject:
        raise web.HTTPForbidden(text="only the API server may ask")
    names, query = request.match_info, request.query
    pod = find(names["namespace"], names["pod"])
    container = pod.container(names["container"]) if pod is not None else None
    if pod is None or container is None:
        raise web.HTTPNotFound(text=f"no container {names['container']} of pod {names['pod']} lives here")
    for option in _NOT_HERE:
        if query.get(option, "false") != "false":
            raise web.HTTPBadRequest(
                text=f"simulated nodes keep no times with their logs: {option} is not supported"
            )
    start, end = container.log_span(previous=query.get("previous") == "true")
    answer = web.StreamResponse(headers={"Content-Type": "text/plain"})
    await answer.prepare(request)
    left = int(query["limitBytes"]) if "limitBytes" in query else None
    path = pod.log(names["container"])
    position = _tail(path, start, end, int(query["tailLines"])) if "tailLines" in query else start
    follow = query.get("follow") == "true" and end is None
    run = container.log_span(previous=False)[0]
    # A container that was refused has no log yet.
    with contextlib.suppress(ConnectionError, FileNotFoundError), path.open("rb") as file:
        file.seek(position)
        while left is None or left > 0:
            # Asked before reading: what is written before the end is read after it.
            ended = not (container.running and container.log_span(previous=False)[0] == run)
            bounds = [_CHUNK_BYTES, *([left] if left is not None else [])]
            bounds += [end - file.tell()] if end is not None else []
            chunk = file.read(min(bounds))
            if chunk:
                left = None if left is None else left - len(chunk)
                await answer.write(chunk)
            elif not follow or ended:
                break
            else:
                await asyncio.sleep(_POLL_S)
    await answer.write_eof()
    return answer


def _tail(path: Path, start: int, end: int | None, lines: int) -> int:
    """Where the last lines of a part of a file begin."""
    if not path.exists():
        return start
    with path.open("rb") as file:
        file.seek(start)
        content = file.read() if end is None else file.read(end - start)
    rows = content.splitlines(keepends=True)
    return start + sum(len(row) for row in rows[: max(0, len(rows) - lines)])


async def _server_tls(api: Api, addresses: Mapping[str, str]) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    user = f"system:node:{next(iter(addresses))}"
    subject = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:nodes"),
        x509.NameAttribute(NameOID.COMMON_NAME, user),
    ]
    names = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses.values()]
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name(subject))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    body = {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"generateName": "simulated-nodes-"},
        "spec": {
            "request": base64.b64encode(request.public_bytes(serialization.Encoding.PEM)).decode(),
            "signerName": "kubernetes.io/kubelet-serving",
            "usages": ["digital signature", "server auth"],
        },
    }
    made = await api.post(_REQUESTS, body, impersonate=(user, "system:nodes"))
    path = f"{_REQUESTS}/{made['metadata']['name']}"
    approval = {
        "type": "Approved",
        "status": "True",
        "reason": "SimulatedNode",
        "message": "asked for by its agent",
    }
    made["status"] = {"conditions": [approval]}
    await api.put(f"{path}/approval", made)
    signed = ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SIGNED_WITHIN_S):
            while not (signed := (await api.get(path)).get("status", {}).get("certificate", "")):
                await asyncio.sleep(_POLL_S)
    await api.delete(path)
    if not signed:
        raise AgentError(f"the cluster did not sign a serving certificate within {_SIGNED_WITHIN_S:g} s")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=api.authority.decode())
    with tempfile.NamedTemporaryFile(suffix=".pem") as pem:
        pem.write(base64.b64decode(signed))
        pem.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        pem.flush()
        context.load_cert_chain(pem.name)
    return context

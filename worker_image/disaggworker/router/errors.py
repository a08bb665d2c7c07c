"""Every error that a client of the router can meet, in OpenAI's shape.

ApiError                 400 unless said otherwise
├── WrongRequest         400: the body is at fault; `param` names the field
├── UnknownModel         404 `model_not_found`
├── TooLarge             413
├── QueueFull            429 with Retry-After
├── NoInstance           503 with Retry-After: nothing that can serve came up in time
└── InstanceFailed       502: instances died under the request more often than it is tried again
Passed                   what an instance itself answered with 4xx, passed on as it is
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from disaggworker.errors import brief


class ApiError(Exception):
    """One clear sentence for the client."""

    status = 400
    kind = "invalid_request_error"
    code: str | None = None
    retry_after_s: int | None = None

    def __init__(self, message: str, param: str | None = None) -> None:
        self.message, self.param = brief(message), param
        super().__init__(message)

    def body(self) -> bytes:
        return error_body(self.message, self.kind, self.param, self.code)

    def response(self) -> web.Response:
        headers = None if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return response(self.status, self.body(), headers)


class WrongRequest(ApiError):
    pass


class UnknownModel(ApiError):
    status = 404
    code = "model_not_found"


class TooLarge(ApiError):
    status = 413
    code = "request_too_large"


class QueueFull(ApiError):
    status = 429
    kind = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoInstance(ApiError):
    status = 503
    kind = "service_unavailable"
    code = "no_instance"
    retry_after_s = 5


class InstanceFailed(ApiError):
    status = 502
    kind = "server_error"
    code = "instance_failed"


class Passed(Exception):
    """An instance's own refusal (4xx), with its body as it came."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.body = body if _is_openai_error(body) else error_body(_text(body), WrongRequest.kind)
        super().__init__(f"status {status}")


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def response(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def _is_openai_error(body: bytes) -> bool:
    try:
        answer: Any = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return False
    return isinstance(answer, dict) and isinstance(answer.get("error"), dict)


def _text(body: bytes) -> str:
    return body.decode("utf-8", "replace").strip()[:500] or "the instance refused the request without a word"

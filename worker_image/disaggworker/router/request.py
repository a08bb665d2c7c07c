"""A client's request: what it asks, and the two bodies that go to prefill and to decode.

Only what the router itself must know is judged here; the rest is the instances' to judge.
"""

from __future__ import annotations

import contextlib
import math
import re
import secrets
from typing import Annotated, Any

import msgspec

from disaggserve.protocol import Resume
from disaggworker.router.errors import UnknownModel, WrongRequest
from disaggworker.router.prefixes import Prefix, prefix

_BYTES_PER_TOKEN = 4  # of English text under the usual tokenizers; only until prefill has counted
_TokenIds = Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)]
_MARGIN = 64  # levels of nesting: bodies are written and read again below more frames than here
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Request:
    """One well-formed request. `input_tokens` is a guess until prefill's answer tells."""

    __slots__ = (
        "body",
        "chat",
        "id",
        "include_usage",
        "input_tokens",
        "prefix",
        "stream",
        "uncached_tokens",
        "wants_token_ids",
    )

    def __init__(self, raw: bytes, *, chat: bool, model_name: str, id: str) -> None:
        """Raises WrongRequest (400) or UnknownModel (404)."""
        body = _object(raw)
        model = body.get("model")
        if model is not None and model != model_name:
            raise UnknownModel(f"model {model!r} is not served here; {model_name!r} is", "model")
        body.pop("kv_transfer_params", None)  # a client's could name another's KV
        if isinstance(more := body.get("vllm_xargs"), dict):
            more.pop(
                "kv_transfer_params", None
            )  # the other way in: what is no object there ends vLLM's engine
        for field in ("n", "best_of"):
            if body.get(field) not in (None, 1):
                raise WrongRequest(f"{field} must be 1: one answer per request is what is served here", field)
        for field in ("max_tokens", "max_completion_tokens"):
            if not _is_count(body.get(field, 1)):
                raise WrongRequest(f"{field} must be a whole number of at least 1", field)
        self.stream = _flag(body, "stream")
        self.include_usage = _include_usage(body)
        self.wants_token_ids = _flag(body, "return_token_ids")
        self.chat, self.id, self.body = chat, id, body
        self.input_tokens, self.prefix = _messages(body) if chat else _prompt(body)
        self.uncached_tokens = self.input_tokens  # on the prefill instance that is chosen

    def for_prefill(self, handoff: str, resume: Resume | None = None) -> bytes:
        """The same prompt for one token, its KV kept under the name `handoff`. The client's own limits ride in the params: prefill
        must know whether the answer ends at its first token. `resume`: for the token after those that the client has."""
        body = dict(self.body)
        limit = body.pop("max_tokens", None)
        if self.chat:
            limit = body.pop("max_completion_tokens", None) or limit
        # Null where the client set no limit: the body's own limit of one is none of the client's.
        params: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False, "max_tokens": limit}
        params["handoff"] = handoff
        for field in ("min_tokens", "stop"):
            if body.get(field) is not None:
                params[field] = body[field]
        if resume is not None:
            params["resume"] = resume
        body.pop("stream_options", None)  # refused where nothing streams
        if isinstance(body.get("min_tokens"), int):
            body["min_tokens"] = min(body["min_tokens"], 1)
        body |= {
            "stream": False,
            "max_completion_tokens" if self.chat else "max_tokens": 1,
            "return_token_ids": True,
            "kv_transfer_params": params,
        }
        return msgspec.json.encode(body)

    def for_decode(self, kv_transfer_params: object, *, token_ids: bool = False) -> bytes:
        """What the client sent, and where the KV is. `token_ids`: the answer shall name its tokens."""
        body = {**self.body, "kv_transfer_params": kv_transfer_params}
        if token_ids:
            body["return_token_ids"] = True
        return msgspec.json.encode(body)


def request_id(said: str | None) -> str:
    """The client's own id where it is fit for logs and headers, else a new one."""
    return said if said and _SANE_ID.fullmatch(said) else secrets.token_hex(16)


def _finite(text: str) -> float:
    """1e999 would be infinite, which JSON cannot say again."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is no number that can be held")
    return value


_decode = msgspec.json.Decoder(float_hook=_finite).decode


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = deeper = _decode(raw)
        if raw.count(b"[") + raw.count(b"{") > _MARGIN:
            # What cannot be said again, however deep in the stack, cannot be passed on: nothing but nesting makes it so.
            for _ in range(_MARGIN):
                deeper = [deeper]
            msgspec.json.encode(deeper)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise WrongRequest(f"the body is not JSON that can be read: {error}") from None
    if not isinstance(body, dict):
        raise WrongRequest("the body must be a JSON object")
    return body


def _is_count(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def _flag(body: dict[str, Any], field: str) -> bool:
    value = body.get(field)
    if value is not None and not isinstance(value, bool):
        raise WrongRequest(f"{field} must be true or false", field)
    return bool(value)


def _include_usage(body: dict[str, Any]) -> bool:
    """Judged here because prefill, which judges the rest, is not told: only decode streams."""
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise WrongRequest("stream_options must be an object", "stream_options")
    usage = (options or {}).get("include_usage")
    if usage is not None and not isinstance(usage, bool):
        raise WrongRequest(
            "stream_options.include_usage must be true or false", "stream_options.include_usage"
        )
    return bool(usage)


def _prompt(body: dict[str, Any]) -> tuple[int, Prefix]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = body["prompt"] = prompt[0]
    if isinstance(prompt, str):
        text = prompt.encode()
        return _guess(text), prefix(text)
    with contextlib.suppress(msgspec.ValidationError):
        tokens = msgspec.convert(prompt, _TokenIds)
        return len(tokens), prefix(tokens)
    raise WrongRequest("prompt must be one string or one list of token ids", "prompt")


def _messages(body: dict[str, Any]) -> tuple[int, Prefix]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise WrongRequest("messages must be a list of at least one message object", "messages")
    tokens = sum(_guess(str(m.get("content") or "").encode()) for m in messages)
    return tokens, prefix(msgspec.json.encode([body.get("tools"), messages]))


def _guess(text: bytes) -> int:
    return len(text) // _BYTES_PER_TOKEN + 1

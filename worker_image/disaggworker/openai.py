"""OpenAI's shapes: what a body asks for, and how answers, chunks and errors are written."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec

from disaggworker.engine.sequence import Sampling
from disaggworker.errors import RequestError

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # field: values that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "tools": ([],),
}

_encode = msgspec.json.Encoder().encode


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a request's body asks for, checked. `max_tokens` None = as many as fit; `seed` None = any."""

    chat: bool
    body: dict[str, Any]
    params: dict[str, Any]  # kv_transfer_params
    max_tokens: int | None
    stops: tuple[str, ...]
    seed: int | None
    sampling: Sampling
    stream: bool
    include_usage: bool
    token_ids: bool


def read(data: bytes, *, chat: bool) -> Ask:
    """Check a body. Raises `RequestError`, naming the field."""
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise RequestError(f"The body is not JSON: {e}.") from None
    if not isinstance(body, dict):
        raise RequestError("The body must be a JSON object.")
    for field, nothing in _UNSUPPORTED.items():
        value = body.get(field)
        if value is not None and value not in nothing:
            raise RequestError(f"{field} is not supported by this engine.", param=field)
    params = body.get("kv_transfer_params")
    if not isinstance(params, dict):
        raise RequestError(
            "kv_transfer_params is missing: this worker serves one half of a request; send requests to the router.",
            param="kv_transfer_params",
        )
    # The router asks prefill for one token; what the client asked for travels beside it.
    client = {**body, **{k: params[k] for k in ("max_tokens", "stop") if k in params}}
    if chat and "max_tokens" not in params and body.get("max_completion_tokens") is not None:
        client["max_tokens"] = body["max_completion_tokens"]
    max_tokens = _integer(client, "max_tokens", None if chat else 16, 1)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestError("stream_options must be an object.", param="stream_options")
    top_k = _integer(body, "top_k", 0, -1) or 0
    return Ask(
        chat=chat,
        body=body,
        params=params,
        max_tokens=max_tokens,
        stops=_stops(client.get("stop")),
        seed=_integer(body, "seed", None, None),
        sampling=Sampling(
            temperature=_number(body, "temperature", 1.0, 0.0, 100.0),
            top_p=_number(body, "top_p", 1.0, 0.0, 1.0),
            top_k=max(0, top_k),
            ignore_eos=_flag(body, "ignore_eos"),
        ),
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
        token_ids=_flag(body, "return_token_ids"),
    )


def _integer(body: dict[str, Any], field: str, default: int | None, least: int | None) -> int | None:
    value = body.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise RequestError(f"{field} must be an integer{bound}, not {value!r}.", param=field)
    return value


def _number(body: dict[str, Any], field: str, default: float, low: float, high: float) -> float:
    value = body.get(field)
    if value is None:
        return default
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not right or not low <= value <= high:
        raise RequestError(f"{field} must be a number from {low:g} to {high:g}, not {value!r}.", param=field)
    return float(value)


def _flag(body: dict[str, Any], field: str) -> bool:
    value = body.get(field)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise RequestError(f"{field} must be true or false, not {value!r}.", param=field)
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops) or len(stops) > 16:
        raise RequestError("stop must be a string or a list of up to 16 strings, none empty.", param="stop")
    return tuple(stops)


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> bytes:
    """OpenAI's error body."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return _encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def usage(prompt: int, completion: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def answer(
    ask: Ask,
    identity: str,
    created: int,
    model: str,
    *,
    text: str,
    tokens: list[int],
    finish: str | None,
    prompt_tokens: int,
    more: dict[str, Any] | None = None,
) -> bytes:
    """A whole answer."""
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
    choice |= {"message": {"role": "assistant", "content": text}} if ask.chat else {"text": text}
    if ask.token_ids:
        choice["token_ids"] = tokens
    return _encode(
        {
            "id": identity,
            "object": "chat.completion" if ask.chat else "text_completion",
            "created": created,
            "model": model,
            "choices": [choice],
            "usage": usage(prompt_tokens, len(tokens)),
            **(more or {}),
        }
    )


class Frames:
    """SSE frames of one answer. What does not change from token to token is written once."""

    def __init__(self, ask: Ask, identity: str, created: int, model: str) -> None:
        kind = "chat.completion.chunk" if ask.chat else "text_completion"
        head = _encode({"id": identity, "object": kind, "created": created, "model": model})[:-1]
        self._usage = b"data: " + head + b',"choices":[],"usage":%s}\n\n'
        self._usage = self._usage if ask.include_usage else b""
        text = b'"delta":{"content":%s}' if ask.chat else b'"text":%s'
        head = head.replace(b"%", b"%%")
        self._frame = b"data: " + head + b',"choices":[{"index":0,' + text + b',"logprobs":null'
        self._frame += b',"finish_reason":%s%s}]}\n\n'
        self._ids = ask.token_ids

    def token(self, text: str, token: int, finish: str | None) -> bytes:
        """The frame of one token."""
        ids = b',"token_ids":[%d]' % token if self._ids else b""
        reason = b'"%s"' % finish.encode() if finish else b"null"
        return self._frame % (_encode(text), reason, ids)

    def end(self, prompt: int, completion: int) -> bytes:
        """The frames after the last token."""
        head, _, tail = self._usage.partition(b"%s")
        counted = head + _encode(usage(prompt, completion)) + tail if self._usage else b""
        return counted + b"data: [DONE]\n\n"

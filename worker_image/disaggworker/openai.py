"""OpenAI's shapes: what a body asks for, and how answers, chunks and errors are written."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from disaggworker.engine.sequence import Sampling, Token
from disaggworker.errors import RequestError

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # field: values that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
}

_MOST_LOGPROBS = 20  # beside the chosen token's, as in OpenAI's chat and vLLM

_encode = msgspec.json.Encoder().encode


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a request's body asks for, checked. `max_tokens` None = as many as fit; `seed` None = any."""

    chat: bool
    body: dict[str, Any]
    params: dict[str, Any]  # kv_transfer_params
    whole: bool  # there are none: both halves of the answer are asked for
    max_tokens: int | None
    stops: tuple[str, ...]
    seed: int | None
    sampling: Sampling
    stream: bool
    include_usage: bool
    token_ids: bool

    def seeded(self) -> Sampling:
        """The sampling with the client's seed, or one drawn now."""
        seed = self.seed if self.seed is not None else secrets.randbits(62)
        return dataclasses.replace(self.sampling, seed=seed)


class Piece(NamedTuple):
    """One token of an answer, and what it shows; `offset`: where in the answer's text it begins."""

    token: Token
    text: str
    offset: int
    finish: str | None


Spelling = Callable[[int], bytes]  # of a token on its own; a special token's name


def read(data: bytes, *, chat: bool) -> Ask:
    """Check a body. Raises `RequestError`, naming the field."""
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise RequestError(f"The body is not JSON: {e}.") from None
    if not isinstance(body, dict):
        raise RequestError("The body must be a JSON object.")
    for field, nothing in _UNSUPPORTED.items():
        value = body.get(field)
        if value is not None and value not in nothing:
            raise RequestError(f"{field} is not supported by this engine.", param=field)
    given = body.get("kv_transfer_params")
    if given is not None and not isinstance(given, dict):
        raise RequestError("kv_transfer_params must be an object.", param="kv_transfer_params")
    params = given or {}
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
        whole=given is None,
        max_tokens=max_tokens,
        stops=_stops(client.get("stop")),
        seed=_integer(body, "seed", None, -(2**63), 2**63 - 1),
        sampling=Sampling(
            temperature=_number(body, "temperature", 1.0, 0.0, 100.0),
            top_p=_number(body, "top_p", 1.0, 0.0, 1.0),
            top_k=max(0, top_k),
            ignore_eos=_flag(body, "ignore_eos"),
            stop_ids=_stop_ids(body.get("stop_token_ids")),
            logprobs=_logprobs(body, chat),
        ),
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
        token_ids=_flag(body, "return_token_ids"),
    )


def _integer(
    body: dict[str, Any], field: str, default: int | None, least: int, most: int | None = None
) -> int | None:
    value = body.get(field)
    if value is None:
        return default
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not whole or (most is not None and value > most):
        bound = f" of at least {least}" if most is None else f" from {least} to {most}"
        raise RequestError(f"{field} must be an integer{bound}, not {value!r}.", param=field)
    return int(value)


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


def _stop_ids(value: Any) -> frozenset[int]:
    ids = value or []
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise RequestError("stop_token_ids must be a list of token ids.", param="stop_token_ids")
    return frozenset(ids)


def _logprobs(body: dict[str, Any], chat: bool) -> int | None:
    """completions: `logprobs` N; chat: `logprobs` true and `top_logprobs` N."""
    field = "top_logprobs" if chat else "logprobs"
    count = _integer(body, field, None, 0, _MOST_LOGPROBS)
    if not chat:
        if body.get("top_logprobs"):
            raise RequestError(
                "top_logprobs is chat's; a completion takes the number as logprobs.", param="top_logprobs"
            )
        return count
    asked = _flag(body, "logprobs")
    if count and not asked:
        raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    return (count or 0) if asked else None


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> bytes:
    """OpenAI's error body."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return _encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """OpenAI's usage object. `cached`: tokens of the prompt that were found in a prefix cache."""
    found = {"prompt_tokens_details": {"cached_tokens": cached}} if cached else {}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        **found,
    }


def answer(
    ask: Ask,
    identity: str,
    created: int,
    model: str,
    pieces: Sequence[Piece],
    spelling: Spelling,
    *,
    prompt_tokens: int,
    cached_tokens: int = 0,
    more: dict[str, Any] | None = None,
) -> bytes:
    """A whole answer."""
    text = "".join(piece.text for piece in pieces)
    choice: dict[str, Any] = {
        "index": 0,
        "logprobs": logprobs(ask, pieces, spelling),
        "finish_reason": pieces[-1].finish,
    }
    choice |= {"message": {"role": "assistant", "content": text}} if ask.chat else {"text": text}
    if ask.token_ids:
        choice["token_ids"] = [piece.token.id for piece in pieces]
    return _encode(
        {
            "id": identity,
            "object": "chat.completion" if ask.chat else "text_completion",
            "created": created,
            "model": model,
            "choices": [choice],
            "usage": usage(prompt_tokens, len(pieces), cached_tokens),
            **(more or {}),
        }
    )


def logprobs(ask: Ask, pieces: Sequence[Piece], spelling: Spelling) -> dict[str, Any] | None:
    """A choice's `logprobs`, None where none are asked for.

    A completion's `top_logprobs` hold the chosen token too, so up to one more than asked for; of tokens that spell
    alike the chosen one, else the likeliest, is in them.
    """
    found = [(piece, said) for piece in pieces if (said := piece.token.logprobs)]
    if ask.sampling.logprobs is None:
        return None

    def entry(token: int, value: float) -> dict[str, Any]:
        spelt = spelling(token)
        return {"token": spelt.decode(errors="replace"), "logprob": value, "bytes": list(spelt)}

    def name(token: int) -> str:
        return spelling(token).decode(errors="replace")

    if ask.chat:
        content = [
            {**entry(piece.token.id, said.chosen), "top_logprobs": [entry(*pair) for pair in said.top]}
            for piece, said in found
        ]
        return {"content": content, "refusal": None}
    tops: list[dict[str, float]] = []
    for piece, said in found:
        tops.append({name(piece.token.id): said.chosen})
        for token, value in said.top:
            tops[-1].setdefault(name(token), value)
    return {
        "text_offset": [piece.offset for piece, _ in found],
        "token_logprobs": [said.chosen for _, said in found],
        "tokens": [name(piece.token.id) for piece, _ in found],
        "top_logprobs": tops,
    }


class Frames:
    """SSE frames of one answer. What does not change from token to token is written once."""

    def __init__(self, ask: Ask, identity: str, created: int, model: str, spelling: Spelling) -> None:
        self._ask, self._spelling = ask, spelling
        kind = "chat.completion.chunk" if ask.chat else "text_completion"
        head = _encode({"id": identity, "object": kind, "created": created, "model": model})[:-1]
        self._usage = b"data: " + head + b',"choices":[],"usage":%s}\n\n'
        self._usage = self._usage if ask.include_usage else b""
        text = b'"delta":{"content":%s}' if ask.chat else b'"text":%s'
        head = head.replace(b"%", b"%%")
        self._frame = b"data: " + head + b',"choices":[{"index":0,' + text
        self._frame += b',"logprobs":%s,"finish_reason":%s%s}]}\n\n'
        self._ids = ask.token_ids

    def token(self, piece: Piece) -> bytes:
        """The frame of one token."""
        said = b"null"
        if piece.token.logprobs:
            said = _encode(logprobs(self._ask, [piece], self._spelling))
        ids = b',"token_ids":[%d]' % piece.token.id if self._ids else b""
        reason = b'"%s"' % piece.finish.encode() if piece.finish else b"null"
        return self._frame % (_encode(piece.text), said, reason, ids)

    def end(self, prompt: int, completion: int, cached: int = 0) -> bytes:
        """The frames after the last token."""
        head, _, tail = self._usage.partition(b"%s")
        counted = head + _encode(usage(prompt, completion, cached)) + tail if self._usage else b""
        return counted + b"data: [DONE]\n\n"

"""vLLM's dialect of the hand-off (NixlConnector; measured on 0.32, REFERENCE § 7): what goes to prefill, what to decode, and
what must never be believed. A server that drains takes nothing new, and says so with HTTP 200 and no token (`aborted`).

Prefill answers with one token, which is dropped, and with `kv_transfer_params`, which are copied whole; decode's first token
is the user's first. Two things would end in wrong tokens or in a dead server, and are kept from happening here:

* A prompt that is longer on decode than it was on prefill kills decode's server. So both get the very same prompt, and what
  would make it differ is refused (`refuse`).
* Prefill frees KV that nobody asks for within `LEASE_S`, and decode then reads whatever stands there, with HTTP 200. Decode
  renews the lease from when it has the request, but not while it is stopped or cut off. So a first token that comes later
  than the lease is not believed (`late`): the request is prefilled again.
"""

from __future__ import annotations

from typing import Any

import msgspec

from disaggserve.wire import VLLM_LEASE_S as LEASE_S
from disaggworker.router.errors import WrongRequest

NAME = "vllm"  # of the pods' engine label

# Prefill's lease begins a little before its answer is here.
LATE_S = LEASE_S - 2.0

# Prefill's token is dropped: nothing that shapes it matters, and some of it would be refused beside one token.
_OF_THE_ANSWER = (
    *("max_tokens", "max_completion_tokens", "min_tokens", "stream_options", "stop", "echo"),
    *("logprobs", "top_logprobs"),
)
_REMOTE = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")


def refuse(body: dict[str, Any]) -> None:
    """Raises WrongRequest for what two servers cannot answer together."""
    kept = body.get("truncate_prompt_tokens")
    if isinstance(kept, int) and kept < 0:
        # "As many as fit" depends on max_tokens, and that is 1 on prefill.
        raise WrongRequest(
            "truncate_prompt_tokens must say how many tokens to keep; -1 is not served here",
            "truncate_prompt_tokens",
        )
    if body.get("use_beam_search"):
        raise WrongRequest("use_beam_search is not served here: beams are not handed over", "use_beam_search")
    for field in ("prompt_logprobs", "prompt_embeds"):
        if body.get(field) is not None:
            raise WrongRequest(f"{field} is not served here: the prompt is computed elsewhere", field)
    if body.get("echo") and body.get("logprobs") is not None:
        raise WrongRequest("echo with logprobs is not served here: the prompt is computed elsewhere", "echo")


def for_prefill(body: dict[str, Any], *, chat: bool) -> bytes:
    """The same prompt for one token, its KV kept for whoever asks."""
    out = dict(body)
    for field in _OF_THE_ANSWER:
        out.pop(field, None)
    return msgspec.json.encode(
        out
        | {
            "stream": False,
            "max_completion_tokens" if chat else "max_tokens": 1,
            "kv_transfer_params": {
                "do_remote_decode": True,
                "do_remote_prefill": False,
                **dict.fromkeys(_REMOTE),
            },
        }
    )


def for_decode(body: dict[str, Any], kv_transfer_params: dict[str, Any] | None) -> bytes:
    """What the client sent, and where the KV is (None: it shall be computed there). A stream always says how many tokens it
    had: frames may hold several."""
    out = dict(body)
    if kv_transfer_params is not None:
        out["kv_transfer_params"] = kv_transfer_params
    if body.get("stream"):
        out["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    return msgspec.json.encode(out)


def late(waited_s: float) -> bool:
    """Whether decode's first token came so long after prefill's answer that the KV may have been another's by then."""
    return waited_s >= LATE_S


def first_token_s(answer: dict[str, Any]) -> float | None:
    """How long decode took to its first token, by its own clock; None where it does not say.

    An answer in one piece hides it otherwise (the operator asks for it: `--enable-per-request-metrics`).
    """
    said = (answer.get("metrics") or {}).get("time_to_first_token_ms")
    return said / 1e3 if isinstance(said, int | float) else None


def aborted(answer: dict[str, Any]) -> bool:
    """Whether a server that ends has let go of the request: HTTP 200, and no or not all of its tokens."""
    return any(choice.get("finish_reason") == "abort" for choice in answer.get("choices") or ())


def repeatable(body: dict[str, Any]) -> bool:
    """Whether the same request gives the same answer: greedy, or drawn with a seed from its first token on.

    Not where the client asks for more than text: what was said is compared as text, and a token may show none, or be cut by
    the place at which the other answer ended.
    """
    asks_more = body.get("return_token_ids") or body.get("logprobs") not in (None, False)
    return not asks_more and (body.get("temperature") == 0 or body.get("seed") is not None)


class Frames:
    """A decode's stream on its way through: told apart, counted, and without the usage that only the router asked for.

    With `note`, the text is kept in `said`, so that the answer can be given again elsewhere: then `after` is what the client
    has of it, which is not passed on once more. An answer that begins otherwise is an `error`.
    """

    __slots__ = ("_ahead", "_keep_usage", "_rest", "_said", "begun", "done", "error", "tokens", "usage")

    def __init__(self, *, keep_usage: bool, note: bool = False, after: str = "") -> None:
        self._keep_usage, self._rest = keep_usage, b""
        self._ahead = after  # what of `after` has not come again yet
        self._said = [after] if note else None
        self.begun = False  # a frame with a choice has come: the first token is there
        self.done = False
        self.error: bytes | None = None  # the frame that says what failed, without `data: `
        self.tokens = 0  # one a frame, until usage at the end says how many there were
        self.usage: dict[str, Any] = {}

    def feed(self, chunk: bytes) -> bytes:
        """The whole frames that are here now, to be passed on; none from an error on."""
        whole, cut, self._rest = (self._rest + chunk).rpartition(b"\n\n")
        return b"".join(map(self._one, (whole + cut).split(b"\n\n"))) if cut else b""

    def _one(self, frame: bytes) -> bytes:
        if not frame or self.error is not None:
            return b""
        if frame.startswith(b"data: [DONE]"):
            self.done = True
        elif frame.startswith(b'data: {"error"'):
            self.error = frame[6:]
            return b""
        elif b'"choices":[]' in frame:  # inside a JSON string a quote is escaped: this is no token's text
            self._count(frame)
            if not self._keep_usage:
                return b""
        elif b'"finish_reason":"abort"' in frame:
            self.error = frame[6:]
            return b""
        elif frame.startswith(b"data: "):
            self.begun = True
            self.tokens += 1
            if self._said is not None:
                return self._noted(frame)
        return frame + b"\n\n"

    @property
    def said(self) -> str | None:
        """The text that the client has; None where the answer cannot be given again."""
        return None if self._said is None else "".join(self._said)

    def _noted(self, frame: bytes) -> bytes:
        """The frame, or as much of it as the client does not have."""
        assert self._said is not None
        answer = msgspec.json.decode(frame[6:])
        choice = answer["choices"][0]
        chat = "delta" in choice
        where, field = (choice["delta"], "content") if chat else (choice, "text")
        if chat and where.keys() - {"role", "content"}:
            self._said = None  # tool calls and reasoning are more than a text
            if not self._ahead:
                return frame + b"\n\n"
            return self._otherwise()
        text, ahead = where.get(field) or "", self._ahead
        if not ahead:
            self._said.append(text)
            return frame + b"\n\n"
        more = text[len(ahead) :]
        if not (ahead.startswith(text) or (text.startswith(ahead) and not choice.get("logprobs"))):
            return self._otherwise()
        self._ahead = ahead[len(text) :]
        if not more and not choice.get("finish_reason"):
            return b""
        where[field] = more
        self._said.append(more)
        return b"data: " + msgspec.json.encode(answer) + b"\n\n"

    def _otherwise(self) -> bytes:
        self.error, self._said = b"it gave the answer again, and not as the client has it", None
        return b""

    def _count(self, frame: bytes) -> None:
        try:
            self.usage = msgspec.json.decode(frame[6:])["usage"]
            self.tokens = int(self.usage["completion_tokens"])
        except (msgspec.DecodeError, LookupError, TypeError, ValueError):
            return  # frames were counted

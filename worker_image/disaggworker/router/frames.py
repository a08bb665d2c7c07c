"""Server-sent events on their way through: counted, never changed; and the one that the router makes itself."""

from __future__ import annotations

from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"


class Frames:
    """Counts the tokens of a stream of `data: …` frames that arrive in pieces of any size.

    One frame is one token, but `[DONE]`, usage (no choices), errors and comments.
    """

    __slots__ = ("_rest", "done", "error", "tokens")

    def __init__(self) -> None:
        self._rest = b""
        self.tokens = 0
        self.done = False
        self.error = False

    def feed(self, chunk: bytes) -> bytes:
        """The whole frames that are here now, to be passed on; a frame in part is kept until its rest comes."""
        if self._rest:
            chunk = self._rest + chunk
            self._rest = b""
        end = chunk.rfind(b"\n\n") + 2
        if end == 1:
            self._rest = chunk
            return b""
        if end != len(chunk):
            chunk, self._rest = chunk[:end], chunk[end:]
        if chunk.find(b"\n\n") == end - 2:
            self._count(chunk)
        else:
            for frame in chunk.split(b"\n\n"):
                self._count(frame)
        return chunk

    def _count(self, frame: bytes) -> None:
        # Inside a JSON string a quote is escaped, so none of these can be part of a token's text.
        if not frame.startswith(b"data: "):
            return
        if frame.startswith(b"data: [DONE]"):
            self.done = True
        elif frame.startswith((b'data: {"error":', b'data: {"error" :')):
            self.error = True
        elif b'"choices":[]' not in frame and b'"choices": []' not in frame:
            self.tokens += 1


def first(answer: dict[str, Any], *, chat: bool, finish: bool, usage: bool, token_ids: bool) -> bytes:
    """Prefill's answer as the stream's first frame. `finish`: it is the last token as well."""
    choice = answer["choices"][0]
    out: dict[str, Any] = {"index": 0}
    if chat:
        out["delta"] = {"role": "assistant", "content": choice["message"]["content"]}
    else:
        out["text"] = choice["text"]
    out["logprobs"] = choice.get("logprobs")
    out["finish_reason"] = choice.get("finish_reason") if finish else None
    if token_ids and choice.get("token_ids") is not None:
        out["token_ids"] = choice["token_ids"]
    return _frame(
        answer,
        "chat.completion.chunk" if chat else "text_completion",
        [out],
        {"usage": None} if usage else {},
    )


def last(answer: dict[str, Any], *, chat: bool, usage: bool) -> bytes:
    """The end of a stream that prefill ended."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    return (_frame(answer, kind, [], {"usage": answer["usage"]}) if usage else b"") + DONE


def _frame(answer: dict[str, Any], kind: str, choices: list[Any], more: dict[str, Any]) -> bytes:
    head = {k: answer[k] for k in ("id", "created", "model") if k in answer}
    return b"data: " + msgspec.json.encode({"object": kind, **head, "choices": choices, **more}) + b"\n\n"

"""Server-sent events on their way through: counted, hardly changed; and those that the router makes itself."""

from __future__ import annotations

from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"

# Inside a JSON string a quote is escaped, so none of these can be part of a token's text.
_ENDED = b"data: [DONE]"
_FAILED = (b'data: {"error":', b'data: {"error" :')
_NO_CHOICES = (b'"choices":[]', b'"choices": []')
_FINISHED = (b'"finish_reason":"', b'"finish_reason": "')
_IDS = b'"token_ids":['


class Frames:
    """Counts the tokens of a stream of `data: …` frames that arrive in pieces of any size, and notes their ids.

    A frame is as many tokens as its `token_ids` name, and one where it names none; `[DONE]`, usage (no choices), errors
    and comments are no token. `hide` takes the names out of what is passed on: the router asked for them, not the client.
    """

    __slots__ = ("_hide", "_rest", "done", "error", "finished", "ids", "tokens")

    def __init__(self, *, hide: bool = False) -> None:
        self._hide, self._rest = hide, b""
        self.tokens = 0
        self.ids: list[int] = []  # of all tokens so far, where the frames name them
        self.finished = False  # the last token is here; usage and `[DONE]` may be missing
        self.done = False
        self.error = b""  # the frame that says what failed; it is not passed on, and nothing after it

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
            return self._take(chunk)
        return b"".join([self._take(frame + b"\n\n") for frame in chunk[:-2].split(b"\n\n")])

    def _take(self, frame: bytes) -> bytes:
        if self.error:
            return b""
        if not frame.startswith(b"data: "):
            return frame
        at = frame.find(_IDS)
        if at > 0:
            return self._named(frame, at)
        if frame.startswith(_ENDED):
            self.done = True
        elif frame.startswith(_FAILED):
            self.error = frame
            return b""
        elif _NO_CHOICES[0] not in frame and _NO_CHOICES[1] not in frame:
            self.tokens += 1
            self.finished = self.finished or _FINISHED[0] in frame or _FINISHED[1] in frame
        return frame

    def _named(self, frame: bytes, at: int) -> bytes:
        end = frame.index(b"]", at)
        named = frame[at + len(_IDS) : end]
        if named.isdigit():  # one, as nearly always
            self.ids.append(int(named))
            self.tokens += 1
        elif named:
            ids = list(map(int, named.split(b",")))
            self.ids += ids
            self.tokens += len(ids)
        if _FINISHED[0] in frame or _FINISHED[1] in frame:
            self.finished = True
        if not self._hide:
            return frame
        if (
            frame[at - 1 : at] == b","
        ):  # a comma goes with it: the one before, or after where it is the first field
            at -= 1
        elif frame[end + 1 : end + 2] == b",":
            end += 1
        return frame[:at] + frame[end + 1 :]


def token(answer: dict[str, Any], *, chat: bool, begins: bool, finish: bool, usage: bool, ids: bool) -> bytes:
    """Prefill's answer as a frame of the stream. `begins`: its first; `finish`: it is the last token as well."""
    choice = answer["choices"][0]
    out: dict[str, Any] = {"index": 0}
    if chat:
        role = {"role": "assistant"} if begins else {}
        out["delta"] = {**role, "content": choice["message"]["content"]}
    else:
        out["text"] = choice["text"]
    out["logprobs"] = choice.get("logprobs")
    out["finish_reason"] = choice.get("finish_reason") if finish else None
    if ids and choice.get("token_ids") is not None:
        out["token_ids"] = choice["token_ids"]
    return _frame(answer, chat, [out], {"usage": None} if usage else {})


def end(answer: dict[str, Any], *, chat: bool, usage: tuple[int, int] | None) -> bytes:
    """The end of a stream that prefill ended, or that lacks only its end; `usage`: tokens of prompt and of answer."""
    if usage is None:
        return DONE
    prompt, completion = usage
    found = {k: v for k, v in answer.get("usage", {}).items() if k == "prompt_tokens_details"}
    said = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    said |= found
    return _frame(answer, chat, [], {"usage": said}) + DONE


def _frame(answer: dict[str, Any], chat: bool, choices: list[Any], more: dict[str, Any]) -> bytes:
    kind = "chat.completion.chunk" if chat else "text_completion"
    head = {k: answer[k] for k in ("id", "created", "model") if k in answer}
    return b"data: " + msgspec.json.encode({"object": kind, **head, "choices": choices, **more}) + b"\n\n"

"""Streams are counted exactly however they are cut, and nothing of them is changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggworker.router import frames
from disaggworker.router.frames import Frames

CHUNKS = st.lists(st.integers(1, 40), min_size=1)


def token(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]}, separators=(",", ":")).encode() + b"\n\n"


def cut(whole: bytes, sizes: list[int]) -> list[bytes]:
    out, at, k = [], 0, 0
    while at < len(whole):
        out.append(whole[at : at + sizes[k % len(sizes)]])
        at, k = at + sizes[k % len(sizes)], k + 1
    return out


@given(st.lists(st.text(max_size=30), max_size=12), CHUNKS, st.booleans(), st.booleans())
def test_tokens_are_counted_over_any_cut(
    texts: list[str], sizes: list[int], usage: bool, spaced: bool
) -> None:
    choices = b'"choices": []' if spaced else b'"choices":[]'
    end = b"data: {" + choices + b',"usage":{"completion_tokens":3}}\n\n' if usage else b""
    whole = b": ping\n\n" + b"".join(map(token, texts)) + end + b"data: [DONE]\n\n"
    stream = Frames()
    passed = b"".join(map(stream.feed, cut(whole, sizes)))
    assert passed == whole
    assert (stream.tokens, stream.done, stream.error) == (len(texts), True, False)


@given(CHUNKS)
def test_an_error_is_no_token(sizes: list[int]) -> None:
    stream = Frames()
    for chunk in cut(token("a") + b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n', sizes):
        stream.feed(chunk)
    assert (stream.tokens, stream.done, stream.error) == (1, True, True)


@pytest.mark.parametrize("text", ['"choices":[]', "data: [DONE]", "\n\n", 'data: {"error":'])
def test_text_cannot_pass_for_structure(text: str) -> None:
    stream = Frames()
    stream.feed(token(text))
    assert (stream.tokens, stream.done, stream.error) == (1, False, False)


def test_half_a_frame_is_kept_so_that_an_error_can_follow_whole_ones() -> None:
    stream = Frames()
    assert stream.feed(token("a") + b"data: {") == token("a")
    assert stream.tokens == 1


@pytest.mark.parametrize("chat", [False, True])
def test_first_frame(chat: bool) -> None:
    message = {"message": {"role": "assistant", "content": "A"}} if chat else {"text": "A"}
    answer: dict[str, Any] = {
        "id": "i",
        "created": 1,
        "model": "m",
        "choices": [{**message, "finish_reason": "length", "token_ids": [9], "logprobs": None}],
        "usage": {"completion_tokens": 1},
        "kv_transfer_params": {"secret": 1},
    }
    made = frames.first(answer, chat=chat, finish=False, usage=True, token_ids=True)
    assert made.endswith(b"\n\n")
    said = json.loads(made[6:])
    (choice,) = said.pop("choices")
    kind = "chat.completion.chunk" if chat else "text_completion"
    assert said == {"id": "i", "created": 1, "model": "m", "object": kind, "usage": None}
    assert choice["finish_reason"] is None
    assert choice["token_ids"] == [9]
    made = frames.first(answer, chat=chat, finish=True, usage=False, token_ids=False)
    said = json.loads(made[6:])
    assert said["choices"][0]["finish_reason"] == "length"
    assert "usage" not in said
    assert "token_ids" not in said["choices"][0]

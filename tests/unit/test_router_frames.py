"""Streams are counted exactly however they are cut, and nothing of them is changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggworker.router import frames
from disaggworker.router.frames import Frames
from tests.wires import cut

CHUNKS = st.lists(st.integers(1, 40), min_size=1)


def token(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]}, separators=(",", ":")).encode() + b"\n\n"


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
    assert (stream.tokens, stream.done, stream.error) == (len(texts), True, b"")


@given(CHUNKS)
def test_an_error_and_what_follows_is_kept_back(sizes: list[int]) -> None:
    stream = Frames()
    error = b'data: {"error": {"message": "x"}}\n\n'
    passed = b"".join(map(stream.feed, cut(token("a") + error + b"data: [DONE]\n\n", sizes)))
    assert passed == token("a")
    assert (stream.tokens, stream.done, stream.error) == (1, False, error)


@given(
    st.lists(st.tuples(st.text(max_size=9), st.lists(st.integers(0, 10**6), max_size=3))),
    CHUNKS,
    st.booleans(),
    st.sampled_from(["first", "middle", "last"]),
)
def test_named_tokens_are_noted_and_hidden(
    said: list[tuple[str, list[int]]], sizes: list[int], hide: bool, where: str
) -> None:
    def frame(text: str, ids: list[int] | None) -> bytes:
        named = {} if ids is None else {"token_ids": ids}
        fields = {"index": 0, **named, "text": text, "finish_reason": None}
        if where == "first":
            fields = {**named, "text": text, "finish_reason": None}
        elif where == "last":
            fields = {"text": text, "finish_reason": None, **named}
        return b"data: " + json.dumps({"choices": [fields]}, separators=(",", ":")).encode() + b"\n\n"

    stream = Frames(hide=hide)
    passed = b"".join(map(stream.feed, cut(b"".join(frame(t, ids) for t, ids in said), sizes)))
    assert passed == b"".join(frame(t, None if hide else ids) for t, ids in said)
    assert stream.ids == [token for _, ids in said for token in ids]
    assert stream.tokens == len(stream.ids)
    assert not stream.finished


def test_the_last_token_is_known_by_its_finish_reason() -> None:
    stream = Frames(hide=True)
    stream.feed(b'data: {"choices":[{"text":"a","finish_reason":"length","token_ids":[4]}]}\n\n')
    assert (stream.finished, stream.done, stream.ids) == (True, False, [4])


@pytest.mark.parametrize(
    "text",
    ['"choices":[]', "data: [DONE]", "\n\n", 'data: {"error":', '"token_ids":[7]', '"finish_reason":"'],
)
def test_text_cannot_pass_for_structure(text: str) -> None:
    stream = Frames()
    stream.feed(token(text))
    assert (stream.tokens, stream.done, stream.error, stream.finished) == (1, False, b"", False)
    assert not stream.ids


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
    made = frames.token(answer, chat=chat, begins=True, finish=False, usage=True, ids=True)
    assert made.endswith(b"\n\n")
    said = json.loads(made[6:])
    (choice,) = said.pop("choices")
    kind = "chat.completion.chunk" if chat else "text_completion"
    assert said == {"id": "i", "created": 1, "model": "m", "object": kind, "usage": None}
    assert choice["finish_reason"] is None
    assert choice["token_ids"] == [9]
    made = frames.token(answer, chat=chat, begins=False, finish=True, usage=False, ids=False)
    said = json.loads(made[6:])
    assert said["choices"][0]["finish_reason"] == "length"
    assert "usage" not in said
    assert "token_ids" not in said["choices"][0]
    assert not chat or said["choices"][0]["delta"] == {"content": "A"}

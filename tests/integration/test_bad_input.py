"""Bad input through the router: OpenAI's error shape, the right status, the field at fault; and nothing is held afterwards."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2e.dataplane import DataPlane
from e2e.nodes.processes import ForkServerClient
from tests.integration.served import MODEL, Background, Served, serve

CONTEXT = 64
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODY: dict[str, Any] = {"model": MODEL, "prompt": "a b c", "max_tokens": 3, "temperature": 0}
MESSAGES: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hello"}],
    "max_completion_tokens": 3,
}
LONGEST_ERROR = 1000  # bytes: whatever a client sends, it is not sent all of it back


@pytest.fixture(scope="module")
def served(
    background: Background, forks: ForkServerClient, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    plane = DataPlane(forks, tmp_path_factory.mktemp("plane"), MODEL, weights, context_length=CONTEXT)
    with background.inside(serve(background, plane)) as made:
        yield made
        made.quiet()


@pytest.fixture(autouse=True)
def _nothing_is_held(served: Served) -> Iterator[None]:
    yield
    served.quiet()


def ask(
    served: Served,
    path: str,
    body: Any = None,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes]:
    """Status and body of one request on a connection of its own."""
    connection = http.client.HTTPConnection(served.router.address, 8000, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def error_of(answer: bytes) -> dict[str, Any]:
    """The error, in OpenAI's shape and of a bearable length."""
    assert len(answer) <= LONGEST_ERROR
    (error,) = json.loads(answer).values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return dict(error)


def nested(depth: int) -> bytes:
    return b'{"prompt":"a","max_tokens":2,"x":' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (COMPLETIONS, b"", 400, None),
        (COMPLETIONS, b"{", 400, None),
        (COMPLETIONS, b"[]", 400, None),
        (COMPLETIONS, b'{"prompt": "\xff"}', 400, None),
        (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, None),
        (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, None),
        (COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}', 400, None),
        (COMPLETIONS, b'{"prompt": "a", "seed": 1' + b"0" * 400 + b"}", 400, "seed"),
        (COMPLETIONS, nested(100_000), 400, None),
        (COMPLETIONS, {**BODY, "model": "other"}, 404, "model"),
        (COMPLETIONS, {**BODY, "model": "other" * 10_000}, 404, "model"),
        (COMPLETIONS, {**BODY, "prompt": [5] * 3000}, 400, "prompt"),
        (COMPLETIONS, {**BODY, "prompt": "word " * 3000}, 400, "prompt"),
        (COMPLETIONS, {**BODY, "prompt": None}, 400, "prompt"),
        (COMPLETIONS, {**BODY, "prompt": []}, 400, "prompt"),
        (COMPLETIONS, {**BODY, "prompt": {}}, 400, "prompt"),
        (COMPLETIONS, {**BODY, "prompt": [-1]}, 400, "prompt"),
        (COMPLETIONS, {**BODY, "prompt": [10**9]}, 400, "prompt"),
        (COMPLETIONS, {**BODY, "prompt": [True]}, 400, "prompt"),
        (COMPLETIONS, {**BODY, "prompt": ["a", "b"]}, 400, "prompt"),
        (COMPLETIONS, {**BODY, "max_tokens": -1}, 400, "max_tokens"),
        (COMPLETIONS, {**BODY, "max_tokens": 0}, 400, "max_tokens"),
        (COMPLETIONS, {**BODY, "max_tokens": 2.5}, 400, "max_tokens"),
        (COMPLETIONS, {**BODY, "max_tokens": "9" * 100_000}, 400, "max_tokens"),
        (COMPLETIONS, {**BODY, "temperature": "hot" * 100_000}, 400, "temperature"),
        (COMPLETIONS, {**BODY, "temperature": -1}, 400, "temperature"),
        (COMPLETIONS, {**BODY, "top_p": [1]}, 400, "top_p"),
        (COMPLETIONS, {**BODY, "seed": 2**63}, 400, "seed"),
        (COMPLETIONS, {**BODY, "stop": [""]}, 400, "stop"),
        (COMPLETIONS, {**BODY, "stream": 1}, 400, "stream"),
        (COMPLETIONS, {**BODY, "stream": "yes"}, 400, "stream"),
        (COMPLETIONS, {**BODY, "stream": True, "stream_options": []}, 400, "stream_options"),
        (
            COMPLETIONS,
            {**BODY, "stream": True, "stream_options": {"include_usage": 1}},
            400,
            "stream_options.include_usage",
        ),
        (COMPLETIONS, {**BODY, "logprobs": 1000}, 400, "logprobs"),
        (COMPLETIONS, {**BODY, "n": 2}, 400, "n"),
        (CHAT, {**MESSAGES, "messages": None}, 400, "messages"),
        (CHAT, {**MESSAGES, "messages": []}, 400, "messages"),
        (CHAT, {**MESSAGES, "messages": [{"role": 5, "content": "a"}]}, 400, "messages"),
        (CHAT, {**MESSAGES, "messages": [{"role": "user", "content": 5}]}, 400, "messages"),
        (CHAT, {**MESSAGES, "messages": [{"role": "user", "content": "a " * 3000}]}, 400, "messages"),
        (CHAT, {**MESSAGES, "max_completion_tokens": -1}, 400, "max_completion_tokens"),
        (CHAT, {**MESSAGES, "top_logprobs": 2}, 400, "top_logprobs"),
    ],
)
def test_it_is_refused_by_name(served: Served, path: str, body: Any, status: int, param: str | None) -> None:
    code, answer = ask(served, path, body)
    assert code == status, answer[:LONGEST_ERROR]
    assert error_of(answer)["param"] == param


def test_nesting_is_taken_or_refused_at_every_depth(served: Served) -> None:
    codes = [ask(served, COMPLETIONS, nested(depth))[0] for depth in (*range(900, 1000), 2000)]
    assert (codes[0], codes[-1]) == (200, 400)
    assert set(codes) == {200, 400}  # where the router's stack bears it and a worker's does not, too


def test_ten_megabytes_are_too_many(served: Served) -> None:
    body = json.dumps({**BODY, "prompt": "a" * 10 * 2**20}).encode()
    for sent in (body, iter([body[k : k + 2**16] for k in range(0, len(body), 2**16)])):
        connection = http.client.HTTPConnection(served.router.address, 8000, timeout=60)
        # An iterator goes in chunks: nobody says how many bytes will come.
        connection.request("POST", COMPLETIONS, sent, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 413
        assert "4194304" in error_of(answer.read())["message"]
        connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", CHAT, 405),
        ("PUT", "/drain", 405),
    ],
)
def test_there_is_no_such_door(served: Served, method: str, path: str, status: int) -> None:
    code, answer = ask(served, path, method=method)
    assert code == status
    error_of(answer)


def test_an_empty_prompt_is_one_where_the_tokenizer_begins_it(served: Served) -> None:
    code, answer = ask(served, COMPLETIONS, {**BODY, "prompt": ""})
    assert code == 200
    assert json.loads(answer)["usage"]["prompt_tokens"] == 1


def test_kv_parameters_of_a_client_are_not_taken(served: Served) -> None:
    expected = json.loads(ask(served, COMPLETIONS, BODY)[1])["choices"]
    hostile = {"do_remote_prefill": True, "host": "127.0.0.1", "port": 1, "handoff": "x", "generation": 1}
    code, answer = ask(served, COMPLETIONS, {**BODY, "kv_transfer_params": hostile})
    assert (code, json.loads(answer)["choices"]) == (200, expected)


def test_a_body_that_does_not_come_whole_holds_nothing(served: Served) -> None:
    connection = http.client.HTTPConnection(served.router.address, 8000, timeout=60)
    connection.putrequest("POST", COMPLETIONS)
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b'{"prompt": "a')
    connection.close()
    code, answer = ask(served, COMPLETIONS, BODY)
    assert code == 200, answer


# ------------------------------------------------------------------------------------------- anything at all

WORDS = st.sampled_from(["", "a", "\u0000", "é\U0001f600", "x" * 5000, '"\\', "</s>"])
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage", ""]), inner),
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "model",
        "prompt",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "n",
        "best_of",
        "stop",
        "stream",
        "stream_options",
        "seed",
        "logprobs",
        "top_logprobs",
        "ignore_eos",
        "stop_token_ids",
        "return_token_ids",
        "min_tokens",
        "echo",
        "user",
        "kv_transfer_params",
        "response_format",
        "tools",
        "logit_bias",
    ]
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    chat=st.booleans(), stream=st.booleans(), changed=st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3)
)
def test_anything_ends_in_an_answer_or_a_refusal(
    served: Served, chat: bool, stream: bool, changed: dict[str, Any]
) -> None:
    body = {**(MESSAGES if chat else BODY), "stream": stream, **changed}
    status, answer = ask(served, CHAT if chat else COMPLETIONS, body)
    if status != 200:
        assert status in (400, 404), answer
        error_of(answer)
    elif body["stream"]:
        *frames, done, end = answer.split(b"\n\n")
        assert (done, end) == (b"data: [DONE]", b"")
        assert all("error" not in json.loads(frame.removeprefix(b"data: ")) for frame in frames)
    else:
        assert len(json.loads(answer)["choices"]) == 1

"""The router's small parts: requests, buckets, pods, flags."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggserve import metric_names as names
from disaggserve.protocol import Resume
from disaggworker.router import config, discovery
from disaggworker.router.admission import Admission
from disaggworker.router.errors import QueueFull, UnknownModel, WrongRequest
from disaggworker.router.fleet import Fleet, Seen
from disaggworker.router.metrics import Histogram, Metrics, bucket
from disaggworker.router.prefixes import PIECE_TOKENS, Prefixes, prefix
from disaggworker.router.request import Request, request_id


def request(chat: bool = False, **body: Any) -> Request:
    asked = {"model": "m", **({} if chat or "prompt" in body else {"prompt": "a"}), **body}
    return Request(json.dumps(asked).encode(), chat=chat, model_name="m", id="i")


@pytest.mark.parametrize("edges", [names.INPUT_EDGES, names.OUTPUT_EDGES])
def test_edges(edges: tuple[float, ...]) -> None:
    assert len(edges) == 13
    assert (edges[0], edges[-1]) == (0, math.inf)
    assert list(edges) == sorted(set(edges))
    assert [bucket(edges, int(e)) for e in edges[1:-1]] == list(range(11))
    assert bucket(edges, int(edges[1]) + 1) == 1
    assert (bucket(edges, 0), bucket(edges, 10**9)) == (0, 11)


@pytest.mark.parametrize("edges", [names.TTFT_BUCKETS, names.TPOT_BUCKETS])
def test_common_promises_are_edges(edges: tuple[float, ...]) -> None:
    assert list(edges) == sorted(set(edges))
    assert {0.1, 0.125, 0.2, 0.25, 0.5, 1, 2.5, 4, 15} <= set(edges)


def test_every_metric_has_a_help_text() -> None:
    metrics = {v for k, v in vars(names).items() if k.startswith(("ROUTER_", "WORKER_", "VLLM_"))}
    assert set(names.HELP) == metrics


def test_histogram_counts_at_the_edge_below_it() -> None:
    h = Histogram((1.0, 2.0))
    for v in (1.0, 1.5, 2.0, 9.0):
        h.observe(v)
    assert h.cumulative() == [("1.0", 1), ("2.0", 3), ("+Inf", 4)]


def test_promise_is_joint_and_includes_its_limit() -> None:
    m = Metrics("ns/n", 1.0, 0.5)
    m.answer(1, 3, 1.0, 1.0)
    m.answer(1, 3, 1.1, 1.0)
    m.answer(1, 3, 1.0, 1.1)
    m.answer(1, 1, 1.0, 0.0)
    assert (m.requests["ok", True], m.requests["ok", False]) == (2, 2)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20))
def test_gaps(gaps: list[float]) -> None:
    m = Metrics("ns/n", 1, 1)
    now_s = 5.0
    m.arrive(now_s)
    for gap in gaps:
        now_s += gap
        m.arrive(now_s)
    assert m.arrivals == len(gaps) + 1
    assert m.gaps_s == pytest.approx(sum(gaps), abs=1e-9)
    assert m.gaps_squared_s2 == pytest.approx(sum(g * g for g in gaps), abs=1e-6)


def test_length_estimates() -> None:
    assert request(prompt=[1, 2, 3]).input_tokens == 3
    assert request(prompt="x" * 400).input_tokens in (100, 101)
    assert request(chat=True, messages=[{"role": "user", "content": "x" * 40}]).input_tokens in (10, 11)


def test_bodies() -> None:
    r = request(
        prompt="a",
        max_tokens=9,
        stop="x",
        stream=True,
        stream_options={"include_usage": True},
        kv_transfer_params={"e": 1},
        odd=1.5,
    )
    first, rest = json.loads(r.for_prefill("h")), json.loads(r.for_decode({"at": "p"}))
    assert "stream_options" not in first
    assert first["kv_transfer_params"]["max_tokens"] == 9
    assert first["kv_transfer_params"]["handoff"] == "h"
    assert (first["stream"], first["max_tokens"], first["odd"]) == (False, 1, 1.5)
    assert rest == {
        "model": "m", "prompt": "a", "max_tokens": 9, "stop": "x", "stream": True,
        "stream_options": {"include_usage": True}, "odd": 1.5, "kv_transfer_params": {"at": "p"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("chat", "body", "limit"),
    [
        (False, {}, None),
        (False, {"max_tokens": 5, "max_completion_tokens": 6}, 5),
        (True, {"max_tokens": 5}, 5),
        (True, {"max_tokens": 5, "max_completion_tokens": 6}, 6),
        (True, {}, None),
    ],
)
def test_prefill_is_told_the_clients_limit(chat: bool, body: dict[str, Any], limit: int | None) -> None:
    messages = {"messages": [{"role": "user", "content": "a"}]} if chat else {}
    sent = json.loads(request(chat, **messages, **body).for_prefill("h"))
    assert sent["kv_transfer_params"]["max_tokens"] == limit
    assert sent["max_completion_tokens" if chat else "max_tokens"] == 1


def test_an_answer_that_goes_on_says_where() -> None:
    r = request(prompt="a", max_tokens=9, seed=3)
    resume = json.loads(r.for_prefill("h", Resume(answered=[4, 5], seed=6)))["kv_transfer_params"]["resume"]
    assert resume == {"answered": [4, 5], "seed": 6}
    assert json.loads(r.for_decode({}, token_ids=True))["return_token_ids"] is True


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": []}, {"prompt": ["a", "b"]}, {"prompt": [1.5]}, {"prompt": [True]}, {"prompt": None},
        {"n": 2}, {"max_tokens": "x"}, {"max_tokens": True}, {"stream": "yes"},
    ],
)  # fmt: skip
def test_wrong_requests(body: dict[str, Any]) -> None:
    with pytest.raises(WrongRequest):
        request(**body)


@pytest.mark.parametrize("raw", [b"", b"1", b"{", b'"a"', b"\xff", b"[" * 5000, b'{"prompt":"a\\ud800"}'])
def test_not_a_json_object(raw: bytes) -> None:
    with pytest.raises(WrongRequest):
        Request(raw, chat=False, model_name="m", id="i")


def test_other_model() -> None:
    with pytest.raises(UnknownModel):
        request(model="x")


def test_ids() -> None:
    assert request_id("abc-1.2_X") == "abc-1.2_X"
    for said in (None, "", "a b", "a\n", "x" * 129, "é"):
        assert request_id(said) not in (said, request_id(said))


@given(st.lists(st.integers(0, 3), max_size=300), st.integers(1, 12))
def test_known_beginnings(prompt: list[int], most: int) -> None:
    known = Prefixes(most)
    pieces = prefix(prompt)
    assert len(pieces) == len(prompt) // PIECE_TOKENS
    assert known.known_tokens(pieces) == 0
    known.note(pieces)
    assert len(known) <= most
    assert known.known_tokens(pieces) == PIECE_TOKENS * min(most, len(pieces))
    assert prefix([*prompt, 9])[: len(pieces)] == pieces
    assert prefix([9, *prompt])[: len(pieces)] != pieces or not pieces


def test_what_was_not_asked_for_lately_is_forgotten() -> None:
    known = Prefixes(4)
    a, b, c = (prefix(letter * 512) for letter in (b"a", b"b", b"c"))
    for pieces in (a, b, a, c):
        known.note(pieces)
    assert [known.known_tokens(p) for p in (a, b, c)] == [128, 0, 128]


def test_texts_that_begin_alike() -> None:
    def chat(*said: str) -> Request:
        return request(chat=True, messages=[{"role": "user", "content": c} for c in said])

    one, two = chat("x" * 600), chat("x" * 600, "more")
    assert len(one.prefix) == 2
    assert two.prefix[:2] == one.prefix
    other = request(prompt="x" * 511 + "y")
    assert [a == b for a, b in zip(request(prompt="x" * 600).prefix, other.prefix, strict=True)] == [
        True,
        False,
    ]


def test_retry_after_is_the_queues_own_time() -> None:
    async def test() -> None:
        admission = Admission(Fleet(), 4, 1.0)
        now_s = asyncio.get_running_loop().time()
        for _ in range(4):
            admission.enter()
        with pytest.raises(QueueFull) as full:
            admission.enter()
        assert full.value.retry_after_s == 5  # nothing is known yet
        for k in range(20):  # two a second
            admission._served_s.append(now_s - 10 + k / 2)
        assert admission.wait_s(now_s) == 2
        admission.queued = 1000
        assert admission.wait_s(now_s) == 60
        assert admission.wait_s(now_s + 31) == 5

    asyncio.run(test())


def pod(**status: Any) -> dict[str, Any]:
    labels = {"disaggserve.dev/role": "prefill", "disaggserve.dev/pairing-key": "k"}
    ready = [{"type": "Ready", "status": "True"}]
    return {
        "metadata": {"uid": "u", "name": "n", "labels": labels},
        "status": {"podIP": "10.0.0.1", "phase": "Running", "conditions": ready, **status},
    }


def test_pods_seen() -> None:
    assert discovery.seen(pod()) == (Seen("u", "n", "prefill", "k", "http://10.0.0.1:8000", True),)
    (unready,) = discovery.seen(pod(conditions=[{"type": "Ready", "status": "False"}]))
    assert not unready.ready
    (six,) = discovery.seen(pod(podIP="fd00::1"))
    assert six.url == "http://[fd00::1]:8000"
    for gone in (pod(podIP=None), pod(phase="Failed")):
        assert discovery.seen(gone) == ()
    ending = pod()
    ending["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    ending["metadata"]["labels"]["disaggserve.dev/drain"] = "true"
    (found,) = discovery.seen(ending)
    assert (found.ready, found.draining) == (False, True)
    ending["metadata"]["labels"]["disaggserve.dev/role"] = "mixed"
    (both,) = discovery.seen(ending)
    assert both.role == "mixed"
    ending["metadata"]["labels"]["disaggserve.dev/role"] = "router"
    assert discovery.seen(ending) == ()


def test_a_pair_is_two_instances_at_the_ports_of_their_names() -> None:
    both = pod()
    both["metadata"]["labels"]["disaggserve.dev/role"] = "pair"
    assert discovery.seen(both) == (), "without ports nobody knows where they are"
    ports = [{"name": n, "containerPort": p} for n, p in (("http", 1), ("prefill", 2), ("decode", 3))]
    both["spec"] = {"containers": [{"ports": ports}]}
    assert discovery.seen(both) == (
        Seen("u/prefill", "n", "prefill", "k", "http://10.0.0.1:2", True, pair="u"),
        Seen("u/decode", "n", "decode", "k", "http://10.0.0.1:3", True, pair="u"),
    )


FLAGS = [
    "--resource",
    "r",
    "--model-name",
    "m",
    "--context-length",
    "2048",
    "--ttft",
    "0.25",
    "--tpot",
    "0.1",
]


def test_flags() -> None:
    c = config.parse([*FLAGS, "--namespace", "ns"], {"POD_IP": "10.0.0.1", "POD_NAMESPACE": "other"})
    assert (c.namespace, c.host, c.port, c.ttft_s, c.queue_timeout_s, c.max_queued) == (
        "ns",
        "10.0.0.1",
        8000,
        0.25,
        60,
        1000,
    )
    assert config.parse(FLAGS, {"POD_IP": "10.0.0.1", "POD_NAMESPACE": "other"}).namespace == "other"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (FLAGS, "POD_IP"),
        ([*FLAGS, "--host", "h", "--ttft", "0"], "above 0"),
        ([*FLAGS, "--host", "h", "--odd"], "--odd"),
    ],
)
def test_wrong_flags(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        config.parse(flags, {"POD_NAMESPACE": "ns"})
    assert said in capsys.readouterr().err

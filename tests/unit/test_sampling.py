"""How a token is chosen, what is said of it, and how a body asks for that."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from disaggserve.protocol import Logprobs  # noqa: E402
from disaggworker import openai  # noqa: E402
from disaggworker.engine.sampling import choose  # noqa: E402
from disaggworker.engine.sequence import Sampling, Sequence, Token  # noqa: E402
from disaggworker.errors import RequestError  # noqa: E402

LOGITS = torch.tensor([2.0, 0.5, 1.5, -1.0, 1.0, -torch.inf])


def at(place: int, **how: Any) -> Sequence:
    return Sequence([0], Sampling(**how), 8, lambda token, finish: None, output=[0] * place)


def drawn(count: int, **how: Any) -> Counter[int]:
    """Tokens of so many places of one seed."""
    return Counter(choose(LOGITS[None], [at(place, seed=3, **how)])[0].id for place in range(count))


def test_a_draw_depends_on_seed_and_place_and_not_on_neighbours() -> None:
    logits = torch.randn(64, generator=torch.Generator().manual_seed(1))
    alone = [choose(logits[None], [at(place, seed=9)])[0].id for place in range(32)]
    assert alone == [choose(logits[None], [at(place, seed=9)])[0].id for place in range(32)]
    assert alone != [choose(logits[None], [at(place, seed=10)])[0].id for place in range(32)]
    batch = [at(5, seed=1), at(7, temperature=0.0, logprobs=3), *(at(place, seed=9) for place in range(32))]
    assert [token.id for token in choose(logits.repeat(34, 1), batch)][2:] == alone


def test_shares_are_those_of_the_temperature() -> None:
    count = 1500
    for temperature in (0.5, 1.0, 2.0):
        share = (LOGITS / temperature).softmax(-1).tolist()
        found = drawn(count, temperature=temperature)
        for token, p in enumerate(share):
            assert abs(found[token] / count - p) < 4 * (p * (1 - p) / count) ** 0.5 + 1e-9


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 2, 4}),
        ({"top_p": 0.0}, {0}),
        ({"top_p": 0.6}, {0, 2}),  # shares: 0.44, 0.27, 0.16, 0.10, 0.02
        ({"top_p": 0.8, "top_k": 2}, {0, 2}),
        ({"temperature": 1e-30}, {0}),
        ({}, {0, 1, 2, 3, 4}),
    ],
)
def test_filters_leave_the_likeliest(how: dict[str, Any], left: set[int]) -> None:
    assert set(drawn(400, **how)) == left


def test_logprobs_are_the_models_own() -> None:
    wanted = LOGITS.log_softmax(-1).tolist()
    batch = [at(0), at(0, temperature=0.5, top_k=1, logprobs=0), at(0, temperature=0.0, logprobs=20)]
    none, chosen, full = choose(LOGITS.repeat(3, 1), batch)
    assert none.logprobs is None
    assert chosen.logprobs == Logprobs(chosen=pytest.approx(wanted[0]), top=[])
    assert full.logprobs is not None
    assert [token for token, _ in full.logprobs.top] == [0, 2, 4, 1, 3, 5]
    assert full.logprobs.top[-1] == (5, -9999.0)
    assert full.logprobs.top[:2] == [(0, pytest.approx(wanted[0])), (2, pytest.approx(wanted[2]))]


# ------------------------------------------------------------------------------------------------- bodies and answers


def read(*, chat: bool = False, **more: Any) -> openai.Ask:
    return openai.read(json.dumps({"kv_transfer_params": {}, **more}).encode(), chat=chat)


def test_what_a_body_asks() -> None:
    assert read().sampling.logprobs is None
    assert [read(logprobs=n).sampling.logprobs for n in (0, 5, 20)] == [0, 5, 20]
    assert read(chat=True, logprobs=True).sampling.logprobs == 0
    assert read(chat=True, logprobs=True, top_logprobs=4).sampling.logprobs == 4
    assert read(chat=True, logprobs=False, top_logprobs=0).sampling.logprobs is None
    assert read(stop_token_ids=[7, 9]).sampling.stop_ids == {7, 9}
    assert read(seed=-5).seed == -5


@pytest.mark.parametrize(
    ("chat", "body", "words"),
    [
        (False, {"logprobs": 21}, "logprobs must be an integer from 0 to 20, not 21"),
        (False, {"logprobs": True}, "logprobs must be an integer"),
        (False, {"top_logprobs": 2}, "takes the number as logprobs"),
        (True, {"logprobs": 3}, "logprobs must be true or false"),
        (True, {"top_logprobs": 3}, "top_logprobs needs logprobs"),
        (True, {"logprobs": True, "top_logprobs": 21}, "top_logprobs must be an integer from 0 to 20"),
        (False, {"stop_token_ids": 3}, "stop_token_ids must be a list"),
        (False, {"stop_token_ids": ["a"]}, "stop_token_ids must be a list"),
        (False, {"seed": 2**63}, "seed must be an integer from"),
        (False, {"top_p": 1.5}, "top_p must be a number from 0 to 1"),
        (False, {"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        (False, {"min_tokens": 5}, "min_tokens is not supported"),
        (True, {"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ],
)
def test_what_a_body_cannot_ask(chat: bool, body: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read(chat=chat, **body)


SPELLING = {1: b"<s>", 2: b"a", 3: "€".encode()[:1], 4: "€".encode()[:2]}


def said(chat: bool) -> Any:
    ask = read(chat=chat, logprobs=True, top_logprobs=2) if chat else read(logprobs=2)
    pieces = [
        openai.Piece(Token(2, Logprobs(chosen=-2.0, top=[(1, -0.5), (3, -1.0)])), "a", 0, None),
        openai.Piece(Token(1, Logprobs(chosen=-0.5, top=[(3, -0.6), (4, -0.7)])), "", 1, "stop"),
    ]
    body = openai.answer(ask, "i", 1, "m", pieces, SPELLING.__getitem__, prompt_tokens=3)
    whole = json.loads(body)["choices"][0]["logprobs"]
    frames = openai.Frames(ask, "i", 1, "m", SPELLING.__getitem__)
    streamed = [
        json.loads(frames.token(piece).removeprefix(b"data: "))["choices"][0]["logprobs"] for piece in pieces
    ]
    assert [list(part) for part in streamed] == [list(whole)] * 2
    for key, value in whole.items():
        if value is not None:
            assert [x for part in streamed for x in part[key]] == value
    return whole


def test_logprobs_of_a_completion() -> None:
    assert said(chat=False) == {
        "text_offset": [0, 1],
        "token_logprobs": [-2.0, -0.5],
        "tokens": ["a", "<s>"],
        # Half a character spells as the replacement character: the likelier of two stays.
        "top_logprobs": [{"<s>": -0.5, "\ufffd": -1.0, "a": -2.0}, {"\ufffd": -0.6, "<s>": -0.5}],
    }


def test_logprobs_of_a_chat() -> None:
    first, second = said(chat=True)["content"]
    assert first == {
        "token": "a",
        "logprob": -2.0,
        "bytes": [97],
        "top_logprobs": [
            {"token": "<s>", "logprob": -0.5, "bytes": [60, 115, 62]},
            {"token": "\ufffd", "logprob": -1.0, "bytes": [0xE2]},
        ],
    }
    assert (second["token"], [top["bytes"] for top in second["top_logprobs"]]) == (
        "<s>",
        [[0xE2], [0xE2, 0x82]],
    )

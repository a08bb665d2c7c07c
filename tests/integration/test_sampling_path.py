"""Sampling, stopping and logprobs through router, prefill and decode: what one process that does it all would give."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disaggworker.router.app import serving
from disaggworker.router.config import Config
from disaggworker.router.fleet import Seen
from e2e.nodes.tiny import make_tiny
from tests.integration.test_router import free_port
from tests.integration.worker_pair import DECODE, PREFILL, pair, url

torch = pytest.importorskip("torch")

MODEL = "Qwen/Qwen3-8B"
PROMPT = [10 + 7 * i % 400 for i in range(21)]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENS = 24

Answer = tuple[str, list[int], str, Any]  # text, token ids, finish reason, logprobs


def reference(folder: Path) -> Callable[..., list[Any]]:
    """transformers' logits and our choice from them, in one process and for one request."""
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM

    from disaggworker.engine.sampling import choose
    from disaggworker.engine.sequence import Sampling, Sequence

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def tokens(**how: Any) -> list[Any]:
        sequence, said = Sequence(PROMPT, Sampling(**how), TOKENS, lambda token, finish: None), []
        with torch.inference_mode():
            for _ in range(TOKENS):
                said += choose(model(torch.tensor([PROMPT + sequence.output])).logits[0, -1:], [sequence])
                sequence.output.append(said[-1].id)
        return said

    return tokens


def merged(parts: list[Any]) -> Any:
    """Logprobs of frames as those of the whole."""
    if parts[0] is None:
        assert parts == [None] * len(parts)
        return None
    keys = [key for key, value in parts[0].items() if value is not None]
    assert all(len(part[keys[0]]) == 1 for part in parts)  # a token a frame
    return {key: [value for part in parts for value in part[key]] for key in keys}


def close(one: Any, other: Any) -> bool:
    """Equal, but for the last digits of numbers: a batch of another size may round otherwise."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return abs(one - other) < 1e-3 if isinstance(one, float) else one == other


def read(data: bytes, *, stream: bool) -> Answer:
    if not stream:
        (choice,) = json.loads(data)["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return text, choice["token_ids"], choice["finish_reason"], choice["logprobs"]
    frames = [json.loads(part.removeprefix(b"data: ")) for part in data.split(b"\n\n")[:-2]]
    choices = [choice for frame in frames for choice in frame["choices"]]
    text = "".join(c["text"] if "text" in c else c["delta"]["content"] for c in choices)
    tokens = [token for choice in choices for token in choice["token_ids"]]
    return text, tokens, choices[-1]["finish_reason"], merged([choice["logprobs"] for choice in choices])


def test_an_answer_is_that_of_one_process(tmp_path: Path) -> None:
    folder = make_tiny(MODEL, tmp_path / "weights", layers=2, heads=4, hidden=64)
    said = reference(folder)

    async def test() -> None:
        config = Config("ns", "chat", MODEL, 2048, 60.0, 60.0, "127.0.0.1", port=free_port(), linger_s=0.0)
        async with pair(MODEL, folder, "--context-length", "2048") as workers, serving(config) as router:
            router.update(
                [
                    Seen("p", "p", "prefill", "key", url(PREFILL, ""), True),
                    Seen("d", "d", "decode", "key", url(DECODE, ""), True),
                ]
            )

            async def ask(path: str = COMPLETIONS, **more: Any) -> Answer:
                """Both ways, which must say the same."""
                body = {
                    "model": MODEL,
                    "max_tokens": TOKENS,
                    "temperature": 0,
                    "return_token_ids": True,
                    **more,
                }
                if path == COMPLETIONS:
                    body["prompt"] = PROMPT
                answers = []
                for stream in (False, True):
                    asked = {**body, "stream": stream}
                    async with workers.session.post(
                        f"http://127.0.0.1:{config.port}{path}", json=asked
                    ) as answer:
                        data = await answer.read()
                        assert answer.status == 200, data
                        answers.append(read(data, stream=stream))
                whole, streamed = answers
                assert whole[:3] == streamed[:3]
                if whole[3] is not None and path == CHAT:
                    assert whole[3].pop("refusal") is None
                assert close(whole[3], streamed[3])
                return whole

            # Sampled, alone and in company.
            how = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 7}
            expected = said(**how, logprobs=3)
            asked = {**how, "logprobs": 3, "ignore_eos": True}
            others = [ask(**{**asked, "seed": seed}) for seed in (1, 2, 3)]
            alone, (again, *different) = await ask(**asked), await asyncio.gather(ask(**asked), *others)
            for answer in (alone, again):
                assert answer[1] == [token.id for token in expected]
                found = answer[3]
                assert found["token_logprobs"] == pytest.approx(
                    [t.logprobs.chosen for t in expected], abs=1e-3
                )
                for top, token in zip(found["top_logprobs"], expected, strict=True):
                    if "\ufffd" not in top:  # several halves of characters would count as one
                        ids = {token.id, *(id for id, _ in token.logprobs.top)}
                        assert len(top) == len(ids)
                        assert max(top.values()) == pytest.approx(token.logprobs.top[0][1], abs=1e-3)
            assert all(answer[1] != alone[1] for answer in different)

            # Greedy: every token is the likeliest, and stands in the text where its offset says.
            greedy = [token.id for token in said(temperature=0.0)]
            text, tokens, finish, found = await ask(ignore_eos=True, logprobs=0)
            assert (tokens, finish) == (greedy, "length")
            assert [list(top) for top in found["top_logprobs"]] == [[name] for name in found["tokens"]]
            whole = [
                (at, name)
                for at, name in zip(found["text_offset"], found["tokens"], strict=True)
                if "\ufffd" not in name
            ]
            assert len(whole) > TOKENS // 2
            assert all(text[at:].startswith(name) for at, name in whole)

            # Stop: at a token, which is counted and not shown, on prefill and on decode; and at a string.
            late = next(i for i in range(3, TOKENS) if greedy[i] not in greedy[:i])
            for end in (0, late):
                shown, tokens, finish, _ = await ask(stop_token_ids=[greedy[end]], ignore_eos=True)
                assert (tokens, finish) == (greedy[: end + 1], "stop")
                assert shown == text[: found["text_offset"][end]]
            stop = text[6:9]
            shown, tokens, finish, _ = await ask(stop=[stop], ignore_eos=True)
            assert (shown, finish) == (text[: text.index(stop)], "stop")
            assert tokens == greedy[: len(tokens)]

            # Chat has another shape for the same.
            messages = [{"role": "user", "content": "Hello"}]
            asked = {"messages": messages, "logprobs": True, "ignore_eos": True, "max_tokens": 9}
            _, tokens, _, found = await ask(CHAT, **asked, top_logprobs=2)
            assert len(tokens) == len(found["content"]) == 9
            for entry in found["content"]:
                first, second = entry["top_logprobs"]
                assert {key: entry[key] for key in first} == first
                assert second["logprob"] <= first["logprob"]
                assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
            # An answer of one token is prefill's alone.
            _, _, _, found = await ask(CHAT, **{**asked, "max_tokens": 1})
            (entry,) = found["content"]
            assert entry["top_logprobs"] == []
            assert (await ask(CHAT, messages=messages))[3] is None

    asyncio.run(test())

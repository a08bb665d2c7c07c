"""prefill → KV → decode, through two real processes, gives transformers' greedy tokens."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from e2e.nodes.tiny import make_tiny
from tests.integration.worker_pair import DECODE, PREFILL, Pair, pair

MODELS = {"opt": "facebook/opt-13b", "llama": "meta-llama/Meta-Llama-3-8B", "qwen3": "Qwen/Qwen3-8B"}
LENGTHS = (1, 2, 15, 16, 17, 40, 100, 255, 400, 700)
CROWD = (60,) * 12  # four blocks each, and seven when they are done: together more than there are
BLOCKS = 48
TOKENS = 40


def prompts(vocabulary: int) -> list[list[int]]:
    """Different prompts without special tokens."""
    return [
        [5 + (i * 7919 + number * 31) % (vocabulary - 5) for i in range(n)]
        for number, n in enumerate(LENGTHS + CROWD)
    ]


def greedy(folder: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What transformers says, in float32."""
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module", params=list(MODELS))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[list[int]], list[list[int]]]:
    model = MODELS[request.param]
    folder = make_tiny(model, tmp_path_factory.mktemp("tiny") / request.param, layers=2, heads=4, hidden=64)
    asked = prompts(500)
    return model, folder, asked, greedy(folder, asked, TOKENS)


async def ask_all(workers: Pair, asked: list[list[int]]) -> list[list[int]]:
    """Everything at once."""
    body = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    answers = await asyncio.gather(*(workers.complete({**body, "prompt": prompt}) for prompt in asked))
    assert {finish for _, _, finish in answers} == {"length"}
    return [tokens for _, tokens, _ in answers]


def test_tokens_are_those_of_transformers(
    checkpoint: tuple[str, Path, list[list[int]], list[list[int]]],
) -> None:
    model, folder, asked, expected = checkpoint
    one = len(LENGTHS)

    async def check() -> None:
        decode = ["--kv-blocks", str(BLOCKS)]
        async with pair(model, folder, "--context-length", "768", decode=decode) as workers:
            assert [(await ask_all(workers, [prompt]))[0] for prompt in asked[:one]] == expected[:one]
            assert await ask_all(workers, asked[:one]) == expected[:one]
            assert await ask_all(workers, asked[one:]) == expected[one:]
            assert await workers.metric(DECODE, "vllm:num_preemptions_total") > 0
            # Nothing is left behind on either side.
            for host in (PREFILL, DECODE):
                _, state = await workers.get(host, "/state")
                total = json.loads(state)["total_blocks"]
                await workers.until(host, "/state", {"free_blocks": total, "leased_blocks": 0, "running": 0})

    asyncio.run(check())

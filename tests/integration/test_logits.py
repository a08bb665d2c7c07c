"""Forward passes in process give transformers' logits: prompts packed together, the token after them, and chunks beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.nodes.tiny import make_tiny

torch = pytest.importorskip("torch")

MODELS = ("facebook/opt-13b", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B")
LENGTHS = (1, 2, 15, 16, 17, 33, 64, 100, 129, 255, 300)
# Tokens of a step for a text of n: whole but for those to come, singles, odd chunks, chunks of some beside singles of others.
SHARES: tuple[Callable[[int], int], ...] = (
    lambda n: n - 41 if n > 41 else n // 2,
    lambda n: 1,
    lambda n: 13 if n % 2 else 1,
    lambda n: 7,
    lambda n: 1 if n % 3 else 17,
    lambda n: n,
)


@pytest.mark.parametrize("model_id", MODELS)
def test_logits_are_those_of_transformers(model_id: str, tmp_path: Path) -> None:
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM

    from disaggworker.engine.runner import Runner
    from disaggworker.engine.step import Step
    from disaggworker.kv.blocks import blocks_for
    from disaggworker.kv.pool import Pool
    from disaggworker.model.load import load

    folder = make_tiny(model_id, tmp_path / "tiny", layers=2, heads=4, hidden=64)
    oracle: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, _ = load(folder, "float32")
    texts = [[5 + (7919 * i + 31 * row) % 500 for i in range(n)] for row, n in enumerate(LENGTHS)]
    owned, first = [], 0
    for n in LENGTHS:
        owned.append(list(range(first, first + blocks_for(n))))
        first += len(owned[-1])
    runner = Runner(
        model, Pool(model.layers, model.kv_heads, model.head_dim, first, model.dtype, model.device)
    )
    with torch.inference_mode():
        expected = [oracle(torch.tensor([text])).logits[0].to(model.device) for text in texts]
        done = [0] * len(texts)
        for share in SHARES:
            counts = [min(share(n), n - at) for n, at in zip(LENGTHS, done, strict=True)]
            rows = [row for row, count in enumerate(counts) if count]
            step = Step(
                [token for row in rows for token in texts[row][done[row] : done[row] + counts[row]]],
                [counts[row] for row in rows],
                [done[row] for row in rows],
                [owned[row] for row in rows],
                list(range(0, len(rows), 2)),
            )
            logits = runner.begin(step).logits()
            for row in rows:
                done[row] += counts[row]
            wanted = torch.stack([expected[row][done[row] - 1] for row in rows[::2]])
            torch.testing.assert_close(logits, wanted, atol=3e-4, rtol=1e-5)
    assert done == list(LENGTHS)


def test_a_window_is_refused(tmp_path: Path) -> None:
    from disaggworker.errors import StartError
    from disaggworker.model.load import load

    config = make_tiny("Qwen/Qwen3-8B", tmp_path / "tiny") / "config.json"
    config.write_text(config.read_text().replace('"use_sliding_window": false', '"use_sliding_window": true'))
    with pytest.raises(StartError, match="use_sliding_window"):
        load(tmp_path / "tiny", "float32")

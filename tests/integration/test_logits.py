"""One forward pass in process gives transformers' logits, for prompts packed together and for the token after them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from e2e.nodes.tiny import make_tiny

torch = pytest.importorskip("torch")

MODELS = ("facebook/opt-13b", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B")
LENGTHS = (1, 2, 15, 16, 17, 33, 64, 100, 129, 255)


@pytest.mark.parametrize("model_id", MODELS)
def test_logits_are_those_of_transformers(model_id: str, tmp_path: Path) -> None:
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM

    from disaggworker.kv.blocks import blocks_for
    from disaggworker.kv.pool import DecodeAttention, Pool, PrefillAttention
    from disaggworker.model.load import load

    folder = make_tiny(model_id, tmp_path / "tiny", layers=2, heads=4, hidden=64)
    oracle: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, _ = load(folder, "float32")
    # One token more than the prompt: the last one goes through the decode path.
    texts = [[5 + (7919 * i + 31 * row) % 500 for i in range(n + 1)] for row, n in enumerate(LENGTHS)]
    owned, first = [], 0
    for n in LENGTHS:
        owned.append(list(range(first, first + blocks_for(n + 1))))
        first += len(owned[-1])
    pool = Pool(model.layers, model.kv_heads, model.head_dim, first, model.dtype, model.device)
    with torch.inference_mode():
        expected = [oracle(torch.tensor([text])).logits[0].to(model.device) for text in texts]
        tokens = torch.tensor([t for text in texts for t in text[:-1]], device=model.device)
        positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(model.device)
        prompts = model.forward(tokens, positions, PrefillAttention(pool, LENGTHS, owned), None)
        after = model.forward(
            torch.tensor([text[-1] for text in texts], device=model.device),
            torch.tensor(LENGTHS, device=model.device),
            DecodeAttention(pool, [n + 1 for n in LENGTHS], owned),
            None,
        )
    torch.testing.assert_close(prompts, torch.cat([e[:-1] for e in expected]), atol=3e-4, rtol=1e-5)
    torch.testing.assert_close(after, torch.stack([e[-1] for e in expected]), atol=3e-4, rtol=1e-5)


def test_a_window_is_refused(tmp_path: Path) -> None:
    from disaggworker.errors import StartError
    from disaggworker.model.load import load

    config = make_tiny("Qwen/Qwen3-8B", tmp_path / "tiny") / "config.json"
    config.write_text(config.read_text().replace('"use_sliding_window": false', '"use_sliding_window": true'))
    with pytest.raises(StartError, match="use_sliding_window"):
        load(tmp_path / "tiny", "float32")

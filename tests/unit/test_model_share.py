"""The shares of a model, computed side by side in threads, give what the whole model gives, and each reads its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from e2e.nodes.tiny import make_tiny

torch = pytest.importorskip("torch")

COUNTS = (1, 17, 40)
TOKENS = [5 + (i * 7919) % 500 for i in range(sum(COUNTS))]
TABLES = [[0], [1, 2], [3, 4, 5]]
CASES = [
    # model, heads (a Llama's KV heads are half as many), tp, pp
    ("facebook/opt-13b", 4, 2, 1),
    ("facebook/opt-13b", 4, 4, 2),
    ("meta-llama/Meta-Llama-3-8B", 4, 2, 2),
    ("meta-llama/Meta-Llama-3-8B", 8, 8, 1),  # two ranks share a KV head
    ("Qwen/Qwen3-8B", 4, 2, 1),
    ("Qwen/Qwen3-0.6B", 4, 4, 2),  # tied embeddings on two stages
]


class _Sum:
    """An all-reduce between threads."""

    def __init__(self, tp: int) -> None:
        self._parts: list[Any] = [None] * tp
        self._barrier = threading.Barrier(tp)

    def of(self, rank: int) -> Any:
        def reduce(x: Any) -> Any:
            self._parts[rank] = x
            self._barrier.wait(30)
            total = sum(self._parts)
            self._barrier.wait(30)
            return total

        return reduce


def _stage(folder: Path, share: Any, x: Any) -> tuple[Any, Any]:
    from disaggworker.engine.attention import Attention
    from disaggworker.engine.step import Step
    from disaggworker.kv.pool import Pool
    from disaggworker.model.load import load

    with torch.inference_mode():
        model, _ = load(folder, "float32", share)
        pool = Pool(model.layers, model.kv_heads, model.head_dim, 6, model.dtype, model.device)
        step = Step(TOKENS, list(COUNTS), [0] * len(COUNTS), TABLES, [])
        positions = torch.from_numpy(step.positions())
        return model, model.forward(x, positions, Attention(pool, step), None)


@pytest.mark.parametrize(("model_id", "heads", "tp", "pp"), CASES)
def test_shares_add_up_to_the_whole(model_id: str, heads: int, tp: int, pp: int, tmp_path: Path) -> None:
    from disaggworker.model.share import WHOLE, Share

    folder = make_tiny(model_id, tmp_path / "tiny", layers=2, heads=heads, hidden=64)
    whole, expected = _stage(folder, WHOLE, torch.tensor(TOKENS))
    x = torch.tensor(TOKENS)
    for stage in range(pp):
        both = _Sum(tp)
        shares = [Share(tp, pp, stage * tp + r, both.of(r)) for r in range(tp)]
        with ThreadPoolExecutor(tp) as threads:
            computed = list(threads.map(_stage, [folder] * tp, shares, [x] * tp))
        x = computed[0][1]
        models = [model for model, _ in computed]
        assert [m.layer_range for m in models] == [range(stage * 2 // pp, (stage + 1) * 2 // pp)] * tp
        held = [head for m in models for head in m.kv_head_range]
        assert sorted(set(held)) == list(range(whole.kv_heads))
        assert len(held) == max(tp, whole.kv_heads)
    logits = torch.cat([part for _, part in computed], -1)
    torch.testing.assert_close(logits, expected, atol=3e-4, rtol=1e-5)


def test_a_rank_reads_its_slices_alone(tmp_path: Path) -> None:
    from disaggworker.model.llama import Llama
    from disaggworker.model.share import Share
    from disaggworker.model.weights import Weights, config

    folder = make_tiny("Qwen/Qwen3-8B", tmp_path / "tiny", layers=2, heads=4, hidden=64)

    def taken(tp: int, pp: int, rank: int) -> int:
        weights = Weights(folder, torch.float32, torch.device("cpu"))
        Llama(config(folder), weights, Share(tp, pp, rank))
        return weights.taken_bytes

    row = 64 * 4  # bytes of one token in the embedding, and in the head
    vocabulary = int(config(folder)["vocab_size"])
    table, halves = vocabulary * row, [(vocabulary + 1) // 2 * row, vocabulary // 2 * row]
    norms = (2 * 2 * 64 + 2 * 2 * 32) * 4  # of both layers: hidden and head_dim wide
    final = 64 * 4
    matrices = taken(1, 1, 0) - 2 * table - norms - final
    assert matrices > table
    assert [taken(2, 1, r) for r in (0, 1)] == [table + h + norms + final + matrices // 2 for h in halves]
    stage = norms // 2 + matrices // 2
    assert [taken(1, 2, r) for r in (0, 1)] == [table + stage, table + stage + final]
    assert taken(2, 2, 3) == halves[1] + norms // 2 + matrices // 4 + final


@pytest.mark.parametrize(
    ("model_id", "tp", "pp", "sentence"),
    [
        ("facebook/opt-13b", 3, 1, "--tp 3 does not divide the model's 4 heads and its feed-forward of 256."),
        ("Qwen/Qwen3-8B", 1, 4, "--pp 4 does not divide the model's 2 layers."),
    ],
)
def test_a_cut_that_does_not_divide_is_refused(
    model_id: str, tp: int, pp: int, sentence: str, tmp_path: Path
) -> None:
    from disaggworker.errors import StartError
    from disaggworker.model.load import load
    from disaggworker.model.share import Share

    folder = make_tiny(model_id, tmp_path / "tiny", layers=2, heads=4, hidden=64)
    with pytest.raises(StartError) as caught:
        load(folder, "float32", Share(tp, pp))
    assert str(caught.value) == sentence

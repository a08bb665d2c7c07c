"""Our engine against transformers' `generate`: the same 100M Llama on one CPU thread.

    python benchmarks/engine_cpu.py [float32|bfloat16 …]

Prefill: one prompt of 512 tokens, and sixteen of 128, to the last one's first token. Decode: one token more of each, for
sixteen steps. Ours goes through the whole of an engine's loop (scheduling, paged KV, sampling), greedily; the two take turns in
one process, so that what disturbs the machine disturbs both. Ratios above 1: ours is faster.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import torch

from disaggworker.engine.engine import Engine
from disaggworker.engine.runner import Runner
from disaggworker.engine.scheduler import Scheduler
from disaggworker.engine.sequence import Sampling, Sequence
from disaggworker.kv.blocks import BlockManager, blocks_for
from disaggworker.kv.pool import Pool
from disaggworker.model.load import load
from e2e.nodes.tiny import make_tiny

SHAPE = {"hidden": 768, "layers": 14, "heads": 12}
POINTS = ((1, 512), (16, 128))  # prompts at once, tokens of each
STEPS, TURNS = 16, 3
GREEDY = Sampling(temperature=0.0, ignore_eos=True)

Generate = Callable[
    [list[list[int]]], tuple[float, float]
]  # when all prompts had their first token, and their last


def prompts(batch: int, length: int, turn: int) -> list[list[int]]:
    return [
        [10 + (7919 * place + 31 * row + 101 * turn) % 700 for place in range(length)] for row in range(batch)
    ]


def ours(weights: Path, dtype: str) -> Generate:
    model, ends = load(weights, dtype)
    total = sum(batch * blocks_for(length + STEPS + 1) for batch, length in POINTS)
    pool = Pool(model.layers, model.kv_heads, model.head_dim, total, model.dtype, model.device)
    scheduler = Scheduler(BlockManager(total), batch_tokens=512)
    stamps: list[float] = []
    engine = Engine(
        Runner(model, pool),
        scheduler,
        ends,
        None,
        lambda events: stamps.extend([time.perf_counter()] * len(events)),
    )

    def generate(asked: list[list[int]]) -> tuple[float, float]:
        stamps.clear()
        for prompt in asked:
            engine.submit(Sequence(prompt, GREEDY, 1 + STEPS, lambda _token, _finish: None))
        while len(stamps) < (1 + STEPS) * len(asked):
            engine.turn(time.monotonic())
        return stamps[len(asked) - 1], stamps[-1]

    return generate


def theirs(weights: Path, dtype: str) -> Generate:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, dtype)).eval()

    def generate(asked: list[list[int]]) -> tuple[float, float]:
        tokens, stamps = torch.tensor(asked), []

        def stamp(_tokens: Any, scores: Any) -> Any:
            stamps.append(time.perf_counter())
            return scores

        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=1 + STEPS,
            min_new_tokens=1 + STEPS,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[stamp],
        )
        return stamps[0], stamps[-1]

    return generate


def measured(engines: dict[str, Generate]) -> dict[str, dict[str, float]]:
    """Seconds by point and engine: the median of turns, after one that is not counted."""
    taken: dict[str, dict[str, list[float]]] = {}
    for (batch, length), turn in itertools.product(POINTS, range(TURNS + 1)):
        for name, generate in engines.items():
            begun = time.perf_counter()
            first, last = generate(prompts(batch, length, turn))
            for point, seconds in (
                (f"prefill of {batch} × {length}", first - begun),
                (f"decode step of {batch} at {length}", (last - first) / STEPS),
            ):
                if turn:
                    taken.setdefault(point, {}).setdefault(name, []).append(seconds)
    return {p: {name: statistics.median(v) for name, v in by.items()} for p, by in taken.items()}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        weights = make_tiny("llama-100m", Path(scratch) / "model", **SHAPE)
        for dtype in sys.argv[1:] or ["float32", "bfloat16"]:
            with torch.inference_mode():
                found = measured({"ours": ours(weights, dtype), "transformers": theirs(weights, dtype)})
            print(f"{dtype}, one thread, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
            for point, by in found.items():
                ratio = by["transformers"] / by["ours"]
                print(
                    f"  {point:24} {1e3 * by['ours']:8.1f} ms   transformers / ours {ratio:5.2f}", flush=True
                )


if __name__ == "__main__":
    main()

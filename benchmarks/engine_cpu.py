"""Our engine against transformers' `generate` and a real vLLM: the same 100M Llama on one CPU thread.

    python benchmarks/engine_cpu.py [--turns 3] [--compiled] [float32 bfloat16]     # vLLM's column needs: make e2e-vllm

Prefill: one prompt of 512 tokens, and sixteen of 128, to the last one's first token. Decode: one token more of each, for
sixteen steps. Ours goes through the whole of an engine's loop (scheduling, paged KV, sampling), greedily; so does vLLM's, without
HTTP, a tokenizer or prefix caching, eager as `make e2e-vllm` serves it, or `--compiled`. Each has a process of its own. They take
turns, so that what disturbs the machine disturbs all. Ratios above 1: ours is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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
from e2e.vllm import environment

SHAPE = {"hidden": 768, "layers": 14, "heads": 12}
POINTS = ((1, 512), (16, 128))  # prompts at once, tokens of each
STEPS = 16
GREEDY = Sampling(temperature=0.0, ignore_eos=True)

# In how many seconds all prompts had their first token, and in how many more their last.
Generate = Callable[[list[list[int]]], tuple[float, float]]


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
        begun = time.perf_counter()
        for prompt in asked:
            engine.submit(Sequence(prompt, GREEDY, 1 + STEPS, lambda _token, _finish: None))
        while len(stamps) < (1 + STEPS) * len(asked):
            engine.turn(time.monotonic())
        first = stamps[len(asked) - 1]
        return first - begun, stamps[-1] - first

    return generate


@contextlib.contextmanager
def peer(name: str, weights: Path, dtype: str) -> Iterator[Generate]:
    """Another engine, in a process of its own."""
    python, env = sys.executable, dict(os.environ)
    if name != "transformers":
        python = str(environment.folder() / "bin" / "python3")
        env |= environment.variables(weights.parent / "home")
    program = Path(__file__).with_name("engine_peers.py")
    with (
        (weights.parent / f"{name}.log").open("w+") as log,
        subprocess.Popen(
            [python, str(program), name, str(weights), dtype, str(1 + STEPS)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            bufsize=1,
        ) as process,
    ):
        assert process.stdin
        assert process.stdout
        asks, answers = process.stdin, process.stdout

        def answer() -> str:
            if not (line := answers.readline()):
                log.seek(0)
                raise SystemExit(f"{name} has ended:\n{log.read()[-3000:]}")
            return line

        def generate(asked: list[list[int]]) -> tuple[float, float]:
            asks.write(json.dumps(asked) + "\n")
            first, rest = json.loads(answer())
            return first, rest

        answer()
        yield generate


def measured(engines: dict[str, Generate], turns: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by point and engine, one a turn; the first turn is not counted."""
    taken: dict[str, dict[str, list[float]]] = {}
    for (batch, length), turn in itertools.product(POINTS, range(turns + 1)):
        for name, generate in engines.items():
            first, rest = generate(prompts(batch, length, turn))
            for point, seconds in (
                (f"prefill of {batch} × {length}", first),
                (f"decode step of {batch} at {length}", rest / STEPS),
            ):
                if turn:
                    taken.setdefault(point, {}).setdefault(name, []).append(seconds)
    return taken


def compared(peer: list[float], own: list[float]) -> str:
    """The median of the turns' ratios, and their range."""
    ratios = sorted(a / b for a, b in zip(peer, own, strict=True))
    return f"{statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("dtypes", nargs="*", default=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        weights = make_tiny("llama-100m", Path(scratch) / "model", **SHAPE)
        for dtype in args.dtypes:
            with contextlib.ExitStack() as stack:
                names = ["transformers", *["vllm-compiled" if args.compiled else "vllm"] * environment.made()]
                engines = {"ours": ours(weights, dtype)}
                engines |= {name: stack.enter_context(peer(name, weights, dtype)) for name in names}
                stack.enter_context(torch.inference_mode())
                found = measured(engines, args.turns)
            print(f"{dtype}, one thread, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
            for point, by in found.items():
                own = by.pop("ours")
                ratios = (f"{name} / ours {compared(seconds, own)}" for name, seconds in by.items())
                print(
                    f"  {point:24} {1e3 * statistics.median(own):8.1f} ms   {'   '.join(ratios)}", flush=True
                )


if __name__ == "__main__":
    main()

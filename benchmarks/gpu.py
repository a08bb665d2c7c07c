"""The engine on an NVIDIA GPU: are its tokens right, how much of the hardware does it use, and its measurements.

    python benchmarks/gpu.py [folder]      # where the measurements go as CSV; default: nowhere

Tokens: tiny models of each architecture, greedily, by prompts packed together, by chunks, and by decode steps, against
transformers on the CPU. Speed: Llama-3-8B and OPT-13B with random weights in bfloat16, steps as `disaggworker profile`
times them, the host's share with them; the share is the least time that the GPU's datasheet allows over the time taken
(dense bf16 for a prefill, memory bandwidth for a decode step that reads the weights and its context once). Before it, in
the same run, what torch's own matrix product and copy reach.
"""

from __future__ import annotations

import datetime
import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from disaggserve import catalogue
from disaggserve.latency import physics
from disaggworker.engine.runner import runner_for
from disaggworker.engine.step import Step
from disaggworker.kv.blocks import blocks_for
from disaggworker.kv.pool import Pool
from disaggworker.model.llama import Llama
from disaggworker.model.load import Model, load
from disaggworker.model.opt import OPT
from disaggworker.model.weights import ALL, Weights
from disaggworker.profiling import grid
from disaggworker.profiling.inside import Inside
from e2e.nodes.tiny import make_tiny

TINY = ("facebook/opt-13b", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen3-8B")
PROMPTS = (1, 2, 15, 16, 17, 40, 100, 255, 400, 700)
TOKENS, CHUNK = 40, 37
LARGE = ("meta-llama/Meta-Llama-3-8B", "facebook/opt-13b")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
LENGTHS = (64, 128, 256, 512, 1024, 2047, 4096, 8000)  # of prompts
CONTEXTS = (64, 256, 512, 1024, 2040, 4096, 8000)
REPEAT = 5


# ---- tokens


class Sequences:
    """Prompts and answers in a pool of their own, one forward pass after another."""

    def __init__(self, model: Model, prompts: list[list[int]]) -> None:
        counts = [blocks_for(len(prompt) + TOKENS) for prompt in prompts]
        shape = (model.layers, model.kv_heads, model.head_dim)
        self._runner = runner_for(model, Pool(*shape, sum(counts), model.dtype, model.device))
        # From the last block to the first: no sequence's blocks stand in the order of its tokens.
        free = list(range(sum(counts)))
        self._blocks = [[free.pop() for _ in range(count)] for count in counts]
        self._prompts = prompts

    def logits(self, tokens: list[list[int]], starts: list[int]) -> Tensor:
        """Of each sequence that gets tokens, after the last of them."""
        rows = [row for row, some in enumerate(tokens) if some]
        step = Step(
            [token for some in tokens for token in some],
            [len(tokens[row]) for row in rows],
            [starts[row] for row in rows],
            [self._blocks[row] for row in rows],
            list(range(len(rows))),
        )
        return self._runner.begin(step).logits()

    def answers(self, chunk: int) -> list[list[int]]:
        """Greedy tokens; prompts in chunks of so many tokens (0: whole), those that are done decoding beside them."""
        done = [0] * len(self._prompts)
        texts = [list(prompt) for prompt in self._prompts]
        while True:
            left = [len(p) + TOKENS - len(t) for p, t in zip(self._prompts, texts, strict=True)]
            some = [
                text[start : start + chunk if chunk else None] if more else []
                for text, start, more in zip(texts, done, left, strict=True)
            ]
            if not any(some):
                return [text[len(prompt) :] for prompt, text in zip(self._prompts, texts, strict=True)]
            chosen = iter(self.logits(some, done).argmax(-1).tolist())
            for row, tokens in enumerate(some):
                if tokens:
                    token = next(chosen)
                    done[row] += len(tokens)
                    if done[row] == len(texts[row]):
                        texts[row].append(token)


def oracle(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model, on the CPU."""
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def greedy(model: Any, prompt: list[int]) -> list[int]:
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    given = {"attention_mask": mask, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    answer: list[int] = model.generate(torch.tensor([prompt]), **given)[0, len(prompt) :].tolist()
    return answer


def off(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


def parity() -> bool:
    """Print, and say whether all float32 tokens are those of transformers.

    In bfloat16 rounding decides between near tokens: there the logits after each prompt, and after one token more, are
    held against float32's, beside transformers' own in bfloat16.
    """
    prompts = [[5 + (i * 7919 + number * 31) % 495 for i in range(n)] for number, n in enumerate(PROMPTS * 2)]
    good = True
    for model_id in TINY:
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_tiny(model_id, Path(scratch) / "tiny", layers=2, heads=4, hidden=64)
            exact, rough = (oracle(folder, dtype) for dtype in (torch.float32, torch.bfloat16))
            wide, narrow = (load(folder, dtype)[0] for dtype in ("float32", "bfloat16"))
        expected = [greedy(exact, prompt) for prompt in prompts]
        for chunk in (0, CHUNK):
            found = Sequences(wide, prompts).answers(chunk)
            same = sum(f == e for f, e in zip(found, expected, strict=True))
            good &= same == len(prompts)
            how = f"chunks of {chunk}" if chunk else "whole prompts"
            print(f"{model_id} (tiny), float32, {how}: {same} of {len(prompts)} answers of {TOKENS} tokens")
        texts = [[*prompt, answer[0]] for prompt, answer in zip(prompts, expected, strict=True)]
        truth, theirs = (
            torch.stack([model(torch.tensor([text])).logits[0, -2:] for text in texts], 1)
            for model in (exact, rough)
        )
        sequences = Sequences(narrow, prompts)
        ours = (
            sequences.logits([text[:-1] for text in texts], [0] * len(texts)).clone(),
            sequences.logits([text[-1:] for text in texts], [len(text) - 1 for text in texts]),
        )
        for what, mine, others, true in zip(("prompt", "token"), ours, theirs, truth, strict=True):
            print(
                f"{model_id} (tiny), bfloat16, logits after a {what}: off by {off(mine, true):.2%}, transformers by "
                f"{off(others, true):.2%}"
            )
    return good


# ---- speed


class Random(Weights):
    """Weights of a catalogue model's shape that are in no file, made on the device."""

    def __init__(self, model: catalogue.Model, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._shapes = shapes(model)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def rows(self, name: str) -> int:
        return self._shapes[name][0]

    def take(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        drawn = torch.empty(self._shapes[name], dtype=self.dtype, device=self.device).normal_(0.0, 0.02)
        drawn = drawn[rows] if columns == ALL else drawn[rows, columns]
        return drawn + 1 if "norm.weight" in name else drawn


def shapes(model: catalogue.Model) -> dict[str, tuple[int, ...]]:
    """The tensors of its checkpoint."""
    hidden, ffn, table = model.hidden, model.ffn, (model.vocab, model.hidden)
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    if model.architecture == "opt":
        base = "model.decoder."
        outer: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": table,
            "embed_positions.weight": (model.max_positions + 2, hidden),
            "final_layer_norm.weight": (hidden,),
        }
        inner: dict[str, tuple[int, ...]] = {
            **{f"self_attn.{part}_proj.weight": (hidden, hidden) for part in ("q", "k", "v", "out")},
            **{f"{norm}.weight": (hidden,) for norm in ("self_attn_layer_norm", "final_layer_norm")},
            "fc1.weight": (ffn, hidden),
            "fc2.weight": (hidden, ffn),
        }
    else:
        base = "model."
        outer = {"embed_tokens.weight": table, "norm.weight": (hidden,)}
        inner = {
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "mlp.gate_proj.weight": (ffn, hidden),
            "mlp.up_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
    names = {base + name: shape for name, shape in outer.items()}
    for layer in range(model.layers):
        names |= {f"{base}layers.{layer}.{name}": shape for name, shape in inner.items()}
    if model.architecture == "opt":
        biased = {n: s for n, s in names.items() if "embed" not in n}
        names |= {name.removesuffix("weight") + "bias": shape[:1] for name, shape in biased.items()}
    else:
        names["lm_head.weight"] = table
    return names


def made(model: catalogue.Model) -> Model:
    """The model with random weights, on the GPU."""
    common = {
        "model_type": model.architecture,
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.max_positions,
    }
    weights = Random(model, torch.bfloat16, torch.device("cuda"))
    if model.architecture == "opt":
        return OPT({**common, "ffn_dim": model.ffn}, weights)
    llama = {"num_key_value_heads": model.kv_heads, "intermediate_size": model.ffn, "rope_theta": 500000.0}
    return Llama({**common, **llama}, weights)


def seconds(action: Any, repeat: int) -> float:
    """Of one call on the device, many in a row."""
    action()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(repeat):
        action()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / repeat


def ceilings(gpu: catalogue.GPU) -> None:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / seconds(lambda: a @ b, 50)
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    moved = 2 * source.numel() / seconds(lambda: target.copy_(source), 20)
    print(
        f"torch's product of 8192×8192 bf16: {flops / 1e12:.0f} TFLOP/s, {flops / gpu.bf16_flops:.0%} of the datasheet; "
        f"copy: {moved / 1e12:.2f} TB/s read and written, {moved / gpu.bandwidth_bytes_s:.0%}"
    )


def share(model: catalogue.Model, gpu: catalogue.GPU, cell: grid.Cell, timing: grid.Timing) -> float:
    if cell.phase == "prefill":
        tokens = cell.batch * cell.length
        return physics.prefill_bound_s(model, gpu, 1, 1, tokens, tokens * cell.length) / timing.seconds
    return physics.decode_bound_s(model, gpu, 1, 1, cell.batch, timing.context_tokens) / timing.seconds


def measured(model_id: str, gpu: catalogue.GPU, folder: Path | None) -> None:
    model = catalogue.model(model_id)
    begun = time.perf_counter()
    with torch.inference_mode():
        door = Inside(made(model))
    cells, _ = grid.cells(BATCHES, LENGTHS, CONTEXTS, door.context, REPEAT)
    door.prepare(cells)
    torch.cuda.synchronize()
    print(f"{model_id}: {len(cells)} cells, ready after {time.perf_counter() - begun:.0f} s")
    found, said = grid.measure(door, cells, REPEAT, lambda: None)
    for sentence in said:
        print(f"left out: {sentence}")
    for cell, timing in found.items():
        print(f"{cell!s:48} {timing.seconds * 1e3:8.2f} ms {share(model, gpu, cell, timing):6.1%}")
    if folder is not None:
        name = model_id.split("/")[1].lower()
        (folder / f"{gpu.short.lower()}.torch.{name}.csv").write_text(
            grid.table(found, 1, 1), encoding="utf-8"
        )


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured")
        return
    gpu = catalogue.gpu(torch.cuda.get_device_name().replace(" ", "-"))
    print(f"{gpu.product}, torch {torch.__version__}, {datetime.date.today()}")
    with torch.inference_mode():
        good = parity()
        ceilings(gpu)
    for model_id in LARGE:
        measured(model_id, gpu, Path(sys.argv[1]) if sys.argv[1:] else None)
        gc.collect()
        torch.cuda.empty_cache()
    sys.exit(not good)


if __name__ == "__main__":
    main()

"""The engines that `engine_cpu.py` holds ours against, each in a process of its own; vLLM by the Python of its own environment.

    python benchmarks/engine_peers.py transformers|vllm|vllm-compiled MODEL DTYPE TOKENS

A line of standard input is a list of prompts (token ids); the line that answers it says in how many seconds all had their first
of TOKENS tokens, and in how many more their last.
"""

import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]]], tuple[float, float]]


def transformers(model: str, dtype: str, tokens: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: list[list[int]]) -> tuple[float, float]:
        begun = time.perf_counter()
        asked, stamps = torch.tensor(prompts), []

        def stamp(_tokens: Any, scores: Any) -> Any:
            stamps.append(time.perf_counter())
            return scores

        with torch.inference_mode():
            loaded.generate(
                asked,
                attention_mask=torch.ones_like(asked),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                logits_processor=[stamp],
            )
        return stamps[0] - begun, stamps[-1] - stamps[0]

    return generate


def vllm(model: str, dtype: str, tokens: int, compiled: bool) -> Generate:
    library = importlib.import_module("vllm")
    llm = library.LLM(
        model,
        dtype=dtype,
        enforce_eager=not compiled,
        block_size=32,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    ).llm_engine
    how = library.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    def generate(prompts: list[list[int]]) -> tuple[float, float]:
        first = begun = time.perf_counter()
        for row, prompt in enumerate(prompts):
            llm.add_request(f"{begun}-{row}", {"prompt_token_ids": prompt}, how)
        said: Counter[str] = Counter()
        while llm.has_unfinished_requests():
            for output in llm.step():
                said[output.request_id] = len(output.outputs[0].token_ids)
            if first == begun and len(said) == len(prompts):
                first = time.perf_counter()
        last = time.perf_counter()
        assert set(said.values()) == {tokens}
        return first - begun, last - first

    return generate


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM talks on standard output
    name, model, dtype, tokens = sys.argv[1:]
    if name == "transformers":
        generate = transformers(model, dtype, int(tokens))
    else:
        generate = vllm(model, dtype, int(tokens), name == "vllm-compiled")
    answers.write("ready\n")
    for line in sys.stdin:
        answers.write(json.dumps(generate(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()

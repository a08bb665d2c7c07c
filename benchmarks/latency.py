"""The roofline against what DistServe measured: OPT-13B and OPT-66B on A100-80G, by phase.

    python benchmarks/latency.py

Compared with the raw fits (before their authors' hand-set factors), which stand for the measurements: a fit's own
error against its rows is not published. The roofline's curves were made from operator tables of another project and
know nothing of these fits, nor of their engine's overheads. Single prompts, without DistServe's 1 ms of hand-over;
decode steps that the KV blocks hold. Deterministic, no times are taken: MAPE 19.7 % in prefill and 14.6 % in decode,
the roofline being the faster one nearly everywhere, and most so for OPT-13B at tp 2 and 4.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from disaggserve import catalogue
from disaggserve.latency import Profile, Provenance, StepTimes, roofline

RAW = Path(catalogue.__file__).parent / "data/profiles/raw_unfudged.profiler-a100-80g.distserve.json"
LENGTHS = (128, 256, 512, 1024, 2048)
BATCHES = (1, 8, 16, 32, 64, 94, 128)
CONTEXTS = (256, 512, 1024, 1536)


def errors(raw: StepTimes, roof: StepTimes, held: int) -> dict[str, list[float]]:
    """roofline / fit − 1 over single prompts, and over batches × contexts of at most `held` tokens."""
    return {
        "prefill": [roof.prefill_stage_s([n]) / raw.prefill_stage_s([n]) - 1 for n in LENGTHS],
        "decode": [
            roof.decode_stage_s(b, b * (c + 1)) / raw.decode_stage_s(b, b * (c + 1)) - 1
            for b in BATCHES
            for c in CONTEXTS
            if b * (c + 1) <= held
        ],
    }


def row(name: str, phase: str, off: Iterable[float]) -> str:
    values = np.array(list(off))
    return (
        f"{name:24} {phase:8} {np.mean(np.abs(values)):7.1%} {np.mean(values):+7.1%} "
        f"{values.min():+7.1%} {values.max():+7.1%}"
    )


def main() -> None:
    gpu = catalogue.gpu("NVIDIA-A100-SXM4-80GB")
    profile, said = Profile.load(RAW), Provenance("roofline", "")
    print(f"{'roofline against raw fit':24} {'phase':8} {'MAPE':>7} {'mean':>7} {'least':>7} {'most':>7}")
    every: dict[str, list[float]] = {"prefill": [], "decode": []}
    for model in map(catalogue.model, ("facebook/opt-13b", "facebook/opt-66b")):
        for tp in profile.shapes(model):
            raw = StepTimes(*dataclasses.replace(profile.fit(model, tp), stage_ms=0.0).tables(1), 1, said)
            roof = StepTimes(*roofline.tables(model, gpu, tp, 1), 1, said)
            held = catalogue.kv_blocks(model, gpu, tp, 1) * catalogue.BLOCK_TOKENS
            for phase, off in errors(raw, roof, held).items():
                print(row(f"{model.id.split('/')[1]} tp {tp}", phase, off))
                every[phase] += off
    for phase, off in every.items():
        print(row("all", phase, off))


if __name__ == "__main__":
    main()

"""Makes the two length tables of the Azure LLM inference traces 2023 that ship with disaggserve.

    python benchmarks/lengths/azure.py AzureLLMInferenceTrace_conv.csv

`azure_conv_1000.csv` from AzureLLMInferenceTrace_conv.csv (Azure/AzurePublicDataset, CC-BY 4.0): requests in
order of input are cut into 40 equal parts, each part in order of output into 25; a row is the means of one of
the 1,000 cells, which keeps both means and how the two go together.

`azure_code_like_1000.csv` from published figures alone, as that trace is not here: medians of 1,500 and 13
tokens (Splitwise, Patel et al., ISCA '24), means of 2,048 and 28 and a longest common prompt of 7,436
tokens (p99; all three as others report them of the released trace). Both are log-normal with that median and
mean, prompts cut at 7,436; they are paired independently, since nothing is published on how they go together.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist, fmean

import numpy as np

from disaggserve.workload import read_trace

OUT = Path(__file__).parents[2] / "operator" / "disaggserve" / "data" / "lengths"
ROWS = 1000


def conversation(path: Path) -> Iterable[tuple[int, int]]:
    trace = read_trace(path)
    for part in np.array_split(np.argsort(trace.input, kind="stable"), 40):
        for cell in np.array_split(part[np.argsort(trace.output[part], kind="stable")], 25):
            yield round(float(trace.input[cell].mean())), round(float(trace.output[cell].mean()))


def lognormal(median: float, mean: float, longest: float) -> list[int]:
    """The law's values at the middles of `ROWS` equal parts, its width such that they have the mean."""
    quantiles = [NormalDist().inv_cdf((k + 0.5) / ROWS) for k in range(ROWS)]
    low, high = 0.0, 4.0
    for _ in range(60):
        width = (low + high) / 2
        values = [min(median * math.exp(width * q), longest) for q in quantiles]
        low, high = (width, high) if fmean(values) < mean else (low, width)
    return [max(1, round(v)) for v in values]


def code() -> Iterable[tuple[int, int]]:
    outputs = lognormal(13, 28, math.inf)
    for k, prompt in enumerate(lognormal(1500, 2048, 7436)):
        yield prompt, outputs[k * 379 % ROWS]  # coprime, and of no correlation (below 0.001)


def write(name: str, table: Iterable[tuple[int, int]]) -> None:
    lines = [f"{a},{b}\n" for a, b in table]
    (OUT / name).write_text("input_tokens,output_tokens\n" + "".join(lines))


if __name__ == "__main__":
    write("azure_conv_1000.csv", conversation(Path(sys.argv[1])))
    write("azure_code_like_1000.csv", code())

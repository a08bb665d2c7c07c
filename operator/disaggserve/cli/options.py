"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Output(StrEnum):
    table = "table"
    json = "json"
    yaml = "yaml"


class LinkName(StrEnum):
    nvlink = "nvlink"
    pcie = "pcie"
    rdma = "rdma"
    tcp = "tcp"
    zmq = "zmq"


class EngineName(StrEnum):
    torch = "torch"
    vllm = "vllm"
    sglang = "sglang"
    distserve = "distserve"


OutputOption = Annotated[Output, typer.Option("-o", "--output", help="table, json or yaml.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="With a shape: the model. Example: facebook/opt-13b.")
]
GpuOption = Annotated[
    str | None, typer.Option("--gpu", help="With a shape: the GPU. Example: NVIDIA-A100-SXM4-80GB.")
]
EngineOption = Annotated[
    EngineName | None,
    typer.Option(
        "--engine",
        help="With a shape; default: the engine that the --profile was measured on, without one torch on the shipped fits.",
    ),
]
LinkOption = Annotated[
    LinkName | None,
    typer.Option(
        "--link",
        help="With a shape: what KV crosses between prefill and decode (zmq: torch's messages between real GPUs); default: rdma.",
    ),
]
ProfileOption = Annotated[
    Path | None,
    typer.Option(
        "--profile", help="Measured step times: what `disaggserve fit` writes, or DistServe's JSON."
    ),
]
TtftOption = Annotated[
    str | None, typer.Option("--ttft", help="Promised TTFT. Example: 250ms. With a plan: instead of its own.")
]
TpotOption = Annotated[
    str | None, typer.Option("--tpot", help="Promised TPOT. Example: 100ms. With a plan: instead of its own.")
]
AttainmentOption = Annotated[
    float | None,
    typer.Option(
        "--attainment", help="Share that must meet both; default: the plan's, or 0.9.", min=0.01, max=0.999
    ),
]
SHAPE_HELP = (
    "Instances by role: prefill=1xtp2pp1,decode=1xtp1pp1, mixed=2xtp1pp1:chunk512 or colocated=4xtp1pp1:vllm."
)
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", help="Requests in their own order: our CSV, Azure's CSV or Mooncake's JSONL."),
]
CacheOption = Annotated[
    int | None,
    typer.Option(
        "--cache-blocks",
        help="Blocks of 512 tokens in the prefix cache of a trace with hashes; default: no end.",
        min=0,
    ),
]
LengthsOption = Annotated[
    str | None,
    typer.Option(
        "--lengths", help="A preset, or a CSV with input_tokens,output_tokens[,weight]; needs --rate."
    ),
]
RateOption = Annotated[
    float | None, typer.Option("--rate", help="With lengths: requests per second.", min=1e-6)
]
DurationOption = Annotated[
    str, typer.Option("--duration", help="With lengths: what is judged, after a warm-up of 60 s.")
]
CvOption = Annotated[
    float,
    typer.Option("--cv", help="With lengths: coefficient of variation of the gaps; 1 is Poisson.", min=0),
]
SeedOption = Annotated[
    list[int] | None,
    typer.Option("--seed", help="With lengths; repeat it for several draws judged together.", min=0),
]

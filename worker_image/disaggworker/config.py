"""One frozen value per process; flags and environment are views of it, read nowhere else."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from disaggworker.errors import StartError

Role = Literal["prefill", "decode", "mixed"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclasses.dataclass(frozen=True)
class PaceFacts:
    """Whose time a paced worker keeps: `--pace JSON`."""

    gpu: str  # product label
    node: str
    nvlink: bool
    rdma: bool
    model: str  # the real model, whose weights are not here


@dataclasses.dataclass(frozen=True)
class Config:
    """A worker's settings; `role` is the one that it begins with."""

    role: Role
    model: str
    weights: Path
    tp: int
    pp: int
    context_length: int  # tokens; 0 = the model's own
    dtype: Literal["auto", "float16", "bfloat16", "float32"]
    pairing_key: str
    port: int
    kv_port: int
    served_name: str
    pace: PaceFacts | None
    kv_blocks: int  # 0 = what fits
    chunk: int  # tokens of a step with prompts in it; 0 = whole prompts
    prefix_cache: bool  # keep the KV of prompts and answers for others that begin alike
    lease_s: float
    kv_share: bool  # the KV pool is memory that another process of this host may map
    kv_checksum: bool  # pulled KV is held against checksums
    pod_ip: str
    pod_name: str
    node_name: str

    @property
    def ranks(self) -> int:
        """Processes that compute together. A paced worker keeps the time of many GPUs with one tiny model, in one."""
        return 1 if self.pace else self.tp * self.pp


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise StartError(f"{self.prog}: {message}.")


def switches() -> frozenset[str]:
    """Flags after which no value comes."""
    return frozenset(f for action in _parser()._actions if action.nargs == 0 for f in action.option_strings)


def _parser() -> _Parser:
    parser = _Parser(prog="disaggworker", allow_abbrev=False)
    add = parser.add_argument
    add("role", choices=ROLES, help="mixed does both; POST /role changes it")
    add("--model", required=True, help="Hugging Face id")
    add("--weights", required=True, type=Path, help="folder of safetensors, config.json and tokenizer.json")
    add("--tp", type=int, default=1, help="tensor-parallel GPUs")
    add("--pp", type=int, default=1, help="pipeline stages")
    add("--context-length", type=int, default=0, help="tokens of prompt and answer together")
    add("--dtype", choices=["auto", "float16", "bfloat16", "float32"], default="auto")
    add("--pairing-key", required=True, help="only workers of one key hand KV over")
    add("--port", type=int, default=8000)
    add("--kv-port", type=int, default=5600)
    add("--served-name", default="", help="name in /v1/models; default: --model")
    add("--pace", default="", help="JSON: keep a real GPU's time with a tiny model")
    add("--kv-blocks", type=int, default=0, help="KV blocks of 16 tokens; default: what memory holds")
    add(
        "--chunk",
        type=int,
        default=0,
        help="tokens of a step: decodes, and prompts cut to what is left; 0: whole prompts",
    )
    add(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        help="keep full KV blocks for prompts that begin alike; default: yes, but no with --pace, as plans assume",
    )
    add("--lease-s", type=float, default=60.0, help="seconds that un-pulled KV is kept")
    add(
        "--kv-share",
        action="store_true",
        help="let a decode worker of the same container read KV from memory",
    )
    add("--kv-checksum", action="store_true", help="check that pulled KV arrives as it was sent; costs time")
    return parser


def read(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Config:
    """The settings that `argv` (role first) and the environment give. Raises `StartError`; unknown flags are errors."""
    env = os.environ if env is None else env
    flags = _parser().parse_args(argv)
    for name in ("tp", "pp"):
        if getattr(flags, name) < 1:
            raise StartError(f"--{name} is {getattr(flags, name)}; it must be at least 1.")
    pace = _pace(flags.pace) if flags.pace else None
    # A pod's labels outlive its containers: one that starts again takes the role that its pod was given last.
    if role := env.get("WORKER_ROLE"):
        if role not in ROLES:
            raise StartError(f"WORKER_ROLE is {role!r}; it must be one of {', '.join(ROLES)}.")
        flags.role = role
        if not (env.get("WORKER_CHUNK") or "0").isdecimal():
            raise StartError(f"WORKER_CHUNK is {env['WORKER_CHUNK']!r}; it must be a number of tokens.")
        flags.chunk = int(env.get("WORKER_CHUNK") or 0)
    if flags.chunk < 0:
        raise StartError(f"--chunk is {flags.chunk}; it must be 0 (whole prompts) or a number of tokens.")
    cache = pace is None if flags.prefix_cache is None else flags.prefix_cache
    values = vars(flags) | {
        "pace": pace,
        "served_name": flags.served_name or flags.model,
        "prefix_cache": cache,
    }
    return Config(
        **values,
        pod_ip=env.get("POD_IP") or "127.0.0.1",
        pod_name=env.get("POD_NAME", ""),
        node_name=env.get("NODE_NAME", ""),
    )


def _pace(text: str) -> PaceFacts:
    try:
        facts = json.loads(text)
        return PaceFacts(
            gpu=str(facts["gpu"]),
            node=str(facts.get("node", "")),
            nvlink=bool(facts.get("nvlink", False)),
            rdma=bool(facts.get("rdma", False)),
            model=str(facts["model"]),
        )
    except (ValueError, TypeError, AttributeError) as e:
        raise StartError(f"--pace is not a JSON object: {e}.") from None
    except KeyError as e:
        raise StartError(f"--pace lacks the key {e}.") from None

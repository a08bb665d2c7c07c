"""vLLM's command line as far as the operator writes it, read as our worker's settings."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from disaggworker import config
from disaggworker.config import Config
from disaggworker.errors import StartError
from disaggworker.kv.blocks import BLOCK_TOKENS

_LEASE_S = 30.0  # vLLM's own default


@dataclasses.dataclass(frozen=True)
class Settings:
    """`worker` as if our own flags had been given; the rest is vLLM's alone."""

    worker: Config
    host: str
    side_channel: tuple[str, int]
    batch_tokens: int
    shutdown_s: float  # how long what is in flight may go on after SIGTERM
    fingerprint: str  # of what vLLM's handshake compares: KV passes between equal ones only


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartError(f"--speak vllm: {message}.")


def read(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Settings:
    """`serve MODEL …` and the environment. Raises `StartError`; flags that this stand-in does not know are ignored."""
    env = os.environ if env is None else env
    parser = _Parser(prog="vllm", allow_abbrev=False)
    add = parser.add_argument
    add("command", choices=["serve"])
    add("model", help="folder of safetensors, config.json and tokenizer.json")
    add("--served-model-name", default="")
    add("--tensor-parallel-size", type=int, default=1)
    add("--pipeline-parallel-size", type=int, default=1)
    add("--max-model-len", type=int, default=0)
    add("--dtype", default="auto")
    add("--kv-cache-dtype", default="auto")
    add("--block-size", type=int, default=BLOCK_TOKENS)
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--max-num-batched-tokens", type=int, default=8192)
    add("--kv-transfer-config", default="{}")
    add("--shutdown-timeout", type=float, default=0.0)
    # Ours: what stands for the memory and the time of a real one.
    add("--weights", default="")
    add("--kv-blocks", type=int, default=0)
    add("--pace", default="")
    flags, _ = parser.parse_known_args(argv)
    if flags.block_size != BLOCK_TOKENS:
        raise StartError(
            f"--speak vllm: --block-size is {flags.block_size}; this stand-in has {BLOCK_TOKENS} only."
        )
    transfer = _json("--kv-transfer-config", flags.kv_transfer_config)
    if transfer.get("kv_connector") != "NixlConnector":
        raise StartError(
            "--speak vllm: --kv-transfer-config must name NixlConnector; this stand-in has no other."
        )
    extra = transfer.get("kv_connector_extra_config") or {}
    name = flags.served_model_name or flags.model
    # On simulated nodes every pod has another path for the same mount: there, with weights of our own, the name tells.
    compared = [name if flags.weights else flags.model, flags.dtype, flags.kv_cache_dtype]
    own = ["decode", "--model", name, "--served-name", name, "--weights", flags.weights or flags.model]
    own += ["--tp", str(flags.tensor_parallel_size), "--pp", str(flags.pipeline_parallel_size)]
    own += ["--context-length", str(flags.max_model_len), "--dtype", flags.dtype, "--port", str(flags.port)]
    own += ["--pairing-key", "-", "--kv-blocks", str(flags.kv_blocks), "--pace", flags.pace]
    own += ["--lease-s", str(extra.get("kv_lease_duration", _LEASE_S))]
    return Settings(
        worker=config.read(own, env),
        host=flags.host,
        # As with the real one: prefill is called at this address, whatever --host says.
        side_channel=(
            env.get("VLLM_NIXL_SIDE_CHANNEL_HOST", "localhost"),
            int(env.get("VLLM_NIXL_SIDE_CHANNEL_PORT", "5600")),
        ),
        batch_tokens=flags.max_num_batched_tokens,
        shutdown_s=flags.shutdown_timeout,
        fingerprint=hashlib.sha256(json.dumps(compared).encode()).hexdigest(),
    )


def _json(flag: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise StartError(f"--speak vllm: {flag} is not JSON: {e}.") from None
    if not isinstance(value, dict):
        raise StartError(f"--speak vllm: {flag} must be a JSON object.")
    return value

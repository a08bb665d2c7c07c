"""From a folder to a model on a device."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from disaggworker.engine.attention import Attend
from disaggworker.errors import StartError
from disaggworker.model.llama import Llama
from disaggworker.model.opt import OPT
from disaggworker.model.share import WHOLE, Share
from disaggworker.model.weights import Weights
from disaggworker.model.weights import config as read_config


class Model(Protocol):
    """What the engine needs of a decoder, or of the share of one that this rank holds."""

    share: Share
    layer_range: range  # its layers in the whole model
    layers: int  # so many are they
    kv_head_range: range
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int  # of the whole model
    max_positions: int
    dtype: torch.dtype
    device: torch.device

    def forward(self, x: Tensor, positions: Tensor, attention: Attend, last: Tensor | None) -> Tensor: ...


_ARCHITECTURES: Mapping[str, Callable[[Mapping[str, Any], Weights, Share], Model]] = {
    "opt": OPT,
    "llama": Llama,
    "qwen3": Llama,
}

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def device_of(rank: int, ranks: int) -> torch.device:
    """Where this rank computes: on a GPU of its own, or all on the CPU. Raises `StartError` where GPUs are too few."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() < ranks:
        raise StartError(
            f"--tp times --pp is {ranks} GPUs, and this pod has {torch.cuda.device_count()}; ask for as many."
        )
    return torch.device("cuda", rank)


def load(folder: Path, dtype: str, share: Share = WHOLE) -> tuple[Model, frozenset[int]]:
    """The model in `folder`, or a share of it, and its end-of-text tokens. Raises `StartError`.

    Of the weights only the share's are read.
    dtype `auto` is the config's, but float32 on a CPU for float16, which a CPU is slow at.
    """
    config = read_config(folder)
    kind = str(config.get("model_type"))
    if kind not in _ARCHITECTURES:
        raise StartError(
            f"{folder}/config.json says model_type {kind!r}; known are {', '.join(_ARCHITECTURES)}."
        )
    device = device_of(share.rank, share.tp * share.pp)
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    chosen = _DTYPES.get(named if dtype == "auto" else dtype, torch.float32)
    if dtype == "auto" and device.type == "cpu" and chosen == torch.float16:
        chosen = torch.float32
    try:
        model = _ARCHITECTURES[kind](config, Weights(folder, chosen, device), share)
    except KeyError as e:
        raise StartError(f"{folder}/config.json lacks {e}.") from None
    return model, _ends(folder, config)


def _ends(folder: Path, config: Mapping[str, Any]) -> frozenset[int]:
    # generation_config.json, where there is one, knows the chat models' further end tokens.
    path = folder / "generation_config.json"
    more = json.loads(path.read_text()) if path.is_file() else {}
    ends = more.get("eos_token_id", config.get("eos_token_id"))
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])

"""A checkpoint's folder: config.json and safetensors, with one clear sentence for what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from disaggworker.errors import StartError


def config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises `StartError`."""
    path = folder / "config.json"
    try:
        value = json.loads(path.read_text())
    except OSError as e:
        raise StartError(
            f"{path} cannot be read ({e.strerror}); --weights must be a model's folder."
        ) from None
    except ValueError as e:
        raise StartError(f"{path} is not JSON: {e}.") from None
    if not isinstance(value, dict):
        raise StartError(f"{path} is not a JSON object.")
    return value


class Weights:
    """Tensors by name, moved to one device and dtype as they are taken. Names may or may not begin with `model.`."""

    def __init__(self, folder: Path, dtype: torch.dtype | None, device: torch.device) -> None:
        """`dtype` None: the checkpoint's. Raises `StartError`."""
        self.folder, self.dtype, self.device = folder, dtype, device
        files = sorted(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                named: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError):
                raise StartError(f"{index} is not an index of weights.") from None
            files = [folder / name for name in sorted(set(named.values()))]
        if not files:
            raise StartError(f"{folder} holds no *.safetensors file.")
        self._files: dict[str, Any] = {}
        for path in files:
            try:
                opened: Any = safe_open(str(path), framework="pt")
            except FileNotFoundError:
                raise StartError(f"{path} is named by the index, and is not there.") from None
            except (SafetensorError, OSError) as e:
                raise StartError(f"{path} is not a whole safetensors file: {e}.") from None
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __contains__(self, name: str) -> bool:
        return name in self._files or name.removeprefix("model.") in self._files

    def take(self, name: str) -> Tensor:
        """The tensor of that name. Raises `StartError` if there is none."""
        key = name if name in self._files else name.removeprefix("model.")
        if key not in self._files:
            raise StartError(f"{self.folder} lacks the tensor {name}.")
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor.to(device=self.device, dtype=self.dtype or tensor.dtype)

    def linear(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and, if there is one, bias."""
        bias = f"{name}.bias"
        return self.take(f"{name}.weight"), self.take(bias) if bias in self else None

    def fused(self, *names: str) -> tuple[Tensor, Tensor | None]:
        """Several layers with one input as one: fewer, larger multiplications."""
        parts = [self.linear(name) for name in names]
        biases = [bias for _, bias in parts if bias is not None]
        return torch.cat([w for w, _ in parts]), torch.cat(biases) if biases else None

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
from disaggworker.model.linear import Linear, packed

ALL = slice(None)


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

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Raises `StartError`."""
        self.folder, self.dtype, self.device = folder, dtype, device
        self.taken_bytes = 0  # of the checkpoint, so far
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

    def _open(self, name: str) -> Any:
        key = name if name in self._files else name.removeprefix("model.")
        if key not in self._files:
            raise StartError(f"{self.folder} lacks the tensor {name}.")
        return self._files[key].get_slice(key)

    def rows(self, name: str) -> int:
        """How many rows the whole tensor has. Raises `StartError` if there is none."""
        return int(self._open(name).get_shape()[0])

    def take(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """These rows and columns of the tensor of that name; no other is read. Raises `StartError` if there is none."""
        # A slice is a view of the file's mapping: pages that nobody copies from are not read.
        stored = self._open(name)
        tensor: Tensor = stored[rows] if columns == ALL else stored[rows, columns]
        self.taken_bytes += tensor.nbytes
        return tensor.to(device=self.device, dtype=self.dtype).contiguous()

    def affine(
        self, name: str, rows: slice = ALL, columns: slice = ALL, bias: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and, if there is one and it is wanted, bias. Rows are outputs, columns inputs."""
        offset = f"{name}.bias"
        return (
            self.take(f"{name}.weight", rows, columns),
            self.take(offset, rows) if bias and offset in self else None,
        )

    def linear(self, name: str, rows: slice = ALL, columns: slice = ALL, bias: bool = True) -> Linear:
        """The layer of that name, or a part of it."""
        return packed(*self.affine(name, rows, columns, bias))

    def fused(self, *parts: tuple[str, slice]) -> Linear:
        """Rows of several layers with one input as one layer: fewer, larger multiplications."""
        taken = [self.affine(name, rows) for name, rows in parts]
        biases = [bias for _, bias in taken if bias is not None]
        return packed(torch.cat([w for w, _ in taken]), torch.cat(biases) if biases else None)

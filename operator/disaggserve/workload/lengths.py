"""Joint (input, output) lengths in tokens: the shipped tables, files, and how they are scaled to a model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from disaggserve.workload import rows
from disaggserve.workload.requests import BadLengths, Lens

PRESETS = {
    "sharegpt": "sharegpt_opt_1600.csv",
    "humaneval": "humaneval_opt_164.csv",
    "longbench": "longbench_like_1600.csv",
    "azure-conv": "azure_conv_1000.csv",
    "azure-code": "azure_code_like_1000.csv",
}
_LENGTHS = Path(__file__).parents[1] / "data" / "lengths"
_DEALT = 20_000  # rows of a table made from weights


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths:
    """A joint table of (input, output) lengths: row i is one request's pair, all rows equally likely."""

    name: str
    input: Lens  # int32[n]
    output: Lens  # int32[n]

    def __post_init__(self) -> None:
        if len(self.input) != len(self.output) or not len(self.input):
            raise BadLengths(
                f"lengths {self.name}: {len(self.input)} inputs and {len(self.output)} outputs make no table"
            )
        if min(int(self.input.min()), int(self.output.min())) < 1:
            raise BadLengths(f"lengths {self.name}: a request has at least one input and one output token")

    def __len__(self) -> int:
        return len(self.input)

    def within(self, context_length: int) -> tuple[Lengths, int]:
        """The rows whose prompt and answer fit the model's context together, and how many were left out.

        Raises `BadLengths` where none fits.
        """
        fits = self.input.astype(np.int64) + self.output <= context_length
        if not fits.any():
            raise BadLengths(
                f"lengths {self.name}: every request is longer than the context of {context_length} tokens"
            )
        return Lengths(self.name, self.input[fits], self.output[fits]), int(np.count_nonzero(~fits))

    def scaled(self, input_scale: float, context_length: int) -> Lengths:
        """Prompts × `input_scale`, rounded, at least 1; then cut to the model's context.

        A prompt is cut to context_length − 1 tokens, then the output to what is left beside its prompt.
        """
        if not (math.isfinite(input_scale) and input_scale > 0):
            raise BadLengths(f"inputScale is {input_scale}, not a number above 0")
        if context_length < 2:
            raise BadLengths(
                f"a context of {context_length} tokens holds no prompt and answer; it takes at least 2"
            )
        prompts = np.clip(np.rint(self.input * float(input_scale)), 1, context_length - 1).astype(np.int32)
        outputs = np.minimum(self.output, context_length - prompts).astype(np.int32)
        name = self.name if input_scale == 1 else f"{self.name} (prompts × {input_scale:.3g})"
        return Lengths(name, prompts, outputs)


@functools.cache
def preset(name: str) -> Lengths:
    """A shipped joint table of lengths (data/README.md has each one's origin). Raises `BadLengths`."""
    try:
        path = _LENGTHS / PRESETS[name]
    except KeyError:
        raise BadLengths(f"lengths preset {name!r} is not known; known are {', '.join(PRESETS)}") from None
    return dataclasses.replace(read_lengths(path), name=name)


def read_lengths(path: Path | str) -> Lengths:
    """Lengths from a CSV file: input_tokens,output_tokens (or input_len,output_len), and optionally weight.

    Rows with weights (a histogram) are dealt among 20,000 by largest remainder: a share below 1/40,000 may
    fall away. Raises `BadLengths`.
    """
    path = Path(path)
    wanted = (("input_tokens", "output_tokens"), ("input_len", "output_len"))
    found: list[tuple[int, int]] = []
    weights: list[float] = []
    for where, row in rows.table(path, rows.text(path, BadLengths), wanted, BadLengths, optional="weight"):
        found.append(
            (
                rows.tokens(BadLengths, where, "the input", row[0]),
                rows.tokens(BadLengths, where, "the output", row[1]),
            )
        )
        if len(row) > 2:
            weights.append(_weight(where, row[2]))
    table = np.array(found, dtype=np.int32)
    if weights:
        if not sum(weights) > 0:
            raise BadLengths(f"{path}: every weight is 0, so no row is ever taken")
        table = np.repeat(table, deal(weights, _DEALT), axis=0)
    return Lengths(path.stem, table[:, 0].copy(), table[:, 1].copy())


def _weight(where: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < 1e15:
        raise BadLengths(f"{where}: weight is {text!r}, not a number from 0 on")
    return weight


def deal(shares: Sequence[float] | npt.NDArray[np.float64], rows: int) -> npt.NDArray[np.int64]:
    """So many rows dealt in these proportions by largest remainder; ties go to the first."""
    share = np.asarray(shares, dtype=np.float64)
    share = share / float(share.sum()) * rows
    dealt = np.floor(share).astype(np.int64)
    dealt[np.argsort(-(share - dealt), kind="stable")[: rows - int(dealt.sum())]] += 1
    return dealt

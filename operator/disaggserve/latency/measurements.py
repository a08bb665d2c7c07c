"""A table of measured steps: CSV with `phase,batch,tokens,context_tokens,tp,pp,seconds`, checked row by row.

`seconds` is a whole pass, through all pp stages. Prefill: `tokens` = Σ prompt tokens of the batch, `context_tokens`
those done before. Decode: `tokens` = tokens made in the step = batch, `context_tokens` = Σ context of the batch.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from typing import Literal

from disaggserve.catalogue import GPU, Model
from disaggserve.latency import physics
from disaggserve.latency.errors import BadMeasurements

COLUMNS = ("phase", "batch", "tokens", "context_tokens", "tp", "pp", "seconds")
_LEAST = {"batch": 1, "tokens": 1, "context_tokens": 0, "tp": 1, "pp": 1}
_MOST = 10**9
_LEAST_S, _MOST_S = 1e-6, 3600.0

Phase = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True, order=True)
class Row:
    """One measured step."""

    tp: int
    pp: int
    batch: int
    tokens: int
    context_tokens: int
    seconds: float
    phase: Phase
    line: int  # of the file, from 1

    @property
    def squares(self) -> float:
        """Σlen² of a prefill, and what was done before: Σ((len + done)² − done²), with all prompts equally long."""
        return (self.tokens**2 + 2 * self.tokens * self.context_tokens) / self.batch


def read(text: str, where: str, model: Model | None = None, gpu: GPU | None = None) -> tuple[Row, ...]:
    """The rows of a file, sorted, so that their order in it does not matter.

    A row that its model cannot have, or that beats the hardware of `model` on `gpu`, is refused as well. Raises
    `BadMeasurements` with the line and the column.
    """
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    header = [cell.strip() for cell in next(reader, [])]
    for column in COLUMNS:
        if header.count(column) != 1:
            raise BadMeasurements(
                f"{where}: line 1: column {column} stands {header.count(column)} times; "
                f"the header is {','.join(COLUMNS)}"
            )
    if unknown := [column for column in header if column not in COLUMNS]:
        raise BadMeasurements(
            f"{where}: line 1: column {unknown[0]!r} is not known; the header is {','.join(COLUMNS)}"
        )
    rows = []
    for cells in reader:
        if any(cell.strip() for cell in cells):
            at = f"{where}: line {reader.line_num}"
            if len(cells) != len(header):
                raise BadMeasurements(f"{at}: {len(cells)} cells for {len(header)} columns")
            row = _row(dict(zip(header, map(str.strip, cells), strict=True)), at, reader.line_num)
            _judge(row, at, model, gpu)
            rows.append(row)
    if not rows:
        raise BadMeasurements(f"{where}: holds no row below its header")
    return tuple(sorted(rows))


def _row(cells: dict[str, str], at: str, line: int) -> Row:
    if cells["phase"] not in ("prefill", "decode"):
        raise BadMeasurements(f"{at}: phase is {cells['phase']!r}, not prefill or decode")
    phase: Phase = "prefill" if cells["phase"] == "prefill" else "decode"
    numbers: dict[str, int] = {}
    for column, least in _LEAST.items():
        cell = cells[column]
        if not (cell.isascii() and cell.isdecimal()) or not least <= int(cell[:20]) <= _MOST:
            raise BadMeasurements(f"{at}: {column} is {cell!r}, not a whole number from {least} to {_MOST}")
        numbers[column] = int(cell)
    try:
        seconds = float(cells["seconds"])
    except ValueError:
        seconds = math.nan
    if not _LEAST_S <= seconds <= _MOST_S:
        raise BadMeasurements(
            f"{at}: seconds is {cells['seconds']!r}, not a number from {_LEAST_S:g} to {_MOST_S:g}"
        )
    row = Row(**numbers, seconds=seconds, phase=phase, line=line)
    if phase == "decode" and row.tokens != row.batch:
        raise BadMeasurements(
            f"{at}: tokens is {row.tokens} and batch {row.batch}; a decode step makes one token a request"
        )
    if row.tokens < row.batch:
        raise BadMeasurements(
            f"{at}: tokens is {row.tokens}, fewer than the {row.batch} prompts of the batch"
        )
    return row


def _judge(row: Row, at: str, model: Model | None, gpu: GPU | None) -> None:
    if model is None:
        return
    if fault := model.shape_fault(row.tp, row.pp):
        raise BadMeasurements(f"{at}: {model.id} does not take this shape: {fault}")
    if gpu is None:
        return
    if row.phase == "prefill":
        bound = physics.prefill_bound_s(model, gpu, row.tp, row.pp, row.tokens, row.squares)
    else:
        bound = physics.decode_bound_s(model, gpu, row.tp, row.pp, row.batch, row.context_tokens)
    if row.seconds < row.pp * bound:
        raise BadMeasurements(
            f"{at}: seconds is {row.seconds:g}, and {gpu.short} cannot do this {row.phase} of {model.id} below "
            f"{row.pp * bound:.3g}"
        )

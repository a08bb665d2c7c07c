"""Figures in the search's sentences."""

from __future__ import annotations

import math


def floor(rate: float) -> str:
    """A rate that is not above this one: `12.3`, below 1 `0.123`."""
    digits = 1 if rate >= 1 else 3
    return f"{math.floor(rate * 10**digits) / 10**digits:.{digits}f}"


def milliseconds(seconds: float) -> str:
    """`88 ms`, from 10 s on `12.3 s`."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def shown(seconds: float) -> float:
    """Up to two digits, and not below what `milliseconds` shows of it."""
    digits = 1 - math.floor(math.log10(seconds))
    if seconds < 10:
        digits = min(digits, 3)
    return float(math.ceil(seconds * 10**digits) / 10**digits)


def in_gpus(n: int) -> str:
    """`1 GPU`, `2 GPUs`."""
    return f"{n} GPU" if n == 1 else f"{n} GPUs"

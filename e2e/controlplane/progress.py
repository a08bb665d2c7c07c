"""How long work shows that it is alive: short sentences to whoever wants them."""

from __future__ import annotations

import sys
from collections.abc import Callable

Progress = Callable[[str], None]


def silent(sentence: str) -> None:
    """Say nothing."""


def to_stderr(sentence: str) -> None:
    """One line per sentence on standard error, which no program parses."""
    print(sentence, file=sys.stderr, flush=True)

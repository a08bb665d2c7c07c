"""Data that is not in the repository: traces and measured runs."""

import os
from pathlib import Path

import pytest


def shared(path: str) -> Path:
    """A file below $DISAGGSERVE_DATA, or below ../shared/data beside the checkout; skips the test without it."""
    beside = [parent / "shared" / "data" for parent in Path(__file__).resolve().parents[2:]]
    for base in [Path(os.environ.get("DISAGGSERVE_DATA", ".")), *beside]:
        if (base / path).is_file():
            return base / path
    pytest.skip(f"{path} is not here; name its folder in DISAGGSERVE_DATA")

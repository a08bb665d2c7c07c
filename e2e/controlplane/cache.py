"""Where built things are kept: the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """``$XDG_CACHE_HOME/disaggserve``, by default ``~/.cache/disaggserve``."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    # The specification wants relative paths ignored.
    base = Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"
    return base / "disaggserve"

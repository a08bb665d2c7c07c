"""`make demo` as people run it: the example, served, re-planned under load, with nothing failed and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def processes(folder: Path) -> list[str]:
    """Command lines below a folder."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = each.read_text().replace("\0", " ")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_demo_ends_well_and_leaves_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "e2e.demo"], cwd=ROOT, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "failed requests: 0 of" in done.stdout
    assert "new plan, revision 2" in done.stdout
    assert processes(ROOT / ".demo") == []

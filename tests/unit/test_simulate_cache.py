from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

import disaggserve
from disaggserve.simulate import cache

SCRIPT = """
from disaggserve import simulate
import os, sys
simulate.warm_up()
from disaggserve.simulate import kernel
stats = kernel.serve.stats
print(os.environ["NUMBA_CACHE_DIR"], sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_a_read_only_tree_without_a_home_compiles_once_for_all_processes(tmp_path: Path) -> None:
    tree = tmp_path / "tree" / "disaggserve"
    shutil.copytree(Path(disaggserve.__file__).parent, tree, ignore=shutil.ignore_patterns("__pycache__"))
    temp = tmp_path / "temp"
    temp.mkdir()
    folders = [tree, *(p for p in tree.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    env = {k: v for k, v in os.environ.items() if k not in (cache.VARIABLE, "XDG_CACHE_HOME")}
    env |= {
        "HOME": "/dev/null/nowhere",
        "TMPDIR": str(temp),
        "PYTHONPATH": str(tree.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def start() -> tuple[Path, int, int]:
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        folder, hits, misses = done.stdout.rsplit(maxsplit=2)
        return Path(folder), int(hits), int(misses)

    try:
        first, again = start(), start()
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert first[0].is_relative_to(temp)
    assert first[1:] == (0, 1)
    assert again == (first[0], 1, 0)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv(cache.VARIABLE, "")
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    return monkeypatch


def test_the_users_own_choice_is_kept(tmp_path: Path, untouched: pytest.MonkeyPatch) -> None:
    untouched.setenv(cache.VARIABLE, str(tmp_path / "mine"))
    assert cache.prepare() == tmp_path / "mine"


def test_a_choice_that_cannot_be_written_falls_back(tmp_path: Path, untouched: pytest.MonkeyPatch) -> None:
    untouched.setenv(cache.VARIABLE, "/dev/null/nowhere")
    untouched.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = cache.prepare()
    assert found.parent == tmp_path / "disaggserve" / "numba"
    assert os.environ[cache.VARIABLE] == numba.config.CACHE_DIR == str(found)
    untouched.setenv("NUMBA_CPU_NAME", "another")
    untouched.setenv(cache.VARIABLE, "")
    assert cache.prepare() != found

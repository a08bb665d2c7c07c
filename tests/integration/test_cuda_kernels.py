"""What a GPU runs, as far as a machine without one can tell: benchmarks/gpu.py holds the rest to transformers on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_kernel_computes_what_its_twin_in_plain_torch_does() -> None:
    if not importlib.util.find_spec("triton"):
        pytest.skip("torch came without Triton: its build without CUDA")
    path = os.pathsep.join(str(ROOT / part) for part in ("operator", "worker_image"))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/integration/kernels_interpreted.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_cpu_needs_none_of_it() -> None:
    """Neither Triton nor what is built on it is imported with a worker, or with what profiles an engine."""
    pytest.importorskip("torch")
    import disaggworker.profiling.inside
    import disaggworker.worker.main  # noqa: F401

    assert not any(name.startswith("disaggworker.cuda") for name in sys.modules)

"""Where the real vLLM is, how it is made, and how one server is started.

    python -m e2e.vllm.environment      # make it: some minutes and 6 GB, once for each version of the requirements

It has an environment of its own, below the user's cache: its torch is not ours.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements/vllm.txt"
SITE = Path(__file__).with_name("site")

# What a CPU needs beside the operator's flags, or instead of them (the last one counts): its attention has blocks of 32 only,
# and bf16 sums differ with the batch. No kernel is compiled, and the KV has a fixed size. Scheduling ahead of the running step hides
# the scheduler's time behind a GPU; on a CPU the step runs within the call, and every token would be handed out one step late.
CPU_FLAGS = (
    "--no-async-scheduling",
    "--block-size",
    "32",
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-num-seqs",
    "16",
    "--kv-cache-memory-bytes",
    str(64 << 20),
)


def folder() -> Path:
    """The environment's, by what is in it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    return cache / "disaggserve" / "vllm" / digest


def made() -> bool:
    """Whether it is there, and whole."""
    return (folder() / ".ready").exists()


def command() -> tuple[str, ...]:
    """`vllm`, as the operator's manifests call it."""
    return (str(folder() / "bin" / "vllm"),)


def variables(home: Path) -> Mapping[str, str]:
    """A server's environment beside its own; `home` is made. What vLLM finds out about a model is kept for the next."""
    home.mkdir(parents=True, exist_ok=True)
    return {
        "PYTHONPATH": str(SITE),
        "PYTHONDONTWRITEBYTECODE": "",  # hundreds of modules, to be compiled once
        "VLLM_CACHE_ROOT": str(folder() / "cache"),
        "VLLM_RPC_BASE_PATH": tempfile.gettempdir(),  # a socket's path may have 107 letters, and a pod's own folder lies deep
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def launcher(target: Path) -> Path:
    """A folder with `vllm` and `python3`, as the image has them, for containers: the flags and variables of a CPU added."""
    target.mkdir(parents=True, exist_ok=True)
    home = target / "home"
    exports = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in variables(home).items())
    script = target / "vllm"
    script.write_text(f'#!/bin/sh\n{exports}exec {shlex.join(command())} "$@" {shlex.join(CPU_FLAGS)}\n')
    script.chmod(0o755)
    python = target / "python3"
    python.unlink(missing_ok=True)
    python.symlink_to(folder() / "bin" / "python3")
    return script


def make() -> Path:
    """Build it, unless it is there."""
    target = folder()
    if made():
        return target
    draft = target.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.parent.mkdir(parents=True, exist_ok=True)
    uv = [str(Path(sys.executable).with_name("uv"))]
    subprocess.run(
        [*uv, "venv", "--quiet", "--python", sys.executable, "--relocatable", str(draft)], check=True
    )
    install = [*uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", str(REQUIREMENTS)]
    subprocess.run(install, check=True, env=os.environ | {"VIRTUAL_ENV": str(draft)})
    (draft / ".ready").touch()
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    return target


if __name__ == "__main__":
    if not made():
        print(f"vllm: installing {REQUIREMENTS.name} into {folder()} (6 GB, once)")
    make()

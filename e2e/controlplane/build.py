"""Building into the user's cache folder: once per version, one process at a time, visibly alive."""

from __future__ import annotations

import fcntl
import hashlib
import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from e2e.controlplane import toolchain
from e2e.controlplane.cache import cache_home
from e2e.controlplane.errors import BuildError
from e2e.controlplane.progress import Progress
from e2e.controlplane.targets import MODULE, Target, sources, targets
from e2e.controlplane.toolchain import Toolchain

HEARTBEAT_S = 10.0
"""How often a running build says that it is alive."""


def cache_folder(go: Toolchain) -> Path:
    """``~/.cache/disaggserve/controlplane/HASH``, one per sources, flags, Go version, platform."""
    digest = hashlib.sha256(f"{go.version} {go.platform}\n".encode())
    for source in sources():
        content = source.read_bytes()
        digest.update(f"{source.relative_to(MODULE)} {len(content)}\n".encode() + content)
    for target in targets().values():
        digest.update("\n".join(target.build_command(Path("go"), Path(target.name))).encode())
    return cache_home() / "controlplane" / digest.hexdigest()[:16]


def build(names: Sequence[str], progress: Progress) -> Path:
    """See that the targets named are in the cache folder, and return that folder.

    Each file comes into its place by a rename, so whatever is there is whole; what a killed build has
    finished stays. Raises ``ToolchainError`` or ``BuildError``.
    """
    go = toolchain.find(MODULE)
    folder = cache_folder(go)
    wanted = [target for name, target in targets().items() if name in names]
    if all(_present(folder, target) for target in wanted):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, progress):
        temporary = folder / ".tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed build
        temporary.mkdir()
        try:
            for target in wanted:
                if not _present(folder, target):
                    _build(go, target, folder, temporary, progress)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _present(folder: Path, target: Target) -> bool:
    return all((folder / name).exists() for name in (target.name, *target.aliases))


@contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the folder's lock. The kernel lets go of it when we die, however we die."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        start_s = said_s = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - said_s >= HEARTBEAT_S or said_s == start_s:
                    said_s = time.monotonic()
                    progress(f"another process is building; waiting for it ({_elapsed(start_s)})")
                time.sleep(0.2)
        yield
    finally:
        os.close(lock)


def _build(go: Toolchain, target: Target, folder: Path, temporary: Path, progress: Progress) -> None:
    output = temporary / target.name
    _run(go, target, output, temporary, progress)
    for alias in target.aliases:
        (temporary / alias).symlink_to(target.name)
        (temporary / alias).replace(folder / alias)
    output.replace(folder / target.name)


def _run(go: Toolchain, target: Target, output: Path, temporary: Path, progress: Progress) -> None:
    """Run ``go build -v``, which prints each package as it comes to it, and count."""
    start_s = said_s = time.monotonic()
    progress(f"building {target.name} with {go.version}, the first time only{target.remark}")
    process = subprocess.Popen(
        target.build_command(go.go, output),
        cwd=MODULE,
        env=go.environment(temporary),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    assert process.stderr is not None
    reader = threading.Thread(target=_pump, args=(process.stderr, lines), daemon=True)
    reader.start()
    compiled = downloaded = 0
    said: list[str] = []
    try:
        while True:
            try:
                line = lines.get(timeout=1.0)
                if line is None:
                    break
                if line.startswith("go: downloading"):
                    downloaded += 1
                elif " " not in line.strip():
                    compiled += 1
                else:
                    said.append(line)
            except queue.Empty:
                pass
            if time.monotonic() - said_s >= HEARTBEAT_S:
                said_s = time.monotonic()
                progress(_state(target, start_s, downloaded, compiled))
        if process.wait() != 0:
            raise BuildError(target.name, "".join(said[-40:]))
        progress(f"built {target.name} in {_elapsed(start_s)}")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        reader.join()
        process.stderr.close()


def _pump(stream: Iterator[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _state(target: Target, start_s: float, downloaded: int, compiled: int) -> str:
    doing = f"{compiled} packages compiled" if compiled else f"{downloaded} modules fetched"
    return f"building {target.name}: {doing}, {_elapsed(start_s)}"


def _elapsed(start_s: float) -> str:
    seconds = int(time.monotonic() - start_s)
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"

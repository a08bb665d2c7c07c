"""Where numba keeps the compiled kernel: the one place that names the folder, before numba is first imported."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

VARIABLE = "NUMBA_CACHE_DIR"
FILLED = "DISAGGSERVE_KERNELS"
"""Names a folder that `keep` filled ahead, as an image has one; it may be read-only."""


def prepare() -> Path:
    """Name a writable cache folder for numba in the environment and return it.

    A folder of the user's own choice (NUMBA_CACHE_DIR) is kept where it is writable. Else
    $XDG_CACHE_HOME or ~/.cache, else the system's folder for temporary files (one for each user). The folder's
    name holds a hash of the simulator's sources, numba's version and the CPU, so that nothing stale is loaded
    and nothing needs to be cleared: numba itself looks at one source file only. What DISAGGSERVE_KERNELS holds
    for the same hash is copied there first: numba refuses a folder that it cannot write to, even a full one.
    """
    chosen = os.environ.get(VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    # Not a fixed name of anybody's in a shared folder: what lies there is loaded as code.
    user = os.getuid() if hasattr(os, "getuid") else 0
    tail = Path("disaggserve", "numba", _key())
    places = [Path(chosen)] if chosen else []
    places += [Path(base) / tail, Path(tempfile.gettempdir()) / f"disaggserve-{user}" / tail.name]
    folder = next((p for p in places if _writable(p)), None) or Path(tempfile.mkdtemp(prefix="disaggserve-"))
    if os.environ.get(FILLED):
        _copy(Path(os.environ[FILLED]) / _key(), folder)
    os.environ[VARIABLE] = str(folder)
    if "numba" in sys.modules:  # somebody was faster: tell it as well
        sys.modules["numba"].config.CACHE_DIR = str(folder)
    return folder


def keep(into: Path) -> Path:
    """Copy what is compiled by now below `into`, for DISAGGSERVE_KERNELS; returns the folder. Raises OSError."""
    folder = into / _key()
    folder.mkdir(parents=True, exist_ok=True)
    _copy(Path(os.environ[VARIABLE]), folder)
    return folder


def _copy(source: Path, to: Path) -> None:
    """Numba's folders (one for each package) that are not there yet, whole or not at all: others may do the same."""
    for package in sorted(p for p in source.glob("*") if p.is_dir()):
        if (to / package.name).exists():
            continue
        with tempfile.TemporaryDirectory(dir=to, ignore_cleanup_errors=True) as made:
            for file in package.iterdir():  # not copytree: it would take over that the source is read-only
                shutil.copyfile(file, Path(made, file.name))
            os.chmod(made, 0o755)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(made, to / package.name)


def _key() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for source in (here.parent / "dispatch.py", *sorted(here.glob("*.py"))):
        digest.update(source.read_bytes())
    cpu = f"{os.environ.get('NUMBA_CPU_NAME') or _host_cpu()} {os.environ.get('NUMBA_CPU_FEATURES')}"
    digest.update(f"{importlib.metadata.version('numba')} {platform.machine()} {cpu}".encode())
    return digest.hexdigest()[:16]


def _host_cpu() -> str:
    from llvmlite import binding  # type: ignore[import-untyped]  # numba loads it anyway

    return str(binding.get_host_cpu_name())


def _writable(folder: Path) -> bool:
    """Whether the folder is this user's and files can be made in it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
            return False
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False

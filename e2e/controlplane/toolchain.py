"""The Go toolchain: is it there, is it new enough, how is it called so that it leaves no trace."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from e2e.controlplane.cache import cache_home
from e2e.controlplane.errors import ToolchainError

OLDEST = (1, 26)

ADVICE = "install Go 1.26 or newer from https://go.dev/dl and put it in PATH"


@dataclass(frozen=True)
class Toolchain:
    """A usable ``go``."""

    go: Path
    version: str
    """As in ``go1.26.8``."""
    platform: str
    """As in ``linux/amd64``."""

    def environment(self, temporary: Path) -> dict[str, str]:
        """The user's own settings (module proxy, caches), with our way of building and temporary folder."""
        return {
            **_environment(),
            "CGO_ENABLED": "0",
            "GOWORK": "off",
            "GOTMPDIR": str(temporary),
            "TMPDIR": str(temporary),
        }


def find(module: Path) -> Toolchain:
    """The ``go`` in PATH that can build ``module``; raises ``ToolchainError``, one sentence."""
    found = shutil.which("go")
    if found is None:
        raise ToolchainError(f"Go is missing: {ADVICE}.")
    version, platform = _version(found, None)
    if _number(version) < OLDEST:
        raise ToolchainError(f"Go is too old ({version} in {found}): {ADVICE}.")
    # In the module's folder, `go` becomes the version that go.mod asks for, unless GOTOOLCHAIN forbids it.
    version, platform = _version(found, module)
    return Toolchain(Path(found), version, platform)


def _version(go: str, folder: Path | None) -> tuple[str, str]:
    done = subprocess.run(
        [go, "version"],
        cwd=folder or Path(go).parent,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    match = re.search(r"\b(go\d+\.\S+)(?: .*)? (\w+/\w+)\s*$", done.stdout)
    if done.returncode != 0 or match is None:
        said = (done.stderr or done.stdout).strip().removeprefix("go: ").splitlines()
        raise ToolchainError(f"Go cannot be used ({said[-1] if said else 'no answer'}): {ADVICE}.")
    return match[1], match[2]


def _environment() -> dict[str, str]:
    """The user's environment; and where Go has no folders of the user's yet, they come into our cache folder.

    Else a first build would leave a gigabyte in ``~/go`` and counters in ``~/.config/go``.
    """
    environment = dict(os.environ)
    chosen = environment.get("XDG_CONFIG_HOME", "")
    config = (Path(chosen) if os.path.isabs(chosen) else Path.home() / ".config") / "go"
    settled = (config / "env").exists() or (Path.home() / "go").exists()
    if not settled and not environment.keys() & {"GOPATH", "GOMODCACHE", "GOENV"}:
        environment["GOMODCACHE"] = str(cache_home() / "go" / "modules")
        # Else only root could remove the cache folder by `rm -r`.
        environment["GOFLAGS"] = f"{environment.get('GOFLAGS', '')} -modcacherw".strip()
    if not config.exists():
        environment["XDG_CONFIG_HOME"] = str(cache_home() / "go" / "config")
    return environment


def _number(version: str) -> tuple[int, ...]:
    match = re.match(r"go(\d+)\.(\d+)", version)
    return tuple(int(part) for part in match.groups()) if match else (0,)

"""What can go wrong, as a tree.

ControlPlaneError
├── ToolchainError    Go is missing or too old: nothing can be built
├── BuildError        `go build` failed: what it said
├── FolderInUse       another control plane runs in this folder
├── NotReady          a deadline passed: what was waited for
├── ComponentDied     a program ended by itself: the last lines of its log, and where the log is
└── CommandFailed     kubectl or helm answered with an error: what it said
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

TAIL_LINES = 15


class ControlPlaneError(Exception):
    """Anything this package raises on purpose."""


class ToolchainError(ControlPlaneError):
    """Go is missing or too old. The message is one sentence, fit for the user."""


class BuildError(ControlPlaneError):
    """``go build`` failed."""

    def __init__(self, target: str, output: str) -> None:
        super().__init__(f"building {target} failed:\n{output.strip()}")
        self.target = target
        self.output = output


class FolderInUse(ControlPlaneError):
    """Two control planes in one folder would overwrite each other's keys and data."""


class NotReady(ControlPlaneError):
    """A deadline passed."""

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__(f"{what}: not within {timeout_s:g} s")
        self.what = what
        self.timeout_s = timeout_s


class ComponentDied(ControlPlaneError):
    """A program that should have kept running ended by itself."""

    def __init__(self, name: str, returncode: int, log: Path) -> None:
        self.name = name
        self.returncode = returncode
        self.log = log
        self.tail = tail(log)
        super().__init__(f"{name} ended with exit code {returncode}; the end of {log}:\n{self.tail}")

    @property
    def port_taken(self) -> bool:
        """Whether it died because someone else took its port between our choosing and its binding."""
        return "address already in use" in self.tail


class CommandFailed(ControlPlaneError):
    """A command-line tool ended with an error."""

    def __init__(self, command: Sequence[str], returncode: int, stderr: str) -> None:
        super().__init__(f"{' '.join(command)}: exit code {returncode}: {stderr.strip()}")
        self.command = tuple(command)
        self.returncode = returncode
        self.stderr = stderr


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, for an error message; empty when there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])

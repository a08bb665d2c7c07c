"""Processes that never outlive the Python process that started them, not even when that one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from e2e.controlplane.binaries import Binaries


class Supervised:
    """A command under our little supervisor, which runs it in a process group of its own.

    The supervisor ends the whole group (SIGTERM, after ``grace_s`` SIGKILL) when told to, when its standard
    input reaches end of file or when the owner's process is gone; and it ends what the command left behind.
    Its exit code is the command's; 128 + the signal's number when a signal ended it, as in container
    statuses.

    It does not restart anything, and gives the command no standard input.
    """

    def __init__(self, popen: subprocess.Popen[bytes], argv: Sequence[str], log: Path | None) -> None:
        self._popen = popen
        self.argv = tuple(argv)
        self.log = log

    @property
    def pid(self) -> int:
        """The supervisor's process id (the command's own: ``child_pid``)."""
        return self._popen.pid

    @property
    def child_pid(self) -> int | None:
        """The command's process id, also its group's; None before it has started or after its end."""
        try:
            for thread in os.listdir(f"/proc/{self.pid}/task"):
                children = Path(f"/proc/{self.pid}/task/{thread}/children").read_text().split()
                if children:
                    return int(children[0])
        except (FileNotFoundError, ProcessLookupError):
            pass
        return None

    @property
    def returncode(self) -> int | None:
        return self._popen.returncode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._popen.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code; raises ``subprocess.TimeoutExpired``."""
        return self._popen.wait(timeout_s)

    def terminate(self) -> None:
        """SIGTERM to the group now, SIGKILL after ``grace_s``. Does not wait."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the group now. Does not wait."""
        self._signal(signal.SIGQUIT)

    def stop(self, timeout_s: float = 10.0) -> int:
        """``terminate``, wait, and ``kill`` when that took too long. The exit code."""
        self.terminate()
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._popen.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the command's lifeline: it ends as with ``terminate``."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._popen.poll() is None:
            self._popen.send_signal(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def supervised_popen(
    binaries: Binaries,
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str],
    log: Path | None = None,
    cwd: Path | None = None,
    grace_s: float = 5.0,
) -> Supervised:
    """Start ``argv`` with exactly ``env``, its output appended to ``log`` (discarded without one).

    A command that cannot be started shows as exit code 126 or 127, with the reason in the log.
    """
    command = [str(argument) for argument in argv]
    environment = {
        **env,
        "DISAGGSERVE_LIFELINE": str(os.getpid()),
        "DISAGGSERVE_GRACE_S": str(grace_s),
    }
    output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        popen = subprocess.Popen(
            [str(binaries.supervise), "--", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=cwd,
            # Ctrl-C in the terminal is the owner's to handle: it stops us in its own order.
            start_new_session=True,
        )
    finally:
        os.close(output)
    return Supervised(popen, command, log)

"""A process that starts containers: forks a child for each, on demand, and ends them all when its owner is gone.

There are two: a plain one, whose children exec a program, and one that has imported torch and the worker's
modules, whose children call the worker's `main` straight after the fork (milliseconds and shared memory,
where an import of torch takes seconds on a busy machine). Run as

    python -m e2e.nodes.forkserver FD MODULE …      FD: the owner's socket; MODULE …: what to import first

Lines of JSON on the socket. In: {"do": "start", "id", "argv", "env", "cwd", "log", "nice", "call"} and
{"do": "signal", "id", "signal"}. Out: {"ready": true}, {"id", "pid"}, {"id", "failed": sentence} and, when
the process has ended, {"id", "exit": code} with 128 + the signal's number as in container statuses.

No threads and no event loop here: what a forked child inherits must be clean.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

MARK = "DISAGGSERVE_CONTAINER"
"""Environment variable by which what a container left behind is known as its own."""

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36
_libc = ctypes.CDLL(None)


class ForkServer:
    """The loop of this process."""

    def __init__(self, owner: socket.socket) -> None:
        self._owner = owner
        self._pid = os.getpid()
        self._running: dict[int, str] = {}
        """Process id, also its group's and session's → the container's id."""
        self._wakeup, wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup.setblocking(False)
        self._wakeup_writer = wakeup
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        # What a container leaves behind becomes our child, so that it can be found and ended.
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def serve(self) -> None:
        """Until the owner closes the socket, by intent or by dying; then nothing we started is left."""
        self._say({"ready": True})
        poll = select.poll()
        poll.register(self._owner, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        pending = b""
        try:
            while True:
                ready = {fd for fd, _ in poll.poll()}
                if self._wakeup.fileno() in ready:
                    with contextlib.suppress(BlockingIOError):
                        self._wakeup.recv(4096)
                    self._reap()
                if self._owner.fileno() in ready:
                    chunk = self._owner.recv(1 << 16)
                    if not chunk:
                        return
                    *lines, pending = (pending + chunk).split(b"\n")
                    for line in lines:
                        self._obey(json.loads(line))
        except (BrokenPipeError, ConnectionResetError):
            return
        finally:
            if os.getpid() == self._pid:
                self._end_all()

    def _say(self, message: dict[str, Any]) -> None:
        self._owner.sendall(json.dumps(message).encode() + b"\n")

    def _obey(self, order: dict[str, Any]) -> None:
        if order["do"] == "signal":
            for pid, container in self._running.items():
                if container == order["id"]:
                    _kill_group(pid, order["signal"])
            return
        try:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            self._say(
                {"id": order["id"], "failed": f"the log {order['log']} cannot be opened: {error.strerror}"}
            )
            return
        pid = os.fork()
        if pid == 0:
            self._become(order, log)
        os.close(log)
        self._running[pid] = order["id"]
        self._say({"id": order["id"], "pid": pid})

    def _become(self, order: dict[str, Any], log: int) -> NoReturn:
        """In the child: a session of its own, dead when we are, then the program."""
        status = 127
        try:
            os.setsid()
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self._pid:
                os._exit(137)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            for descriptor in (null, log, self._owner.fileno(), self._wakeup.fileno()):
                os.close(descriptor)
            os.close(self._wakeup_writer.fileno())
            os.nice(order["nice"])
            os.chdir(order["cwd"])
            if order["call"] is None:
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                os.execve(order["argv"][0], order["argv"], order["env"])
            os.environ.clear()
            os.environ.update(order["env"])
            sys.argv = order["argv"]
            _libc.prctl(_PR_SET_NAME, os.path.basename(order["argv"][0]).encode()[:15], 0, 0, 0)
            status = _call(order["call"])
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            # Not sys.exit: the server's own clean-up must not run a second time in here.
            os._exit(status)

    def _reap(self) -> None:
        while True:
            try:
                # Look before reaping: while the leader is a zombie its group's number is nobody else's.
                seen = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if seen is None:
                return
            container = self._running.pop(seen.si_pid, None)
            if container is not None:
                _kill_group(seen.si_pid, signal.SIGKILL)
            _, status = os.waitpid(seen.si_pid, 0)
            if container is not None:
                self._kill_orphans(container)
                code = os.waitstatus_to_exitcode(status)
                self._say({"id": container, "exit": 128 - code if code < 0 else code})

    def _kill_orphans(self, container: str) -> None:
        """End what has left its group but still carries the container's mark."""
        mark = f"{MARK}={container}\0".encode()
        for pid in _children():
            if pid not in self._running:
                with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environ:
                    if mark in environ.read():
                        os.kill(pid, signal.SIGKILL)

    def _end_all(self) -> None:
        for pid in self._running:
            _kill_group(pid, signal.SIGKILL)
        # Each that ends hands us its own children, so we look until there are none.
        while children := _children():
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)


def _call(target: str) -> int:
    """Run `module:function` as a console script would; its exit status."""
    module, _, function = target.partition(":")
    try:
        result = getattr(importlib.import_module(module), function)()
    except SystemExit as end:
        result = end.code
    if isinstance(result, str):
        print(result, file=sys.stderr)
        return 1
    return int(result or 0)


def _kill_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        # Between the fork and its setsid the child has no group yet.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        return [int(pid) for pid in children.read().split()]


def _preload(names: list[str]) -> None:
    for name in names:
        module = importlib.import_module(name)
        if name == "torch":
            module.set_num_threads(1)
        if name == "disaggworker":
            for part in pkgutil.walk_packages(module.__path__, "disaggworker."):
                importlib.import_module(part.name)
    # What is here now stays: without this the children's collections would copy every shared page.
    gc.collect()
    gc.freeze()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(
            f"importing {', '.join(names)} started {threads - 1} threads; a fork would lose them"
        )


def main() -> None:
    descriptor, *names = sys.argv[1:]
    owner = socket.socket(fileno=int(descriptor))
    owner.set_inheritable(False)
    _preload(names)
    ForkServer(owner).serve()


if __name__ == "__main__":
    main()

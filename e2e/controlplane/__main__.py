"""``python -m e2e.controlplane build`` and ``python -m e2e.controlplane up [--folder F]``."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from e2e.controlplane.binaries import ensure
from e2e.controlplane.controlplane import ControlPlane
from e2e.controlplane.errors import ControlPlaneError
from e2e.controlplane.progress import to_stderr


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e.controlplane", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build what is not built yet, and print where everything is")
    up = commands.add_parser("up", help="run a control plane until Ctrl-C")
    up.add_argument("--folder", type=Path, help="where its files go (default: a temporary one)")
    arguments = parser.parse_args()
    # SIGTERM as Ctrl-C, so that `finally` and `with` do their work.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if arguments.command == "build":
            for name, path in vars(ensure(to_stderr)).items():
                print(f"{name}\t{path}")
        else:
            run_until_interrupted(arguments.folder)
    except ControlPlaneError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_until_interrupted(folder: Path | None) -> None:
    """Print KUBECONFIG when ready, then wait; raises ``ComponentDied`` if a component ends by itself."""
    binaries = ensure(to_stderr)
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="disaggserve-")))
        cluster = ControlPlane(folder, binaries)
        stack.callback(cluster.stop)
        cluster.start(to_stderr)
        print(f"export KUBECONFIG={cluster.kubeconfig}", flush=True)
        to_stderr(f"kubectl: {binaries.kubectl}\nCtrl-C ends it")
        while True:
            cluster.check()
            signal.sigtimedwait([], 1.0)


if __name__ == "__main__":
    sys.exit(main())

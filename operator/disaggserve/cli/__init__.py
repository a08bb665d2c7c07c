"""The command line, also the kubectl plugin `kubectl disaggserve`.

Exit codes: 0 done, 1 the input is at fault, 2 usage, 3 no feasible plan. Commands import what they need when they run:
`crd`, `validate` and `--help` load neither numba nor kopf.
"""

from __future__ import annotations

import sys

from disaggserve.api.errors import DisaggServeError, Infeasible, InvalidManifest
from disaggserve.cli.app import app


def main() -> None:
    try:
        app()
    except InvalidManifest as error:
        sys.exit("\n".join(map(str, error.faults)))
    except Infeasible as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    except DisaggServeError as error:
        sys.exit(str(error))
    except BrokenPipeError:
        sys.exit(0)

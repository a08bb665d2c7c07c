"""Free ports on loopback."""

from __future__ import annotations

import socket
from contextlib import ExitStack


def free_ports(count: int, address: str = "127.0.0.1") -> tuple[int, ...]:
    """That many ports nobody listens on now, all different: they are held together, then let go.

    Somebody may take one before its owner binds it; who starts a server retries (``ATTEMPTS``).
    """
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket(socket.AF_INET)) for _ in range(count)]
        for each in sockets:
            each.bind((address, 0))
        return tuple(int(each.getsockname()[1]) for each in sockets)


ATTEMPTS = 3
"""How often a server is started anew, on other ports, when its port was snatched away."""

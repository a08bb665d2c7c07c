"""Loopback addresses for nodes and pods: every agent has a /16 of 127.0.0.0/8 to itself."""

import random
import socket
from collections import deque

from e2e.nodes.errors import AgentError

_CLAIM_HOST = "255.254"
_CLAIM_PORT = 61616
_TRIES = 64


class Addresses:
    """Addresses 127.x.0.1 … 127.x.249.254 for pods, 127.x.250.n for nodes.

    x is drawn at random, and held against other agents on this machine by a bound socket: it is free again
    as soon as this process ends, however it ends.
    """

    def __init__(self) -> None:
        for _ in range(_TRIES):
            second = random.randint(1, 254)
            claim = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                claim.bind((f"127.{second}.{_CLAIM_HOST}", _CLAIM_PORT))
                # Without listening a second bind with SO_REUSEADDR would succeed.
                claim.listen(1)
            except OSError:
                claim.close()
                continue
            self._claim = claim
            self.network = f"127.{second}"
            break
        else:
            raise AgentError("no free network in 127.0.0.0/8: too many agents on this machine")
        self._next = 0
        self._free: deque[str] = deque()

    def node(self, index: int) -> str:
        """The address of the node with that index, 0 … 253."""
        return f"{self.network}.250.{index + 1}"

    def take(self) -> str:
        """A pod address; used ones come back last, so that a late caller does not meet the wrong pod."""
        if self._next < 250 * 254:
            third, fourth = divmod(self._next, 254)
            self._next += 1
            return f"{self.network}.{third}.{fourth + 1}"
        return self._free.popleft()

    def give_back(self, address: str) -> None:
        """A pod that has ended lets go of its address."""
        self._free.append(address)

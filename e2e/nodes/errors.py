"""What can go wrong on a simulated node, as a tree.

NodesError               anything this package raises on purpose
├── TopologyError        the topology file is at fault: which entry, what is wrong, what would be right
├── ApiError             the API server answered with an error status
├── AgentError           the agent could not start or did not survive
├── OrderError           an order (fail, recover, drain, crash) could not be carried out
└── Refused              a pod asks for what a simulated node cannot do: goes into the pod's status
    └── NotYet           the same, but may heal by itself (a ConfigMap that is missing): tried again
"""


class NodesError(Exception):
    """Anything this package raises on purpose."""


class TopologyError(NodesError):
    """The topology file is at fault."""


class ApiError(NodesError):
    """The API server answered with an error status."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason


class AgentError(NodesError):
    """The agent could not start or did not survive."""


class OrderError(NodesError):
    """An order could not be carried out."""


class Refused(NodesError):
    """A pod asks for what a simulated node cannot do.

    `reason` is what a kubelet would write for such a fault (`ErrImagePull`, `CreateContainerError`, …).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class NotYet(Refused):
    """What is missing may still come."""

"""Simulated GPU nodes: Node objects in a real control plane, and their pods as local processes.

    with Nodes(cluster.kubeconfig, TOPOLOGIES / "two-dgx.yaml", folder) as nodes:
        ...

The scheduler, the controllers and the API server are the real ones. A pod that is bound to one of these nodes
runs for real, as processes with an address of their own in 127.0.0.0/8; what its image would start is looked up
in a table (`images`). Not simulated: isolation (users, limits, read-only mounts), exec, and the network between
nodes.
"""

from pathlib import Path

from e2e.nodes.errors import AgentError, ApiError, NodesError, OrderError, TopologyError
from e2e.nodes.nodes import Nodes

TOPOLOGIES = Path(__file__).parent / "topologies"

__all__ = ["TOPOLOGIES", "AgentError", "ApiError", "Nodes", "NodesError", "OrderError", "TopologyError"]

"""Everything that touches the cluster: the only place with a clock, a network and a process pool."""

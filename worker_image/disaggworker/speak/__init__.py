"""Our worker behind another engine's front: what a router and an operator see of that engine, on a laptop.

`--speak vllm` answers as `vllm serve` with NixlConnector does, its faults included. tests/conformance holds it and a real vLLM to
the same suite, so that it cannot drift.
"""

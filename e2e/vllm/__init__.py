"""A real vLLM on a CPU: its environment, and what is tested with it (`make e2e-vllm`)."""

"""KV cache: who owns which block, where the bytes are, and how they travel."""

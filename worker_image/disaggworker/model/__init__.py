"""Decoders in plain torch, read from safetensors and config.json."""

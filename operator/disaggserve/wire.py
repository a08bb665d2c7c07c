"""What both the operator and the data plane go by; apart from the messages, since the operator sends none."""

VERSION = (
    4  # raised when a message changes so that the other side would misread it: such instances never pair
)

VLLM_LEASE_S = (
    30  # how long vLLM's prefill keeps KV that nobody has asked for: its own default, set and reckoned with
)

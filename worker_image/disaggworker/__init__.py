"""The data plane: prefill and decode workers, and the router in front of them."""

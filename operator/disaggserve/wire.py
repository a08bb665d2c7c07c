"""The version of every message between processes; apart from them, since the operator reads it and sends none."""

VERSION = (
    2  # raised when a message changes so that the other side would misread it: such instances never pair
)

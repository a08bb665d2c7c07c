"""The router's one frozen configuration; the only reader of its flags and environment."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Times in seconds, sizes in bytes. `ttft_s` and `tpot_s` are the promise in force for as long as the process lives."""

    namespace: str
    resource: str
    model_name: str
    context_length: int
    ttft_s: float
    tpot_s: float
    host: str
    port: int = 8000
    queue_timeout_s: float = 60.0  # how long a request waits for a usable pair
    max_queued: int = 1000  # accepted requests that no prefill has answered yet
    max_body_bytes: int = 4 * 2**20
    grace_s: float = 600.0  # how long streams may go on after SIGTERM
    linger_s: float = 3.0  # how long new requests are still taken after SIGTERM: endpoints lag behind
    connect_timeout_s: float = 3.0


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Flags first, then POD_IP and POD_NAMESPACE. Ends the process with status 2 and one sentence on wrong usage."""
    p = argparse.ArgumentParser(prog="disaggworker router", description=__doc__, allow_abbrev=False)
    p.add_argument("--namespace", default=environ.get("POD_NAMESPACE"), help="where the instances' pods are")
    p.add_argument("--resource", required=True, help="name of the DisaggServe resource")
    p.add_argument("--model-name", required=True, help="the name that clients say")
    p.add_argument("--context-length", type=_count, required=True, help="tokens")
    p.add_argument("--ttft", type=_seconds, required=True, help="promised time to first token, seconds")
    p.add_argument("--tpot", type=_seconds, required=True, help="promised time per output token, seconds")
    p.add_argument("--host", default=environ.get("POD_IP"), help="address to listen on (default: $POD_IP)")
    p.add_argument("--port", type=_count, default=Config.port)
    p.add_argument(
        "--queue-timeout",
        type=_seconds,
        default=Config.queue_timeout_s,
        help="seconds a request waits for an instance",
    )
    p.add_argument(
        "--max-queued", type=_count, default=Config.max_queued, help="requests before their first token"
    )
    p.add_argument(
        "--linger",
        type=_seconds,
        default=Config.linger_s,
        help="seconds that new requests are still taken after SIGTERM",
    )
    p.add_argument("--grace", type=_seconds, default=Config.grace_s, help="seconds for streams after SIGTERM")
    a = p.parse_args(argv)
    if not a.namespace:
        p.error("no namespace: give --namespace, or set POD_NAMESPACE from the downward API")
    if not a.host:
        p.error("no address to listen on: give --host, or set POD_IP from the downward API")
    return Config(
        namespace=a.namespace,
        resource=a.resource,
        model_name=a.model_name,
        context_length=a.context_length,
        ttft_s=a.ttft,
        tpot_s=a.tpot,
        host=a.host,
        port=a.port,
        queue_timeout_s=a.queue_timeout,
        max_queued=a.max_queued,
        grace_s=a.grace,
        linger_s=a.linger,
    )

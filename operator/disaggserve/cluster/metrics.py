"""What the operator says of itself to Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()
RECONCILES = Counter(
    "disaggserve_operator_reconciles", "Reconciles by outcome.", ["outcome"], registry=REGISTRY
)
COMMITS = Counter("disaggserve_operator_commits", "Plans committed by cause.", ["cause"], registry=REGISTRY)
SEARCH_SECONDS = Histogram(
    "disaggserve_operator_search_seconds",
    "Wall clock of one search, seconds.",
    buckets=(0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
    registry=REGISTRY,
)
LEADING = Gauge("disaggserve_operator_leading", "1 while this process holds the lease.", registry=REGISTRY)
GPUS = Gauge(
    "disaggserve_operator_plan_gpus",
    "GPUs of the committed plan.",
    ["namespace", "resource"],
    registry=REGISTRY,
)

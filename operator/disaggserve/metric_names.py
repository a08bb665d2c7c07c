"""Every metric that our processes export: names, labels, units, bucket edges. Plain constants, so that writer and reader agree.

Routers say what users saw (REFERENCE § 7): demand is arrivals, the promise is judged per request and jointly, lengths are
counted as pairs. Every router series carries `resource`, whose value is `resource_label(namespace, name)`.
Workers say what vLLM says, under vLLM's names, and what only a paced worker can say.

Counters are named as they are exposed (`…_total`; the sums of summaries `…_sum`); histograms without `_bucket`, `_sum`, `_count`.
"""

from __future__ import annotations

import math

# ------------------------------------------------------------------------------------------------ labels

RESOURCE_LABEL = "resource"
OUTCOME_LABEL = "outcome"
SLO_MET_LABEL = "slo_met"  # "true" | "false": TTFT and TPOT both, under the promise then in force
INPUT_BUCKET_LABEL = "input_bucket"  # index into INPUT_EDGES: bucket k = (edge k, edge k + 1] tokens
OUTPUT_BUCKET_LABEL = "output_bucket"  # index into OUTPUT_EDGES
INSTANCE_LABEL = "instance_name"  # the pod's name; `instance` is Prometheus' own, the scraped address
ROLE_LABEL = "role"


def resource_label(namespace: str, name: str) -> str:
    """One resource's value of the label `resource`; needs no relabelling to be unique in a cluster."""
    return f"{namespace}/{name}"


# ------------------------------------------------------------------------------------------------ outcomes

OK = "ok"  # answered in full
FAILED = "failed"  # accepted and not answered in full, or any 5xx
CANCELLED = "cancelled"  # the client went away
REFUSED = "refused"  # 429 or 503: no room in the queue, or nothing that could serve came up in time
REJECTED = "rejected"  # the request itself is at fault: any other 4xx
OUTCOMES = (OK, FAILED, CANCELLED, REFUSED, REJECTED)
JUDGED_OUTCOMES = (OK, FAILED, REFUSED)
"""What attainment is a share of: the client's own faults and goodbyes do not count."""

# ------------------------------------------------------------------------------------------------ router

ROUTER_REQUESTS = "disaggserve_router_requests_total"  # {outcome, slo_met}
ROUTER_ARRIVALS = "disaggserve_router_arrivals_total"  # well-formed requests, refused ones too
ROUTER_GAPS = "disaggserve_router_interarrival_seconds_sum"
ROUTER_GAPS_SQUARED = "disaggserve_router_interarrival_seconds_squares_sum"
ROUTER_LENGTHS = "disaggserve_router_lengths_total"  # {input_bucket, output_bucket}
ROUTER_INPUT_TOKENS = "disaggserve_router_input_tokens_total"  # {input_bucket}
ROUTER_OUTPUT_TOKENS = "disaggserve_router_output_tokens_total"  # {output_bucket}
ROUTER_UNCACHED_TOKENS = "disaggserve_router_uncached_input_tokens_total"
ROUTER_RETRIES = "disaggserve_router_retries_total"  # {role}: of the instance that failed
ROUTER_CONTINUATIONS = "disaggserve_router_continuations_total"
ROUTER_TTFT = "disaggserve_router_ttft_seconds"
ROUTER_TPOT = "disaggserve_router_tpot_seconds"
ROUTER_IN_FLIGHT = "disaggserve_router_in_flight"  # {instance_name, role}
ROUTER_QUEUED = "disaggserve_router_queued"

# ------------------------------------------------------------------------------------------------ workers

WORKER_STEPS = "disaggserve_worker_steps_total"
WORKER_LATE_STEPS = "disaggserve_worker_late_steps_total"
WORKER_EMULATED = "disaggserve_worker_emulated"
WORKER_ROLE = "disaggserve_worker_role"  # {role}
WORKER_KV_PULLS = "disaggserve_worker_kv_pulls_total"

VLLM_TTFT = "vllm:time_to_first_token_seconds"
VLLM_INTER_TOKEN = "vllm:inter_token_latency_seconds"
VLLM_TPOT = "vllm:request_time_per_output_token_seconds"
VLLM_PROMPT_TOKENS = "vllm:request_prompt_tokens"
VLLM_GENERATION_TOKENS = "vllm:request_generation_tokens"
VLLM_RUNNING = "vllm:num_requests_running"
VLLM_WAITING = "vllm:num_requests_waiting"
VLLM_KV_USAGE = "vllm:kv_cache_usage_perc"
VLLM_QUEUE_TIME = "vllm:request_queue_time_seconds"
VLLM_PREFILL_TIME = "vllm:request_prefill_time_seconds"
VLLM_DECODE_TIME = "vllm:request_decode_time_seconds"
VLLM_PREEMPTIONS = "vllm:num_preemptions_total"
VLLM_CACHE_QUERIES = "vllm:prefix_cache_queries_total"
VLLM_CACHE_HITS = "vllm:prefix_cache_hits_total"
VLLM_PROMPT_TOKENS_BY_SOURCE = "vllm:prompt_tokens_by_source_total"  # {source}
PULLED = "external_kv_transfer"  # the source of what was pulled
VLLM_KV_EXPIRED = "vllm:nixl_num_kv_expired_reqs_total"  # on prefill
VLLM_KV_LATE = (
    "vllm:nixl_num_notifications_after_expiry_total"  # on prefill: pulls of KV that was no longer held
)
VLLM_KV_FAILED = "vllm:nixl_num_failed_transfers_total"

# ------------------------------------------------------------------------------------------------ help texts

HELP = {
    ROUTER_REQUESTS: "Requests that ended, by outcome and by whether TTFT and TPOT both met the promise then in force.",
    ROUTER_ARRIVALS: "Well-formed requests that reached the router, refused ones included: the demand.",
    ROUTER_GAPS: "Sum of the times between one arrival and the next, in seconds.",
    ROUTER_GAPS_SQUARED: "Sum of the squared times between one arrival and the next, in square seconds.",
    ROUTER_LENGTHS: "Requests answered in full, by bucket of prompt length and bucket of output length.",
    ROUTER_INPUT_TOKENS: "Prompt tokens of the requests answered in full, by bucket of prompt length.",
    ROUTER_OUTPUT_TOKENS: "Generated tokens of the requests answered in full, by bucket of output length.",
    ROUTER_UNCACHED_TOKENS: "Prompt tokens that prefill computed, not found in a prefix cache.",
    ROUTER_RETRIES: "Attempts that an instance of this role failed and that were made again elsewhere.",
    ROUTER_CONTINUATIONS: "Answers that went on at other instances after the client had their first tokens.",
    ROUTER_TTFT: "Arrival at the router to the first token at the router, in seconds.",
    ROUTER_TPOT: "Time from first to last token at the router / (tokens - 1), in seconds; requests of two tokens and more.",
    ROUTER_IN_FLIGHT: "Requests in flight on an instance, as this router sees it.",
    ROUTER_QUEUED: "Accepted requests that no prefill instance has answered yet.",
    WORKER_STEPS: "Scheduler steps taken.",
    WORKER_LATE_STEPS: "Paced steps whose own computation took over 10 % longer than the pace.",
    WORKER_KV_PULLS: "Hand-offs whose KV was pulled, by the transport that its bytes took.",
    WORKER_EMULATED: "1 where the time of a real GPU is kept by waiting, 0 where it is the hardware's own.",
    WORKER_ROLE: "1 for the role that the worker has at present.",
    VLLM_TTFT: "Arrival at this worker to its first token, in seconds.",
    VLLM_INTER_TOKEN: "Time between two tokens of a request, in seconds.",
    VLLM_TPOT: "Mean time per output token of a request, in seconds.",
    VLLM_PROMPT_TOKENS: "Prompt tokens of a request.",
    VLLM_GENERATION_TOKENS: "Generated tokens of a request.",
    VLLM_RUNNING: "Requests in the running batch.",
    VLLM_WAITING: "Requests that wait for a place in the batch.",
    VLLM_KV_USAGE: "Share of KV blocks in use, 0 to 1.",
    VLLM_QUEUE_TIME: "Time that a request waited before its first step, in seconds.",
    VLLM_PREFILL_TIME: "Time that a request's prefill took, in seconds.",
    VLLM_DECODE_TIME: "Time from a request's first token to its last, in seconds.",
    VLLM_PREEMPTIONS: "Requests put back for want of KV blocks.",
    VLLM_CACHE_QUERIES: "Prompt tokens that were looked up in the prefix cache.",
    VLLM_CACHE_HITS: "Prompt tokens that the prefix cache had.",
    VLLM_PROMPT_TOKENS_BY_SOURCE: "Prompt tokens by where their KV came from.",
    VLLM_KV_EXPIRED: "Requests whose KV nobody fetched before its lease ended.",
    VLLM_KV_LATE: "Fetches of KV whose lease had ended: what they got may be another request's.",
    VLLM_KV_FAILED: "Fetches of KV that failed.",
}

# ------------------------------------------------------------------------------------------------ edges

# Twelve buckets each, doubling in between; the last is open, so that no length falls outside. Chat prompts lie between 64 and 4096
# tokens and answers between 16 and 1024 (data/lengths): six buckets or more for either.
INPUT_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, math.inf)  # tokens
OUTPUT_EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, math.inf)  # tokens

# Upper edges in seconds, without +Inf. They never move with the promise; what is commonly promised is an edge (REFERENCE § 3).
TTFT_BUCKETS = (
    *(0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.04, 0.06, 0.08),
    *(0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 2.5, 4.0, 6.0, 10.0, 15.0, 25.0, 40.0, 60.0, 100.0, 150.0, 300.0, 600.0),
)
TPOT_BUCKETS = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08),
    *(0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 4.0, 10.0, 15.0),
)

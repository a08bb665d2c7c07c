"""What a worker measures of itself, in Prometheus' text form, under vLLM's names.

Plain numbers on the event loop: a histogram costs one bisection per value, which a token can afford.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from disaggserve import metric_names as names

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TOKEN_EDGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Cumulative buckets, a sum and a count."""

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._edges, value)] += 1
        self._sum += value

    def lines(self, name: str, label: str) -> list[str]:
        """Its series."""
        out, total = [], 0
        for edge, count in zip([*map(str, map(float, self._edges)), "+Inf"], self._counts, strict=True):
            total += count
            out.append(f'{name}_bucket{{{label},le="{edge}"}} {total}')
        return [*out, f"{name}_sum{{{label}}} {self._sum}", f"{name}_count{{{label}}} {total}"]


class Metrics:
    """The histograms of one worker; the gauges are given at the time of asking."""

    def __init__(self, model_name: str) -> None:
        quoted = model_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        self._label = f'model_name="{quoted}"'
        self.ttft = Histogram(names.TTFT_BUCKETS)
        self.queue = Histogram(names.TTFT_BUCKETS)
        self.prefill = Histogram(names.TTFT_BUCKETS)
        self.prompt_tokens = Histogram(_TOKEN_EDGES)
        self.inter_token = Histogram(names.TPOT_BUCKETS)
        self.tpot = Histogram(names.TPOT_BUCKETS)
        self.decode = Histogram(names.TTFT_BUCKETS)
        self.generation_tokens = Histogram(_TOKEN_EDGES)
        self.pulls: Counter[str] = Counter()  # by transport
        # A role may change: every worker has all of them. Prefill fills the first four, decode the others (REFERENCE § 7).
        self._shown = {
            names.VLLM_TTFT: self.ttft,
            names.VLLM_QUEUE_TIME: self.queue,
            names.VLLM_PREFILL_TIME: self.prefill,
            names.VLLM_PROMPT_TOKENS: self.prompt_tokens,
            names.VLLM_INTER_TOKEN: self.inter_token,
            names.VLLM_TPOT: self.tpot,
            names.VLLM_DECODE_TIME: self.decode,
            names.VLLM_GENERATION_TOKENS: self.generation_tokens,
        }

    def text(self, numbers: dict[str, float], role: str) -> str:
        """The whole exposition; `numbers` are gauges and, where a name ends in _total, counters."""
        name = names.WORKER_ROLE
        out = [f"# HELP {name} {names.HELP[name]}", f"# TYPE {name} gauge"]
        out.append(f'{name}{{{self._label},{names.ROLE_LABEL}="{role}"}} 1')
        for name, number in numbers.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            out += [f"# HELP {name} {names.HELP[name]}", f"# TYPE {name} {kind}"]
            out.append(f"{name}{{{self._label}}} {number}")
        if self.pulls:
            name = names.WORKER_KV_PULLS
            out += [f"# HELP {name} {names.HELP[name]}", f"# TYPE {name} counter"]
            out += [f'{name}{{{self._label},transport="{way}"}} {n}' for way, n in sorted(self.pulls.items())]
        for name, histogram in self._shown.items():
            out += [f"# HELP {name} {names.HELP[name]}", f"# TYPE {name} histogram"]
            out += histogram.lines(name, self._label)
        return "\n".join(out) + "\n"

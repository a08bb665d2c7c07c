"""What vLLM's /metrics says, as far as a router, an operator or a dashboard of ours reads it."""

from __future__ import annotations

from collections.abc import Mapping

from disaggserve import metric_names as names
from disaggworker.metrics import Histogram

_TOKEN_EDGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Figures:
    """Histograms are filled by whoever serves; gauges and counters are given at the time of asking."""

    def __init__(self, model_name: str) -> None:
        quoted = model_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        self._label = f'engine="0",model_name="{quoted}"'
        self.local_tokens = self.pulled_tokens = 0
        self.times = {
            name: Histogram(names.TTFT_BUCKETS)
            for name in (
                names.VLLM_TTFT,
                names.VLLM_QUEUE_TIME,
                names.VLLM_PREFILL_TIME,
                names.VLLM_DECODE_TIME,
            )
        } | {name: Histogram(names.TPOT_BUCKETS) for name in (names.VLLM_INTER_TOKEN, names.VLLM_TPOT)}
        self.lengths = {
            name: Histogram(_TOKEN_EDGES) for name in (names.VLLM_PROMPT_TOKENS, names.VLLM_GENERATION_TOKENS)
        }

    def text(self, numbers: Mapping[str, float]) -> str:
        """The whole exposition."""
        out: list[str] = []
        for name, number in numbers.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            out += [f"# HELP {name} {names.HELP[name]}", f"# TYPE {name} {kind}"]
            out.append(f"{name}{{{self._label}}} {number}")
        name = names.VLLM_PROMPT_TOKENS_BY_SOURCE
        out += [f"# HELP {name} {names.HELP[name]}", f"# TYPE {name} counter"]
        for source, tokens in (
            ("local_compute", self.local_tokens),
            (names.PULLED, self.pulled_tokens),
        ):
            out.append(f'{name}{{{self._label},source="{source}"}} {tokens}')
        for name, histogram in (self.times | self.lengths).items():
            out += [f"# HELP {name} {names.HELP[name]}", f"# TYPE {name} histogram"]
            out += histogram.lines(name, self._label)
        return "\n".join(out) + "\n"

"""What the paper ran and what it measured: DistServe (OSDI '24), figures per GPU of A100-80G, rates in req/s, times in seconds.

Sources: promises, placements, goodputs and ratios are the paper's (section 6). How many requests a run had and
at which rate the promise was scaled is what its public evaluation scripts do (LLMServe/DistServe,
distserve/evaluation/ae-scripts/e2e): every run begins on an empty engine and ends after so many requests *per GPU*.
"""

from __future__ import annotations

from dataclasses import dataclass

from disaggserve.simulate import Promise

GPU = "NVIDIA-A100-SXM4-80GB"
NODES, NODE_GPUS = 4, 8
TARGET = 0.90


@dataclass(frozen=True)
class Application:
    """One workload of the paper."""

    key: str
    title: str
    model: str
    lengths: str  # preset
    promise: Promise
    prefill: tuple[int, int]  # the paper's own placement: tp, pp
    decode: tuple[int, int]
    colocated_tp: int  # of vLLM and DeepSpeed-MII
    prompts_per_gpu: int
    scaled_at: float  # rate per GPU at which the promise is scaled
    distserve: float  # goodput per GPU that the paper measured
    vllm: float
    tighter: tuple[str, str] = (
        "1.8 to 3.2×",
        "1.7 to 1.8×",
    )  # promises than vLLM's and MII's, as the paper measured
    over_mii: str = "1.6 to 7.4×"  # its goodput over MII's
    scales: tuple[float, ...] = (1.6, 1.4, 1.2, 1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of the promise
    mii: bool = True  # whether the paper could run DeepSpeed-MII
    fitted: bool = True  # whether a fit of step times ships for this model

    @property
    def gpus(self) -> int:
        """Of the paper's own placement."""
        return self.prefill[0] * self.prefill[1] + self.decode[0] * self.decode[1]


APPLICATIONS = (
    Application(
        "chat-13b", "chat, OPT-13B, ShareGPT", "facebook/opt-13b", "sharegpt", Promise(0.25, 0.1, TARGET),
        (2, 1), (1, 1), 1, 100, 1.5, 2.30, 0.50,
    ),
    Application(
        "chat-66b", "chat, OPT-66B, ShareGPT", "facebook/opt-66b", "sharegpt", Promise(2.5, 0.15, TARGET),
        (4, 1), (2, 2), 4, 25, 0.25, 0.955, 0.347,
    ),
    Application(
        "chat-175b", "chat, OPT-175B, ShareGPT", "facebook/opt-175b", "sharegpt", Promise(4.0, 0.2, TARGET),
        (3, 3), (4, 3), 8, 25, 0.125, 0.202, 0.101, ("1.8 to 3.2×", "–"), "–", mii=False, fitted=False,
    ),
    Application(
        "code-66b", "code completion, OPT-66B, HumanEval", "facebook/opt-66b", "humaneval", Promise(0.125, 0.2, TARGET),
        (4, 1), (2, 2), 4, 50, 0.875, 1.144, 0.200,
        ("1.4×", "1.4×"), "1.6×",
    ),
    Application(
        "summary-66b", "summarisation, OPT-66B, LongBench", "facebook/opt-66b", "longbench", Promise(15.0, 0.15, TARGET),
        (4, 1), (2, 2), 4, 25, 0.375, 0.53, 0.125,
        ("12.6×", "2.6×"), "1.8×",
        scales=(10.0, 8.5, 7.0, 5.5, 4.0, 2.5, 1.5, 1.0, 0.8, 0.6, 0.5, 0.4, 0.3),
    ),
)  # fmt: skip

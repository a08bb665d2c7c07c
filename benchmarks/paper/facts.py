"""What the paper ran and what it measured: DistServe (OSDI '24), figures per GPU of A100-80G, rates in req/s, times in seconds.

Sources: promises, placements and goodputs are the paper's (sections 6.1 and 6.2, table 3). How many requests a run had and
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
        (3, 3), (4, 3), 8, 25, 0.125, 0.202, 0.101, mii=False, fitted=False,
    ),
    Application(
        "code-66b", "code completion, OPT-66B, HumanEval", "facebook/opt-66b", "humaneval", Promise(0.125, 0.2, TARGET),
        (4, 1), (2, 2), 4, 50, 0.875, 1.144, 0.200,
    ),
    Application(
        "summary-66b", "summarisation, OPT-66B, LongBench", "facebook/opt-66b", "longbench", Promise(15.0, 0.15, TARGET),
        (4, 1), (2, 2), 4, 25, 0.375, 0.53, 0.125,
    ),
)  # fmt: skip

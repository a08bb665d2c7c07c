"""One picture of a run: what was promised, what was served, and which plan stood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from disaggserve.api.model import seconds
from disaggserve.api.plan import Plan
from disaggserve.api.spec import Spec
from e2e.load import Result

_WINDOW_S = 10.0


def draw(
    path: Path,
    spec: Spec,
    loads: Sequence[tuple[float, Sequence[Result]]],
    plans: Sequence[Plan],
    changed_s: Sequence[float],
) -> Path:
    """`loads`: (offset in seconds, results); `changed_s`: when the new plan was committed, and when it stood."""
    served = [(offset + r.arrival_s, r) for offset, results in loads for r in results if r.outcome == "ok"]
    at = np.array([t for t, _ in served])
    ttft = np.array([r.ttft_s for _, r in served])
    tpot = np.array([r.tpot_s for _, r in served])
    prompt = np.array([r.input_tokens for _, r in served])
    met = (ttft <= seconds(spec.slo.ttft)) & (tpot <= seconds(spec.slo.tpot))
    edges = np.arange(0, at.max() + _WINDOW_S, _WINDOW_S)
    bins = [(e, (at >= e) & (at < e + _WINDOW_S)) for e in edges[:-1]]
    bins = [(e + _WINDOW_S / 2, inside) for e, inside in bins if inside.sum() >= 3]
    middle = [m for m, _ in bins]

    figure, axes = plt.subplots(4, 1, figsize=(10, 9), sharex=True, constrained_layout=True)
    figure.suptitle(
        f"{spec.model.id} on simulated A100s (emulated figures): TTFT {spec.slo.ttft}, TPOT {spec.slo.tpot}"
    )
    axes[0].plot(at, prompt, ".", markersize=3, color="tab:gray")
    axes[0].set_ylabel("prompt tokens")
    axes[1].plot(middle, [100 * met[i].mean() for _, i in bins], "o-", color="tab:blue")
    axes[1].axhline(100 * spec.slo.attainment, color="tab:red", linewidth=1, label="promise")
    axes[1].set_ylabel("attainment, %")
    axes[1].set_ylim(0, 102)
    axes[2].plot(at, 1000 * ttft, ".", markersize=3, color="tab:blue", label="TTFT")
    axes[2].plot(at, 1000 * tpot, ".", markersize=3, color="tab:green", label="TPOT")
    axes[2].axhline(1000 * seconds(spec.slo.ttft), color="tab:blue", linewidth=1, linestyle="--")
    axes[2].axhline(1000 * seconds(spec.slo.tpot), color="tab:green", linewidth=1, linestyle="--")
    axes[2].set_yscale("log")
    axes[2].set_ylabel("ms")
    axes[2].legend(loc="upper left")
    change = changed_s[0] if changed_s else float(at.max())
    after = plans[-1].gpus if changed_s else plans[0].gpus
    axes[3].step([0, change, at.max()], [plans[0].gpus, after, after], where="post")
    axes[3].set_ylabel("GPUs of the plan")
    axes[3].set_ylim(0)
    axes[3].set_xlabel("seconds since the first request")
    for axis in axes:
        for moment, style in zip(changed_s, ("-", ":"), strict=False):
            axis.axvline(moment, color="black", linewidth=0.8, linestyle=style)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path

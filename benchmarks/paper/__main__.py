"""The paper's evaluation, simulated: every figure and picture of benchmarks/paper/README.md, made anew.

    python -m benchmarks.paper

The figures are simulated, so they are the same on every machine; it takes some minutes on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from benchmarks.paper import draw, page, systems
from benchmarks.paper.facts import APPLICATIONS, Application
from benchmarks.paper.measure import SEEDS, Bench, Goodput, System, scaled
from disaggserve import simulate

HERE = Path(__file__).parent
RATES = np.geomspace(0.12, 2.6, 16)  # × what the paper measured of DistServe
BREAKDOWN = "chat-175b"
BREAKDOWN_RATES = (0.0625, 0.09375, 0.125, 0.15625, 0.1875)  # per GPU, of those that the artifact ran
TRANSFERS = {
    "chat-13b": 2.0,
    "chat-66b": 0.375,
    "chat-175b": 0.1875,
}  # per GPU, those of the artifact's figure 10
ABLATION = ("chat-13b", "chat-66b")


def main() -> None:
    by_key = {a.key: a for a in APPLICATIONS}
    results = []
    for app in APPLICATIONS:
        with _busy(app.title):
            results.append(_application(app))
    draw.curves(HERE / "rate.svg", {r.app: r.by_rate for r in results}, "rate per GPU, req/s", measured=True)
    draw.curves(
        HERE / "promise.svg",
        {r.app: r.by_scale for r in results},
        "scale of the promise",
        measured=False,
        falling=True,
    )
    draw.goodputs(HERE / "goodput.svg", {r.app: r.goodputs for r in results})
    with _busy("breakdown"):
        bars = [(rate, _shares(by_key[BREAKDOWN], rate)) for rate in BREAKDOWN_RATES]
        moved = {by_key[k].title: _transfers(by_key[k], rate) for k, rate in TRANSFERS.items()}
    draw.breakdown(HERE / "breakdown.svg", bars, by_key[BREAKDOWN].title, moved)
    ablation = {r.app: r.ablation for r in results if r.app.key in ABLATION}
    draw.ablation(
        HERE / "ablation.svg", {a: {n: g for n, (g, _) in rows.items()} for a, rows in ablation.items()}
    )
    text = page.render(results, ablation, bars, moved)
    (HERE / "README.md").write_text(text, encoding="utf-8")
    print(text)


def _application(app: Application) -> page.Result:
    lengths = systems.lengths(app)
    by_rate, by_scale, goodputs, found = {}, {}, {}, []
    rates = [float(f"{app.distserve * x:.3g}") for x in RATES]
    for system in systems.systems(app):
        bench = Bench(system, lengths, app.prompts_per_gpu)
        found.append(system)
        goodputs[system.name] = bench.goodput(app.promise, app.distserve / 2)
        by_rate[system.name] = [(rate, bench.attained(rate, app.promise)) for rate in rates]
        by_scale[system.name] = [
            (s, bench.attained(app.scaled_at, scaled(app.promise, s))) for s in app.scales
        ]
    return page.Result(
        app,
        tuple(found),
        goodputs,
        by_rate,
        by_scale,
        _ablation(app, goodputs, found),
        _by_factor(app),
        _one_link(app),
    )


def _one_link(app: Application) -> float:
    """Goodput per GPU of the paper's placement, as it ran it, if a decode instance had one GPU's rate for all of its KV."""
    bench = Bench(systems.own(app, each_gpu=False), systems.lengths(app), app.prompts_per_gpu)
    return bench.goodput(app.promise, app.distserve / 2).as_run


def _by_factor(app: Application) -> dict[str, page.Vllm]:
    """vLLM as the paper ran it, by the factor on its raw fits."""
    found = {}
    for factor in systems.VLLM_FACTORS if app.fitted else ():
        system = systems.vllm(app, app.colocated_tp, factor)
        assert system is not None, "the paper's tp has a fit"
        bench = Bench(system, systems.lengths(app), app.prompts_per_gpu)
        goodput = bench.goodput(app.promise, app.distserve / 2).as_run
        found[factor] = page.Vllm(goodput, *bench.each(app.vllm, app.promise))
    return found


def _ablation(
    app: Application, goodputs: dict[str, Goodput], found: list[System]
) -> dict[str, tuple[float, str]]:
    """Goodput per GPU in steady state and shapes, in the order of the paper's figure 11."""
    words = {s.name: s.words for s in found}
    out = {"vLLM": (goodputs["vLLM"].steady, words["vLLM"])}
    if app.key in ABLATION:
        tuned = [
            (
                Bench(s, systems.lengths(app), app.prompts_per_gpu).goodput(app.promise, app.vllm).steady,
                s.words,
            )
            for s in systems.tuned_vllm(app)
        ]
        out["vLLM++"] = max(tuned)
    for name in ("DistServe-Low", "DistServe-High"):
        if name in goodputs:
            out[name] = (goodputs[name].steady, words[name])
    return out


def _shares(app: Application, per_gpu: float) -> npt.NDArray[np.float64]:
    """[5] share of each part in the time of all requests on the paper's own placement."""
    totals: npt.NDArray[np.float64] = np.sum([t.sum(axis=1) for t in _parts(app, per_gpu)], axis=0)
    shares: npt.NDArray[np.float64] = totals / totals.sum()
    return shares


def _transfers(app: Application, per_gpu: float) -> npt.NDArray[np.float64]:
    """Seconds on the link of every request of every run."""
    return np.concatenate([t[2] for t in _parts(app, per_gpu)])


def _parts(app: Application, per_gpu: float) -> Iterator[npt.NDArray[np.float64]]:
    system = systems.own(app)
    bench = Bench(system, systems.lengths(app), app.prompts_per_gpu)
    for seed in SEEDS:
        requests = bench.requests(per_gpu, seed)
        outcome = simulate.run(system.deployment, requests)
        moved = outcome.transfer_end_ns >= 0
        yield np.stack(simulate.parts(system.deployment, requests, outcome))[:, moved[outcome.last_ns >= 0]]


@contextmanager
def _busy(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing when piped."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(what):
        yield


if __name__ == "__main__":
    main()

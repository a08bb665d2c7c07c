"""`disaggserve plan`: the operator's own plan, without a cluster."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from disaggserve import latency, plan, workload
from disaggserve.api.errors import InvalidInput
from disaggserve.api.spec import Spec
from disaggserve.cli import show
from disaggserve.cli.files import objects, one
from disaggserve.cluster import searching
from disaggserve.workload import Lengths, Workload

ALGORITHMS = {"joint": "Joint", "distserve": "DistServe", "high": "HighAffinity", "low": "LowAffinity"}


@dataclass(frozen=True)
class Replacing:
    """Options that replace what the resource says; None leaves it."""

    algorithm: str | None = None
    profile: Path | None = None
    trace: Path | None = None
    lengths: Path | None = None
    rate: str | None = None
    max_gpus: int | None = None
    engine: str | None = None


def run(file: Path, nodes: Path, replacing: Replacing, output: str) -> None:
    spec = replaced(one(file).spec, replacing)
    expected = traffic(spec, replacing)
    options = plan.Options(
        profile=latency.Profile.load(replacing.profile) if replacing.profile else None,
        objective="goodput" if replacing.rate == "max" else "gpus",
        any_engine=replacing.engine == "any",
    )
    facts = read_facts(nodes)
    with show.busy("searching"):
        draft = searching.draft(spec, facts, expected, (), options)
    if output == "table":
        show.plan(spec, draft)
    else:
        show.dump(draft.plan.model_dump(mode="json", exclude_none=True), output)


def read_facts(path: Path) -> plan.Facts:
    """What `kubectl get nodes,pods -A -o yaml` prints. Raises InvalidInput where it holds no node."""
    found = objects(path)
    of_kind = {kind: tuple(o for o in found if o.get("kind") == kind) for kind in ("Node", "Pod")}
    if not of_kind["Node"]:
        raise InvalidInput(f"{path}: holds no Node; give what `kubectl get nodes,pods -A -o yaml` prints")
    return plan.Facts(nodes=of_kind["Node"], pods=of_kind["Pod"])


def replaced(spec: Spec, replacing: Replacing) -> Spec:
    """The spec with algorithm, rate, GPUs and engine of the options."""
    parts: dict[str, dict[str, object]] = {
        "planner": {"algorithm": replacing.algorithm and ALGORITHMS[replacing.algorithm]},
        "hardware": {"max_gpus": replacing.max_gpus},
        "engine": {"type": replacing.engine if replacing.engine != "any" else None},
        "workload": {"rate": _rate(replacing.rate)},
    }
    update = {
        part: getattr(spec, part).model_copy(update={k: v for k, v in given.items() if v is not None})
        for part, given in parts.items()
    }
    return spec.model_copy(update=update)


def _rate(text: str | None) -> float | None:
    if text is None or text == "max":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= 100_000:
        raise InvalidInput(f"--rate is {text!r}; give requests per second, or max")
    return rate


def traffic(spec: Spec, replacing: Replacing) -> Workload | None:
    """Traffic of a trace or a table of lengths; None where neither is given. Requests over the model's context are left out,
    and how many is said on stderr and in the source.

    Of a trace: its lengths in pairs, its mean rate (or --rate), and the coefficient of variation of its gaps.
    """
    if replacing.trace and replacing.lengths:
        raise InvalidInput("--trace and --lengths both tell the lengths; give one of them")
    if replacing.lengths:
        lengths, said = _within(workload.read_lengths(replacing.lengths), plan.context_length(spec))
        return Workload(spec.workload.rate, 1.0, lengths, f"{replacing.lengths.name}{said}")
    if replacing.trace is None:
        return None
    requests = workload.read_trace(replacing.trace)
    gaps = np.diff(requests.arrival_ns) * 1e-9
    if len(gaps) < 2 or not gaps.sum():
        raise InvalidInput(
            f"{replacing.trace}: {len(requests)} requests tell no rate; give more, over some time"
        )
    name = replacing.trace.stem
    lengths, said = _within(Lengths(name, requests.input, requests.output), plan.context_length(spec))
    rate = len(gaps) / float(gaps.sum()) * len(lengths) / len(requests)
    cv = float(np.std(gaps) / np.mean(gaps))
    return Workload(
        round(_rate(replacing.rate) or rate, 6),
        round(cv, 6),
        lengths,
        f"{replacing.trace.name}, its mean rate and the CV of its gaps{said}",
    )


def _within(lengths: Lengths, context: int) -> tuple[Lengths, str]:
    """The requests that fit the context, and what to say of the others."""
    fits = lengths.input.astype(np.int64) + lengths.output <= context
    out = len(lengths) - int(fits.sum())
    if not out:
        return lengths, ""
    if out == len(lengths):
        raise InvalidInput(
            f"{lengths.name}: every request is longer than the model's context of {context} tokens"
        )
    said = f"{out} of {len(lengths)} requests ({out / len(lengths):.1%}) are longer than the model's context of {context} tokens and left out"
    print(said, file=sys.stderr)
    return replace(lengths, input=lengths.input[fits], output=lengths.output[fits]), f"; {said}"

"""What requests are sent to: a plan from a file, or a shape from the command line."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError

from disaggserve import catalogue, engines, latency, plan
from disaggserve.api import plan as api
from disaggserve.api.errors import InvalidInput
from disaggserve.api.model import seconds
from disaggserve.api.plan import Plan
from disaggserve.cli import shapes
from disaggserve.cli.files import text
from disaggserve.simulate import Deployment, Promise


@dataclasses.dataclass(frozen=True)
class Given:
    """What the options say, where they do. With a plan, limits replace the plan's."""

    model: str | None = None
    gpu: str | None = None
    engine: str | None = None
    link: str | None = None
    profile: Path | None = None
    ttft: str | None = None
    tpot: str | None = None
    attainment: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    name: str  # for people
    deployment: Deployment  # of one copy
    promise: Promise
    gpus: int
    context_length: int
    inputs: dict[str, Any]  # what the deployment was made of, for digests
    copies: int = 1  # low-affinity pairs, which share the requests and nothing else

    @property
    def engine(self) -> str:
        return str(self.inputs["engine"])

    @property
    def latency_source(self) -> str:
        pools = (*self.deployment.prefill, *self.deployment.mixed, *self.deployment.decode)
        return "; ".join(dict.fromkeys(p.times.provenance.describe() for p in pools))


def one(plan: Path | None, shape: str | None, given: Given) -> Subject:
    """The plan or the shape, whichever is given."""
    if (plan is None) == (shape is None):
        raise typer.BadParameter("give a plan or a shape", param_hint="--plan / --shape")
    return from_plan(plan, given) if plan is not None else from_shape(shape or "", given)


def several(plans: Sequence[Path], groups: Sequence[str], given: Given) -> list[Subject]:
    """All plans and shapes. With shapes among them, what only those take is not for the plans."""
    return [from_plan(path, given, among_shapes=bool(groups)) for path in plans] + [
        from_shape(shape, given) for shape in groups
    ]


def from_plan(path: Path, given: Given, *, among_shapes: bool = False) -> Subject:
    """A plan as `disaggserve plan -o json` prints it, or as `status.plan` holds it. Raises `InvalidInput`."""
    for name in ("model", "gpu", "engine", "link"):
        if getattr(given, name) is not None and not among_shapes:
            raise typer.BadParameter(f"{path} says its own; leave --{name} out", param_hint=f"--{name}")
    planned = _read(path)
    setting = planned.setting
    if setting is None:
        raise InvalidInput(f"{path}: setting is missing: this plan does not say model, GPU and promise")
    profile = None if among_shapes and setting.profile is None else _profile(given)
    deployment, promise = plan.replay(planned, profile)
    copies = plan.copies(planned)
    config = json.loads(setting.config) if setting.config else None
    model = (
        catalogue.model(setting.model)
        if config is None
        else catalogue.model_from_config(setting.model, config)
    )
    return Subject(
        path.stem,
        deployment,
        _promise(given, promise),
        planned.gpus,
        model.max_positions,
        {
            "model": [setting.model, config],
            "engine": setting.engine,
            "gpu": [setting.gpu, setting.decode_gpu or setting.gpu],
            "link": setting.link,
            "groups": _groups(
                shapes.Shape(api.kind(planned.roles, r.role), r.count, r.tp, r.pp, r.chunk)
                for r in planned.roles
            ),
            "profile": profile and profile.digest,
            **({"pairs": copies} if copies > 1 else {}),
        },
        copies,
    )


def _profile(given: Given) -> latency.Profile | None:
    return latency.Profile.load(given.profile) if given.profile else None


def _groups(groups: Iterable[shapes.Shape]) -> list[list[str | int | None]]:
    """In an order of their own; instances of one kind count together."""
    counts: Counter[shapes.Shape] = Counter()
    for group in groups:
        counts[dataclasses.replace(group, count=1)] += group.count
    return sorted((dataclasses.replace(g, count=n).values() for g, n in counts.items()), key=str)


def _read(path: Path) -> Plan:
    try:
        return Plan.model_validate_json(text(path), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "document"
        raise InvalidInput(
            f"{path}: {field}: {first['msg'].lower()}; give what `disaggserve plan -o json` or status.plan prints"
        ) from None


def from_shape(shape: str, given: Given) -> Subject:
    """Instances as `--shape` says them. Raises `InvalidInput`."""
    for name in ("model", "gpu", "ttft", "tpot"):
        if getattr(given, name) is None:
            raise typer.BadParameter(
                f"is missing: a shape alone does not say its {name}", param_hint=f"--{name}"
            )
    assert given.model is not None
    assert given.gpu is not None
    groups = shapes.parse(shape)
    profile = _profile(given)
    model, gpu = catalogue.model(given.model), catalogue.gpu(given.gpu)
    if profile is not None and not profile.covers(model, gpu):
        raise InvalidInput(
            f"profile {given.profile} has no measured step times of {model.id} on {gpu.product}"
        )
    measured_on = profile.engine if profile is not None else None
    engine = engines.engine(given.engine or measured_on or "torch")
    link = given.link or "rdma"
    if link == "nvlink" and not gpu.nvlink_bytes_s:
        raise InvalidInput(f"{gpu.product} has no NVLink; give --link pcie")
    deployment = shapes.deployment(model, engine, gpu, groups, link, profile)
    if said := shapes.refuse(engine, groups):
        print(f"{shape}: {said}; simulated all the same, with its other habits", file=sys.stderr)
    return Subject(
        shape,
        deployment,
        _promise(given, None),
        sum(g.gpus for g in groups),
        model.max_positions,
        {
            "model": [model.id, None],
            "engine": engine.name,
            "gpu": [gpu.product, gpu.product],
            "link": link,
            "groups": _groups(groups),
            "profile": profile and profile.digest,
        },
    )


def _promise(given: Given, planned: Promise | None) -> Promise:
    return Promise(
        planned.ttft_s if given.ttft is None and planned else limit("ttft", given.ttft),
        planned.tpot_s if given.tpot is None and planned else limit("tpot", given.tpot),
        given.attainment or (planned.attainment if planned else 0.9),
    )


def limit(name: str, value: str | None) -> float:
    """Seconds above 0 of an option. Raises a usage error."""
    try:
        found = seconds(value or "")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{name}") from None
    if not found > 0:
        raise typer.BadParameter(f"is {value}; it takes a duration above 0", param_hint=f"--{name}")
    return found

"""From a spec and what stands to a plan that names every instance and its node. Pure: same inputs, same plan, same digest."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from disaggserve import catalogue, engines, hardware, latency, search, simulate, wire
from disaggserve import workload as workloads
from disaggserve.api.errors import Fault, Infeasible, InvalidInput, InvalidManifest
from disaggserve.api.model import seconds
from disaggserve.api.plan import (
    Commit,
    Identity,
    NodeShare,
    Percentiles,
    Plan,
    Prediction,
    ProfileName,
    RefusedNode,
    Rejected,
    RolePlan,
    Search,
    Setting,
    Slot,
    SlotRole,
    WorkloadSummary,
    digest,
    words,
)
from disaggserve.api.plan import in_words as roles_in_words
from disaggserve.api.spec import PodSpec, Spec
from disaggserve.workload import Workload

Json = Mapping[str, Any]
WORKER_CPU, WORKER_MEMORY = "1", "4Gi"
_KEY_LENGTH = 10
_TEMPLATE_VERSION = (
    1  # raised only when old pods must be replaced: an upgrade of the operator restarts nothing
)


@dataclass(frozen=True)
class Facts:
    """What placement reads of the cluster. `own`: instances of this resource that stand, by pod uid; their GPUs are theirs."""

    nodes: tuple[Json, ...]
    pods: tuple[Json, ...] = ()
    own: Mapping[str, Slot] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)
    not_ready: tuple[str, ...] = ()

    def key(self) -> str:
        """Digest of all that placement reads, so that an equal search need not be repeated."""
        nodes = sorted(
            digest(
                [
                    n["metadata"]["name"],
                    n["metadata"].get("labels"),
                    n.get("spec", {}).get("taints"),
                    n.get("spec", {}).get("unschedulable"),
                    n["status"].get("allocatable"),
                    [c["status"] for c in n["status"].get("conditions", ()) if c["type"] == "Ready"],
                ]
            )
            for n in self.nodes
        )
        pods = sorted(
            str((p["spec"].get("nodeName"), sorted((k, str(v)) for k, v in hardware.requests(p).items())))
            for p in self.pods
        )
        return digest(
            [nodes, pods, sorted(map(str, self.own.values())), sorted(self.excluded), self.not_ready]
        )


@dataclass(frozen=True)
class Options:
    """What a search is asked beside the spec. `objective`: the fewest GPUs (or the lowest cost) for the rate, or the highest
    goodput per GPU of the GPUs at hand. `any_engine`: the best of all engines, and what the spec's own costs.
    `as_published`: the search of DistServe's public code, to a resolution in req/s per GPU."""

    profile: latency.Profile | None = None
    objective: Literal["gpus", "goodput"] = "gpus"
    any_engine: bool = False
    as_published: bool = False
    resolution: float = 0.25


DEFAULT = Options()


@dataclass(frozen=True)
class Draft:
    """A plan that is not committed. `refusal`: why this release would not start it, if it would not."""

    plan: Plan
    instances: tuple[Slot, ...]
    refusal: str | None

    def timed(self, wall_s: float, cpu_s: float) -> Draft:
        """The same with what the search took."""
        simulations = self.plan.search.simulations if self.plan.search else 0
        took = Search(seconds=round(wall_s, 4), cpu_seconds=round(cpu_s, 4), simulations=simulations)
        return replace(self, plan=self.plan.model_copy(update={"search": took}))


# ---- identities


def inputs(spec: Spec) -> str:
    """Digest of what the plan and its pods depend on: parts of the spec, and by what this release pairs workers."""
    value = spec.json_value()
    parts = ("model", "slo", "workload", "hardware", "engine", "planner", "plan")
    return digest({**{k: value.get(k) for k in parts}, "pairing": pairing_key(spec)})


def workload_inputs(spec: Spec) -> str:
    """Digest of the traffic that the spec tells to expect."""
    return digest(spec.json_value()["workload"])


def pairing_key(spec: Spec) -> str:
    """Hash of what must match for KV to be readable on the other side."""
    engine = engines.engine(spec.engine.type)
    # vLLM compares more than we set (attention backend, speculation): two sets of its flags are two keys.
    more: dict[str, Any] = {"args": spec.engine.args} if engine is engines.VLLM else {}
    if engine is engines.TORCH:
        more["protocol"] = wire.VERSION  # vLLM has its own, which its image decides
    return digest(
        {
            **more,
            "engine": spec.engine.type,
            "image": spec.engine.image or engine.image or None,
            "model": spec.model.id,
            "revision": spec.model.revision,
            "dtype": spec.model.dtype,
            "kvDtype": spec.model.kv_dtype,
            "blockTokens": engine.block_tokens,
            "handoff": engine.handoff,
        }
    )[:_KEY_LENGTH]


def template(spec: Spec) -> str:
    """Hash of everything else that a worker pod is made of: another one means other pods."""
    value: Any = spec.json_value()
    return digest(
        {
            "version": _TEMPLATE_VERSION,
            "args": value["engine"]["args"],
            "pod": value["engine"]["pod"],
            "servedName": spec.model.name,
            "contextLength": spec.model.context_length,
            "weights": value["model"].get("weights"),
        }
    )[:_KEY_LENGTH]


# ---- the model and its traffic


def model(spec: Spec) -> catalogue.Model:
    """The catalogue's model, or the one that `model.config` describes."""
    config = _config(spec)
    try:
        if config is not None:
            return catalogue.model_from_config(spec.model.id, json.loads(config))
        return catalogue.model(spec.model.id)
    except catalogue.UnknownModel as error:
        raise InvalidManifest(
            [Fault("spec.model.id", f"{error}; or give its config.json in spec.model.config")]
        ) from None
    except (catalogue.CatalogueError, ValueError) as error:
        raise InvalidManifest([Fault("spec.model.config", str(error))]) from None


def _config(spec: Spec) -> str | None:
    """`model.config` as it is served: with the dtype of the spec in place of the checkpoint's."""
    config, dtype = spec.model.config, spec.model.dtype
    try:
        said = json.loads(config) if config is not None and dtype != "auto" else None
    except ValueError:
        said = None  # whoever reads it says what is wrong
    if not isinstance(said, dict):
        return config
    said.pop("torch_dtype", None)
    return json.dumps({**said, "dtype": dtype}, sort_keys=True, separators=(",", ":"))


def context_length(spec: Spec) -> int:
    """Tokens of prompt and output together. Raises InvalidManifest above the model's own limit."""
    limit = model(spec).max_positions
    wanted = spec.model.context_length
    if wanted is not None and wanted > limit:
        problem = f"is {wanted}, above the {limit} tokens of {spec.model.id}; write at most {limit}"
        raise InvalidManifest([Fault("spec.model.contextLength", problem)])
    return wanted or limit


def expected(spec: Spec) -> Workload:
    """The first guess: the spec's rate as written, its lengths cut to the context."""
    lengths = workloads.preset(spec.workload.lengths.preset)
    scaled = lengths.scaled(spec.workload.lengths.input_scale, context_length(spec))
    return Workload(rate=spec.workload.rate, cv=1.0, lengths=scaled, source="spec.workload")


def learned(spec: Spec, latest: Commit | None, cause: str) -> bool:
    """Whether to plan for observed traffic: always on drift, else once a plan was made for it and the guess is the same."""
    if cause == "Drift":
        return True
    return (
        latest is not None
        and latest.plan.workload.source.startswith("observed")
        and latest.workload_inputs == workload_inputs(spec)
    )


# ---- nodes


def tolerations(pod: PodSpec) -> list[dict[str, Any]]:
    """What worker pods tolerate: GPU nodes are nearly always tainted."""
    mine = [t.model_dump(mode="json", exclude_none=True) for t in pod.tolerations]
    return [{"key": hardware.GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}, *mine]


def inventory(spec: Spec, facts: Facts, ignore: frozenset[str] = frozenset()) -> hardware.Inventory:
    """Usable nodes and the others with reasons; pods whose uid is in `ignore` take nothing."""
    resources = spec.engine.pod.resources
    request = hardware.PodRequest(
        cpu=resources.cpu or WORKER_CPU,
        memory=resources.memory or WORKER_MEMORY,
        ephemeral_storage=resources.ephemeral_storage or "0",
        devices=resources.rdma,
    )
    return hardware.read(
        facts.nodes,
        facts.pods,
        tolerations=tolerations(spec.engine.pod),
        node_selector=spec.hardware.node_selector,
        pod_request=request,
        excluded=facts.excluded,
        ignore_pods=lambda pod: pod["metadata"].get("uid") in ignore,
    )


def free_gpus(spec: Spec, facts: Facts) -> dict[str, int]:
    """GPUs free on each usable node now, after everything that stands there."""
    return {n.name: n.gpus_free for n in inventory(spec, facts).nodes}


# ---- the plan


def draft(
    spec: Spec,
    facts: Facts,
    workload: Workload | None = None,
    previous: Sequence[Slot] = (),
    options: Options = DEFAULT,
) -> Draft:
    """The plan for the spec on these nodes, for `workload` or the spec's own guess.

    Placed beside what stands where GPUs allow it, so that nothing need go before its successor serves; else in its place.
    Raises Infeasible with the limit that binds, InvalidManifest where the spec is at fault.
    """
    if options.as_published:
        _check_published(spec, options)
    workload = workload or expected(spec)
    key, made = pairing_key(spec), template(spec)
    stays = [s for s in facts.own.values() if (s.pairing_key, s.template) == (key, made)]
    engine = engines.engine(spec.engine.type)
    beside = inventory(spec, facts)
    instead = inventory(spec, facts, frozenset(facts.own)) if facts.own else beside
    found: _Found | None = None
    for n, nodes in enumerate([beside, instead] if facts.own else [beside]):
        keep = tuple(_standing(engine, s) for s in stays) if nodes is beside else ()
        try:
            found = (
                _by_hand(spec, nodes, keep, workload, options)
                if spec.plan
                else _searched(spec, nodes, keep, workload, options)
            )
        except Infeasible:
            if n or not facts.own:
                raise
        else:
            break
    assert found is not None
    plan, groups, nodes = found
    instances = slots(groups, key, made, previous, list(facts.own.values()), engine, paired=plan.paired)
    refused = tuple(RefusedNode(name=r.name, reason=r.reason) for r in beside.refused)
    plan = plan.model_copy(update={"refused_nodes": refused[:256], "emulated": nodes.simulated})
    plan = plan.model_copy(update={"digest": _digest(spec, workload, plan, options)})
    return Draft(plan, instances, _refusal(spec, plan, nodes))


_Found = tuple[Plan, tuple[search.Group, ...], hardware.Inventory]


def _check_published(spec: Spec, options: Options) -> None:
    """Raises InvalidInput for what the search of the public code does not know."""
    if spec.plan is not None:
        raise InvalidInput("--as-published searches for a plan, and spec.plan has one by hand; take it out")
    if spec.planner.algorithm == "Joint":
        raise InvalidInput("--as-published knows no joint search; add --algorithm distserve, high or low")
    if options.objective != "goodput":
        raise InvalidInput("--as-published finds the highest goodput and plans for no rate; add --rate max")
    if options.any_engine:
        raise InvalidInput("--as-published simulates one engine, DistServe's own; leave --engine any out")


def _searched(
    spec: Spec,
    nodes: hardware.Inventory,
    keep: tuple[search.Standing, ...],
    workload: Workload,
    options: Options,
) -> _Found:
    problem = _problem(spec, nodes, keep, workload, options)
    engine = problem.engine
    if options.as_published:
        profile = options.profile or latency.shipped_profile()
        placement = search.published.place(problem, profile, options.resolution)
    elif options.any_engine:
        engine, placement = _any_engine(problem)
    else:
        placement = search.place(problem)
    plan = Plan(
        algorithm=placement.algorithm,
        affinity=placement.affinity,
        affinity_reason=placement.affinity_reason,
        paired=placement.paired,
        gpus=placement.gpus,
        rate=_figure(placement.rate),
        goodput=_figure(placement.goodput),
        goodput_per_gpu=_figure(placement.goodput / placement.gpus),
        cost=_cost(spec, nodes, placement.groups),
        predicted=_prediction(placement.prediction),
        roles=_roles(placement.groups),
        prefill=words(_roles(placement.groups), "prefill"),
        decode=words(_roles(placement.groups), "decode"),
        mixed=words(_roles(placement.groups), "mixed"),
        bottleneck=placement.bottleneck[:1024],
        bound=_figure(placement.bound),
        bound_share=_figure(placement.bound_share),
        latency_source=placement.latency_source,
        workload=_summary(replace(workload, rate=placement.rate)),
        setting=_setting(spec, nodes, placement.groups, placement.link, engine, options),
        rejected=tuple(Rejected(what=what, reason=why[:1000]) for what, why in placement.rejected[:32]),
        search=Search(seconds=0.0, cpu_seconds=0.0, simulations=placement.simulations),
    )
    return plan, placement.groups, nodes


def _problem(
    spec: Spec,
    nodes: hardware.Inventory,
    keep: tuple[search.Standing, ...],
    workload: Workload,
    options: Options,
) -> search.Problem:
    return search.Problem(
        model=model(spec),
        promise=promise(spec),
        workload=workload,
        inventory=nodes,
        engine=engines.engine(spec.engine.type),
        algorithm=spec.planner.algorithm,
        affinity=spec.hardware.affinity,
        max_gpus=spec.hardware.max_gpus,
        max_nodes_per_instance=spec.hardware.max_nodes_per_instance,
        keep=keep,
        profile=options.profile,
        objective=options.objective,
        prices=dict(spec.hardware.prices),
    )


def _any_engine(problem: search.Problem) -> tuple[engines.Engine, search.Placement]:
    """The best placement over all engines (ties: the problem's own), with what each of the others takes among the rejected.

    Raises Infeasible where no engine has a plan.
    """
    own = problem.engine
    order = [own, *(e for e in engines.ENGINES.values() if e is not own)]
    found: dict[str, search.Placement] = {}
    failed: dict[str, Infeasible] = {}
    for engine in order:
        try:
            found[engine.name] = search.place(replace(problem, engine=engine))
        except Infeasible as error:
            failed[engine.name] = error
    if not found:
        raise failed[own.name]

    def better(name: str) -> tuple[float, int]:
        placement = found[name]
        per_gpu = -placement.goodput / placement.gpus if problem.objective == "goodput" else 0.0
        return per_gpu, placement.gpus

    best = min(found, key=better)

    def takes(name: str) -> str:
        if name in failed:
            return str(failed[name])
        theirs, mine = (f"{found[n].goodput / found[n].gpus:.2f}" for n in (name, best))
        if problem.objective == "goodput":
            return f"{theirs} req/s per GPU; {best} reaches {mine}"
        return (
            f"takes {found[name].gpus} GPUs, good for {theirs} req/s per GPU; "
            f"{best} takes {found[best].gpus}, good for {mine}"
        )

    others = [search.Rejected(f"engine {e.name}", takes(e.name)) for e in order if e.name != best]
    placement = replace(found[best], rejected=(*others, *found[best].rejected))
    return engines.engine(best), placement


def _cost(spec: Spec, nodes: hardware.Inventory, groups: Sequence[search.Group]) -> float | None:
    """Per hour, in the currency of `hardware.prices`; None where one is missing."""
    products = {n.name: n.gpu.product for n in nodes.nodes}
    usual = min(products.values())
    gpus = Counter[str]()
    for g in groups:
        for name, count in g.nodes:
            gpus[products.get(name, usual)] += g.tp * g.pp * count
    if not set(gpus) <= set(spec.hardware.prices):
        return None
    return round(sum(spec.hardware.prices[p] * n for p, n in sorted(gpus.items())), 4)


def _by_hand(
    spec: Spec,
    nodes: hardware.Inventory,
    keep: tuple[search.Standing, ...],
    workload: Workload,
    options: Options,
) -> _Found:
    """A plan by hand is carried out as given, and simulated all the same."""
    assert spec.plan is not None
    wanted = [(r.role, r.tp, r.pp, r.count) for r in spec.plan.roles]
    gpus = sum(tp * pp * count for _, tp, pp, count in wanted)
    if gpus > spec.hardware.max_gpus:
        raise Infeasible(
            "GPUs", f"the plan by hand takes {gpus} GPUs, hardware.maxGPUs is {spec.hardware.max_gpus}"
        )
    for role in spec.plan.roles:
        fault = model(spec).shape_fault(role.tp, role.pp)
        if fault:
            raise InvalidManifest([Fault("spec.plan.roles", f"tp {role.tp}, pp {role.pp}: {fault}")])
    pinned = tuple(
        search.Group(r.role, r.tp, r.pp, r.count, tuple(sorted((n.name, n.count) for n in r.nodes)), r.chunk)
        for r in spec.plan.roles
        if r.nodes
    )
    rest = [r for r in spec.plan.roles if not r.nodes]
    left, standing = _take(pinned, nodes, keep)
    try:
        packed = search.pack([(r.role, r.tp, r.pp, r.count) for r in rest], left, standing)
        groups = (*pinned, *_dealt(packed, rest))
    except search.NoRoom as error:
        raise Infeasible("GPUs", f"the plan by hand does not fit: {error}") from None
    affinity, reason = hardware.affinity(nodes, spec.hardware.affinity)
    engine = engines.engine(spec.engine.type)
    link = search.kv_link(nodes, groups, engine)
    deployment = search.deployment(model(spec), engine, nodes, groups, link, profile=options.profile)
    predicted = search.predict(deployment, workload, promise(spec))
    setting = _setting(spec, nodes, groups, link, engine, options)
    problem = _problem(spec, nodes, keep, workload, options)
    gpu = catalogue.gpu(setting.gpu)
    found = search.measure(
        problem, deployment, predicted, gpu, catalogue.gpu(setting.decode_gpu or setting.gpu)
    )
    plan = Plan(
        algorithm="ByHand",
        affinity=affinity,
        affinity_reason=reason,
        gpus=gpus,
        rate=_figure(workload.rate),
        goodput=_figure(found.goodput),
        goodput_per_gpu=_figure(found.goodput / gpus),
        cost=_cost(spec, nodes, groups),
        predicted=_prediction(predicted),
        bound=_figure(found.bound),
        bound_share=_figure(found.goodput / gpus / found.bound if found.bound else 0.0),
        roles=_roles(groups),
        prefill=words(_roles(groups), "prefill"),
        decode=words(_roles(groups), "decode"),
        mixed=words(_roles(groups), "mixed"),
        latency_source=(*deployment.prefill, *deployment.mixed)[0].times.provenance.describe(),
        workload=_summary(workload),
        setting=setting,
        search=Search(seconds=0.0, cpu_seconds=0.0, simulations=found.simulations),
    )
    return plan, groups, nodes


def _dealt(packed: Sequence[search.Group], roles: Sequence[RolePlan]) -> tuple[search.Group, ...]:
    """What was packed by role and shape, told apart by chunk as well."""
    out = []
    for g in packed:
        where = [name for name, count in g.nodes for _ in range(count)]
        counts = Counter[int | None]()
        for r in roles:
            counts[r.chunk] += r.count if (r.role, r.tp, r.pp) == (g.role, g.tp, g.pp) else 0
        for chunk, count in (+counts).items():
            mine, where = Counter(where[:count]), where[count:]
            out.append(search.Group(g.role, g.tp, g.pp, count, tuple(sorted(mine.items())), chunk))
    return tuple(out)


def _take(
    pinned: Sequence[search.Group], nodes: hardware.Inventory, keep: tuple[search.Standing, ...]
) -> tuple[hardware.Inventory, tuple[search.Standing, ...]]:
    """What is left when instances stand where the plan by hand says. Raises Infeasible where they cannot."""
    known = {n.name: n for n in nodes.nodes}
    why = {r.name: r.reason for r in nodes.refused}
    keep = tuple(k for k in keep if not k.decode_tp)  # a pair is not taken apart
    standing = Counter(keep)
    turns = {(k.role, k.tp, k.pp): k.turns for k in keep}
    missing: list[tuple[search.Group, str, int]] = []
    for g in pinned:
        for name, count in g.nodes:
            here = search.Standing(g.role, g.tp, g.pp, name)
            kept = min(count, standing[here])
            standing[here] -= kept
            missing.append((g, name, count - kept))
    for g, name, new in missing:
        for here in sorted(standing):
            if (here.tp, here.pp, here.node) == (g.tp, g.pp, name) and g.role in turns.get(
                (here.role, here.tp, here.pp), ()
            ):
                turned = min(new, standing[here])
                standing[here] -= turned
                new -= turned
        if new == 0:
            continue
        if name not in known:
            raise Infeasible(
                "Nodes", f"the plan by hand names node {name}: {why.get(name, 'there is no such node')}"
            )
        node, gpus = known[name], new * g.tp * g.pp
        if node.gpus_free < gpus or node.pods_free < new:
            raise Infeasible(
                "GPUs", f"the plan by hand takes {gpus} GPUs on {name}, {node.gpus_free} are free"
            )
        known[name] = replace(node, gpus_free=node.gpus_free - gpus, pods_free=node.pods_free - new)
    return replace(nodes, nodes=tuple(known.values())), tuple((+standing).elements())


def replay(
    plan: Plan, profile: latency.Profile | None = None
) -> tuple[simulate.Deployment, simulate.Promise]:
    """The simulator's view of a plan, from nothing but the plan: for traces, and for other traffic than it was made for.
    Of a plan of pairs it is one pair; `copies` says how many share the requests.

    A plan made with a profile of its own needs that profile again. Raises InvalidInput where it is missing or another.
    """
    setting = plan.setting
    if setting is None:
        raise InvalidInput(
            "the plan has no `setting`: model, GPU, link and promise; give a plan of this release"
        )
    _check_profile(setting, profile)
    known = (
        catalogue.model(setting.model)
        if setting.config is None
        else catalogue.model_from_config(setting.model, json.loads(setting.config))
    )
    alike = copies(plan)
    groups = [search.Group(r.role, r.tp, r.pp, r.count // alike, (), r.chunk) for r in plan.roles]
    engine, gpu = engines.engine(setting.engine), catalogue.gpu(setting.gpu)
    where: dict[engines.Role, catalogue.GPU] = {
        "prefill": gpu,
        "decode": catalogue.gpu(setting.decode_gpu or setting.gpu),
        "mixed": gpu,
    }
    deployment = search.deployment(known, engine, where, groups, setting.link, profile=profile)
    return deployment, simulate.Promise(setting.ttft, setting.tpot, setting.attainment)


def copies(plan: Plan) -> int:
    """Equal parts of a plan that share nothing, each with its share of the requests: low-affinity pairs; else 1."""
    return math.gcd(*(r.count for r in plan.roles)) if plan.paired else 1


def _check_profile(setting: Setting, profile: latency.Profile | None) -> None:
    """Raises InvalidInput unless the profile is the one that the plan was made with."""
    made = setting.profile
    if made is None:
        if profile is not None:
            raise InvalidInput(
                f"profile {profile.name}: the plan was made without a profile; leave --profile out"
            )
    elif profile is None:
        raise InvalidInput(f"the plan was made with the profile {made.name}; give it with --profile")
    elif profile.digest != made.digest:
        raise InvalidInput(
            f"profile {profile.name} is not {made.name}, with which the plan was made: its digest is "
            f"{profile.digest[:12]}, not {made.digest[:12]}"
        )


def predict(plan: Plan, workload: Workload) -> Prediction:
    """What a committed plan would attain under other traffic."""
    deployment, promised = replay(plan)
    share = replace(workload, rate=workload.rate / copies(plan))
    return _prediction(search.predict(deployment, share, promised))


def warm_up(options: Options = DEFAULT) -> None:
    """Loads the compiled kernels of this process, so that what is timed afterwards is the search."""
    if options.as_published:
        search.published.warm_up()
    else:
        simulate.warm_up()


def promise(spec: Spec) -> simulate.Promise:
    return simulate.Promise(seconds(spec.slo.ttft), seconds(spec.slo.tpot), spec.slo.attainment)


def in_words(plan: Plan) -> str:
    """One line: shapes, GPUs, rate and what is predicted."""
    p = plan.predicted
    return (
        f"{roles_in_words(plan.roles)} on {plan.gpus} GPUs for {plan.rate:g} req/s, "
        f"predicted attainment {p.attainment:.1%} ({p.attainment_low:.1%} to {p.attainment_high:.1%})"
    )


# ---- pieces


def _figure(value: float) -> float:
    return round(float(value), 4)


def _setting(
    spec: Spec,
    nodes: hardware.Inventory,
    groups: Sequence[search.Group],
    link: catalogue.Link,
    engine: engines.Engine,
    options: Options,
) -> Setting:
    products = {n.name: n.gpu.product for n in nodes.nodes}

    def product(role: engines.Role) -> str:
        used = {
            products[name]
            for g in groups
            if g.role in (role, "mixed")
            for name, _ in g.nodes
            if name in products
        }
        return min(used or products.values())

    profile = options.profile
    return Setting(
        model=spec.model.id,
        config=_config(spec),
        engine=engine.name,
        gpu=product("prefill"),
        decode_gpu=product("decode") if product("decode") != product("prefill") else None,
        profile=ProfileName(name=profile.name, digest=profile.digest) if profile else None,
        link=link.name,
        ttft=seconds(spec.slo.ttft),
        tpot=seconds(spec.slo.tpot),
        attainment=spec.slo.attainment,
    )


def _percentiles(values: Sequence[float]) -> Percentiles:
    p50, p90, p99 = (round(float(v), 6) for v in values)
    return Percentiles(p50=p50, p90=p90, p99=p99)


def _prediction(p: simulate.Prediction) -> Prediction:
    return Prediction(
        attainment=_figure(p.attainment),
        attainment_low=_figure(p.low),
        attainment_high=_figure(p.high),
        ttft=_percentiles(p.ttft),
        tpot=_percentiles(p.tpot),
        requests=int(p.requests),
    )


def _summary(workload: Workload) -> WorkloadSummary:
    return WorkloadSummary(
        rate=_figure(workload.rate),
        input_mean=round(float(workload.lengths.input.mean()), 1),
        output_mean=round(float(workload.lengths.output.mean()), 1),
        cv=_figure(workload.cv),
        source=f"{workload.source}: {workload.lengths.name}"[:1000],
    )


def _roles(groups: Sequence[search.Group]) -> tuple[RolePlan, ...]:
    return tuple(
        RolePlan(
            role=g.role,
            tp=g.tp,
            pp=g.pp,
            count=g.count,
            chunk=g.chunk,
            nodes=tuple(NodeShare(name=n, count=c) for n, c in g.nodes),
        )
        for g in sorted(groups, key=lambda g: (g.role != "prefill", g.tp, g.pp, g.chunk or 0, g.nodes))
    )


def _turns(engine: engines.Engine, slot: Slot) -> frozenset[engines.Role]:
    """Roles that a standing instance can take. Where its label is all that says its role, a mixed one's chunk would stay.
    The two of a pair stay what they are."""
    if slot.role == "pair":
        return frozenset()
    if engine.role_change == "door":
        return frozenset({"prefill", "decode", "mixed"})
    if engine.role_change == "label" and slot.role != "mixed":
        return frozenset({"prefill", "decode"})
    return frozenset()


def _standing(engine: engines.Engine, slot: Slot) -> search.Standing:
    role: engines.Role = "prefill" if slot.role == "pair" else slot.role
    return search.Standing(role, slot.tp, slot.pp, slot.node, slot.decode_tp or 0, _turns(engine, slot))


_Place = tuple[SlotRole, int, int, int, int, str]  # role, chunk, tp, pp, a pair's decode tp, node; 0: none


def _places(groups: Sequence[search.Group], paired: bool) -> Counter[_Place]:
    """How many pods are wanted where."""
    places: Counter[_Place] = Counter()
    if paired:
        prefill, decode = groups  # alike in number and nodes (search.pack_pairs)
        for node, count in prefill.nodes:
            places["pair", 0, prefill.tp, prefill.pp, decode.tp, node] += count
        return places
    for g in groups:
        for node, count in g.nodes:
            places[g.role, g.chunk or 0, g.tp, g.pp, 0, node] += count
    return places


def slots(
    groups: Sequence[search.Group],
    key: str,
    made: str,
    previous: Sequence[Slot],
    standing: Sequence[Slot],
    engine: engines.Engine,
    *,
    paired: bool = False,
) -> tuple[Slot, ...]:
    """Gives every instance its slot: a number that says which pod it is, of those in its place and shape.

    First come instances that stand and have the role, or are on their way to it by the last plan; then, in any role, those
    that can take it; then those of the last plan that do not stand. What is left gets numbers that none of them has.
    """
    wanted = _places(groups, paired)
    fit = [[s for s in some if (s.pairing_key, s.template) == (key, made)] for some in (standing, previous)]
    stands, before = ({s.identity: s for s in some} for some in fit)
    both = [s for k, s in stands.items() if before.get(k) == s]
    meant = [
        s
        for k, s in before.items()
        if k in stands and stands[k].node == s.node and s.role in _turns(engine, stands[k])
    ]
    rest = [s for k, s in stands.items() if k not in before]
    turned = [
        s.of_role(role, chunk or None)
        for s in stands.values()
        for role, chunk, *_ in sorted(wanted)
        if role in _turns(engine, s)
    ]
    out: dict[Identity, Slot] = {}
    for some in (both, meant, rest, turned, before.values()):
        for s in sorted(some, key=lambda s: s.slot):
            place = (s.role, s.chunk or 0, s.tp, s.pp, s.decode_tp or 0, s.node)
            if wanted[place] > 0 and s.identity not in out:
                wanted[place] -= 1
                out[s.identity] = s
    used = {(s.tp, s.pp, s.decode_tp or 0, s.slot) for s in (*previous, *standing) if s.pairing_key == key}
    for (role, chunk, tp, pp, decode_tp, node), count in sorted(wanted.items()):
        number = 0
        for _ in range(count):
            while (tp, pp, decode_tp, number) in used:
                number += 1
            used.add((tp, pp, decode_tp, number))
            new = Slot(
                slot=number,
                role=role,
                chunk=chunk or None,
                tp=tp,
                pp=pp,
                decode_tp=decode_tp or None,
                node=node,
                pairing_key=key,
                template=made,
            )
            out[new.identity] = new
    return tuple(sorted(out.values(), key=lambda s: (s.role != "prefill", s.tp, s.pp, s.slot)))


def _refusal(spec: Spec, plan: Plan, nodes: hardware.Inventory) -> str | None:
    """Why this release would not start the plan, before any pod exists."""
    assert plan.setting is not None
    engine = engines.engine(plan.setting.engine)
    reason = engines.refuse_args(engine, spec.engine.args)
    known = model(spec)
    reason = reason or engines.refuse_architecture(engine, known.architecture, known.quantised)
    for role in plan.roles:
        if not role.nodes:
            return f"no node holds {role.role} {role.words()} as the plan means it"
        if role.role == "mixed":
            apart = "; choose planner.algorithm HighAffinity, or pin roles in spec.plan"
            kinds = len({r.chunk for r in plan.roles if r.role == "mixed"})
            wrong = engines.refuse_mixed(engine, kinds) or engines.refuse_chunk(engine, role.chunk)
            reason = reason or (wrong and wrong[0].upper() + wrong[1:] + apart + ".")
        reason = reason or engines.refuse_start(engine, plan.paired)
    return reason


def _digest(spec: Spec, workload: Workload, plan: Plan, options: Options) -> str:
    """SHA-256 of the inputs and the discrete decisions; no measured time is in it."""
    profile = options.profile
    return digest(
        {
            "inputs": inputs(spec),
            "workload": [round(workload.rate, 6), round(workload.cv, 6), _traffic_digest(workload)],
            "options": [
                profile.digest if profile else None,
                options.objective,
                options.any_engine,
                options.resolution if options.as_published else None,
            ],
            "algorithm": plan.algorithm,
            "affinity": plan.affinity,
            "roles": [r.model_dump(mode="json") for r in plan.roles],
        }
    )


def _traffic_digest(workload: Workload) -> str:
    lengths, trace = workload.lengths, workload.trace
    arrivals = trace.arrival_ns.tolist() if trace is not None else None
    cached = trace.cached.tolist() if trace is not None and trace.cached is not None else None
    return digest([lengths.input.tolist(), lengths.output.tolist(), arrivals, cached])

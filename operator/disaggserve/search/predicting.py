"""The simulator's view of a placement, and what it predicts: plans found, plans by hand, and drift."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from disaggserve import catalogue, engines, hardware, latency, simulate
from disaggserve.api.errors import InvalidInput
from disaggserve.catalogue import GPU, Link, Model
from disaggserve.engines import Engine, Role
from disaggserve.hardware import Inventory, Node
from disaggserve.search.packing import Group, Wanted
from disaggserve.simulate import Deployment, Outcome, Pool, Prediction, Promise
from disaggserve.workload import Requests, Workload

T = TypeVar("T")

# Seeds: what is chosen on the first three is judged on others (REFERENCE § 3: the winner must be retested).
SEARCH_SEEDS = (0, 1, 2)
FRESH_SEEDS = tuple(range(100, 110))
ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed")
WARMUP_S = 60.0
COOLDOWN_S = 15.0  # requests after the judged ones, which would else decode on an emptying instance
STEADY_S = 600.0
MANY_S = 50.0  # req/s above which chance weighs little


def pool(
    model: Model,
    gpu: GPU,
    engine: Engine,
    tp: int,
    pp: int,
    count: int,
    profile: latency.Profile | None = None,
) -> Pool:
    """Instances of one shape. Their prefill batches hold L_m tokens, or as many as the engine says."""
    limit = engine.prefill_limit or latency.saturation_tokens(model, gpu, tp, pp, profile)
    blocks = catalogue.kv_blocks(model, gpu, tp, pp, engine.block_tokens)
    times = latency.step_times(model, gpu, tp, pp, profile, engine.name)
    return Pool(count, times, blocks, limit, batch_requests=engine.prefill_requests)


def _mixed(pool: Pool, chunk: int | None) -> Pool:
    """Instances that prefill and decode; without a chunk whole prompts as vLLM batches them."""
    if chunk is None:
        assert engines.VLLM.prefill_limit is not None
        return dataclasses.replace(pool, batch_tokens=engines.VLLM.prefill_limit)
    return dataclasses.replace(pool, batch_tokens=chunk, policy="chunked")


def link_between(a: Node, b: Node, engine: Engine, *, paired: bool = False) -> Link:
    """What the engine's KV takes from an instance on `a` to one on `b`. `paired`: inside one container on `a`."""
    link = hardware.kv_link(a, b, paired)
    if engine.carrier is None or (a.simulated and b.simulated):
        return link
    return min(link, engine.carrier, key=lambda link: link.bytes_per_s)


def kv_link(inventory: Inventory, groups: Iterable[Group], engine: Engine, *, paired: bool = False) -> Link:
    """The slowest that the engine's KV takes from a prefill to a decode instance of the groups.

    A node that the inventory does not hold (full, but an instance stands there) is taken to be like the
    slowest of those that it holds. `paired`: low-affinity pairs, whose KV stays inside a container.
    """
    known = {n.name: n for n in inventory.nodes}
    if not known:
        raise InvalidInput("no usable node tells which GPU and link the instances have")
    groups = list(groups)
    where: dict[Role, list[Node]] = {
        role: [
            known[name] for g in groups if g.role in (role, "mixed") for name, _ in g.nodes if name in known
        ]
        or list(known.values())
        for role in ("prefill", "decode")
    }
    if paired:
        links = [link_between(n, n, engine, paired=True) for n in where["prefill"]]
    else:
        links = [link_between(p, d, engine) for p in where["prefill"] for d in where["decode"]]
        if any(name not in known for g in groups for name, _ in g.nodes):
            links += [link_between(a, b, engine) for a in known.values() for b in known.values()]
    return min(links, key=lambda link: (link.bytes_per_s, -link.latency_s))


def carried(link: Link, engine: Engine) -> str:
    """The end of a sentence on such a link: why it is not the one that the nodes have."""
    return f" ({engine.name} moves it through the hosts' memory)" if link == engine.carrier else ""


def named_link(gpu: GPU, name: str, other: GPU | None = None) -> Link:
    """The link of that name (nvlink, pcie, rdma, tcp, zmq) between GPUs of one product, or of two."""
    if name == catalogue.ZMQ.name:
        return catalogue.ZMQ
    if name in ("nvlink", "pcie"):
        return catalogue.container_link(gpu, name == "nvlink")
    return catalogue.pod_link(gpu, name == "rdma", other or gpu, name == "rdma")


def deployment(
    model: Model,
    engine: Engine,
    where: Inventory | GPU | Mapping[Role, GPU],
    groups: Sequence[Group] | Sequence[Wanted],
    link: Link | str | None = None,
    *,
    paired: bool = False,
    profile: latency.Profile | None = None,
) -> Deployment:
    """The simulator's view of instances on the nodes of an inventory, or on one GPU product (one for each role).

    Groups without node names are (role, tp, pp, count). With nodes, each instance has its node's GPU (on a
    full node that the inventory does not hold, the product of most of its nodes) and the link is the slowest
    among the pairs used unless it is given; without, it must be given, by value or name. Raises `InvalidInput`.
    """
    gpus: dict[str, GPU] = {}
    usual: Mapping[Role, GPU]
    if isinstance(where, Inventory):
        if not where.nodes:
            raise InvalidInput("no usable node tells which GPU and link the instances have")
        gpus = {n.name: n.gpu for n in where.nodes}
        products = Counter(n.gpu.product for n in where.nodes)
        most = catalogue.gpu(min(products, key=lambda p: (-products[p], p)))
        usual = dict.fromkeys(ROLES, most)
    else:
        usual = dict.fromkeys(ROLES, where) if isinstance(where, GPU) else where
    pools: dict[Role, list[Pool]] = {role: [] for role in ROLES}
    placed: list[Group] = []
    for g in groups:
        role, tp, pp, count = (g.role, g.tp, g.pp, g.count) if isinstance(g, Group) else g
        by_gpu: Counter[GPU] = Counter()
        if isinstance(g, Group):
            placed.append(g)
            for name, n in g.nodes:
                by_gpu[gpus.get(name, usual[role])] += n
        by_gpu[usual[role]] += count - by_gpu.total()
        for gpu, n in sorted((+by_gpu).items(), key=lambda item: item[0].product):
            made = pool(model, gpu, engine, tp, pp, n, profile)
            if role == "mixed":
                made = _mixed(made, g.chunk if isinstance(g, Group) else None)
            pools[role].append(made)
    if isinstance(link, str):
        link = named_link(usual["prefill"], link, usual["decode"])
    if link is None:
        if not isinstance(where, Inventory):
            raise InvalidInput("without nodes the link that KV takes must be given")
        link = kv_link(where, placed, engine, paired=paired)
    return Deployment(
        tuple(pools["prefill"]),
        tuple(pools["decode"]),
        model.kv_bytes_per_token(),
        min(link.bytes_per_s, engine.transfer_bytes_s or link.bytes_per_s),
        link.latency_s,
        # Mixed instances make it where the prompt was computed; nothing of it is computed again.
        "prefill" if pools["mixed"] else engine.first_token_from,
        mixed=tuple(pools["mixed"]),
        handoff="pull" if pools["mixed"] else engine.handoff,
        sticky=len({(p.batch_tokens, p.policy) for p in pools["mixed"]}) == 1,
        transfer=engine.transfer,
        swap_bytes_s=engine.swap_bytes_s,
    )


def roomier(deployment: Deployment, role: Role) -> Deployment:
    """The same with four times the KV blocks on one side: what is left of its misses then is not for want of memory."""
    pools = deployment.prefill if role == "prefill" else deployment.decode
    roomy = tuple(dataclasses.replace(p, blocks=4 * p.blocks) for p in pools)
    if role == "prefill":
        return dataclasses.replace(deployment, prefill=roomy)
    return dataclasses.replace(deployment, decode=roomy)


def window_s(rate: float, enough: int, steady_s: float = STEADY_S) -> float:
    """Seconds to judge at that rate: `steady_s`, less where `enough` requests come sooner, and more where
    not even 300 would come (up to an hour)."""
    return min(max(300 / rate, min(steady_s, enough / rate)), 3600.0)


def warmup_s(rate: float) -> float:
    """Seconds that are not judged: long answers must have had time to gather. Where many come at once, two thirds."""
    return WARMUP_S if rate <= MANY_S else 2 / 3 * WARMUP_S


def needed(seeds: Sequence[int], rate: float) -> Sequence[int]:
    """Of the seeds those that it takes: at high rates few say as much as many do at low ones (REFERENCE § 3)."""
    return seeds if rate <= MANY_S else seeds[: -(-len(seeds) // 5)]


def observe(
    deployment: Deployment,
    workload: Workload,
    *,
    seeds: Sequence[int] = FRESH_SEEDS,
    duration_s: float = STEADY_S,
    enough: int = 6000,
) -> tuple[Requests, Outcome]:
    """The requests judged, all seeds one after another on one clock, and what became of each.

    Per seed `duration_s` after a warm-up, less where `enough` requests come sooner.
    """
    used = needed(seeds, workload.rate)
    # Fewer seeds have longer windows: the warm-up of each costs most where requests come fast.
    enough = enough if len(used) == len(seeds) else enough * len(seeds) // (2 * len(used))
    warmup, window = warmup_s(workload.rate), window_s(workload.rate, enough, duration_s)

    def run(seed: int) -> tuple[Requests, Outcome]:
        requests = workload.requests(warmup + window + COOLDOWN_S, seed)
        return requests, simulate.run(deployment, requests)

    return simulate.joined(side_by_side(run, used), warmup, warmup + window)


def side_by_side(run: Callable[[int], T], seeds: Sequence[int]) -> list[T]:
    """`run` for each seed, in their order, two at a time: the kernel leaves the interpreter to others."""
    if len(seeds) < 2:
        return [run(seed) for seed in seeds]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(run, seeds))


def predict(
    deployment: Deployment,
    workload: Workload,
    promise: Promise,
    *,
    seeds: Sequence[int] = FRESH_SEEDS,
    duration_s: float = STEADY_S,
    enough: int = 6000,
) -> Prediction:
    """What the deployment attains on the workload: all seeds' requests (`observe`) judged together.

    The interval is over batches of consecutive requests of all seeds; it holds the chance of arrivals, not
    the model's error.
    """
    requests, outcome = observe(deployment, workload, seeds=seeds, duration_s=duration_s, enough=enough)
    return simulate.judge(requests, outcome, promise)

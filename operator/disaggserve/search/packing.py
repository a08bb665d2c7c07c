"""Instances onto named nodes: never more than is free, few nodes, close together in the fabric.

Deterministic, and the order of nodes does not matter. An instance (or a low-affinity pair, which is one
container) stands inside one node. Tensor parallelism needs NVLink between the GPUs of that node; pipeline
stages alone do without.
"""

from __future__ import annotations

import dataclasses
import types
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from disaggserve.api.errors import DisaggServeError
from disaggserve.engines import Role
from disaggserve.hardware import Inventory, Node

Wanted = tuple[Role, int, int, int]  # role, tp, pp, instances


class NoRoom(DisaggServeError):
    """What is wanted does not fit the free GPUs; `missing` GPUs belong to instances that found no node."""

    def __init__(self, reason: str, missing: int) -> None:
        self.reason, self.missing = reason, missing
        super().__init__(reason, missing)

    def __str__(self) -> str:
        return self.reason


@dataclasses.dataclass(frozen=True, order=True)
class Standing:
    """An own instance that stands on a node now; its GPUs are counted as used in the inventory.

    `decode_tp`: of a low-affinity pair, whose prefill the rest describes; 0: it stands alone. `turns`: roles that it can take
    where it stands.
    """

    role: Role
    tp: int
    pp: int
    node: str
    decode_tp: int = 0
    turns: frozenset[Role] = dataclasses.field(default=frozenset(), compare=False)

    @property
    def gpus(self) -> int:
        return (self.tp + self.decode_tp) * self.pp


@dataclasses.dataclass(frozen=True)
class Group:
    """Instances of one role and shape, and where they stand."""

    role: Role
    tp: int
    pp: int
    count: int
    nodes: tuple[tuple[str, int], ...]  # (node name, instances), in order of name
    chunk: int | None = (
        None  # mixed: tokens of a step, prompts cut to fit; None: whole prompts, before decode
    )

    @property
    def gpus(self) -> int:
        """GPUs of all its instances."""
        return self.tp * self.pp * self.count


# (gpus, needs NVLink, key): what one pod of the key's kind takes. The key is its parts' (role, tp, pp).
_Key = tuple[tuple[Role, int, int], ...]


def pack(wanted: Iterable[Wanted], inventory: Inventory, keep: Iterable[Standing] = ()) -> tuple[Group, ...]:
    """Nodes for the wanted instances, one group per role and shape (prefill first, then by tp and pp).

    Instances of `keep` come first where their shape is wanted and cost nothing: they stand there. First those whose role is
    wanted too, then those that can take the wanted role. A node that the inventory refuses for want of room only (GPUs, pods, CPU …) still carries what stands on it; on a node
    refused for another reason, or not known at all, nothing is kept. Raises `NoRoom`.
    """
    counts: Counter[_Key] = Counter()
    for role, tp, pp, count in wanted:
        counts[((role, tp, pp),)] += count
    keep = [k for k in keep if not k.decode_tp]  # a pair is not taken apart
    standing: Counter[tuple[_Key, str]] = Counter((((k.role, k.tp, k.pp),), k.node) for k in keep)
    turns: dict[_Key, frozenset[Role]] = {((k.role, k.tp, k.pp),): k.turns for k in keep}
    return _groups(_place(counts, standing, inventory, turns))


def pack_pairs(
    prefill: tuple[int, int],
    decode: tuple[int, int],
    count: int,
    inventory: Inventory,
    keep: Iterable[Standing] = (),
) -> tuple[Group, ...]:
    """Nodes for `count` low-affinity pairs of a prefill (tp, pp) and a decode (tp, pp), each on one node.

    Pairs of `keep` come first; two instances that stand on one node are none. Raises `NoRoom`.
    """
    parts: _Key = (("prefill", *prefill), ("decode", *decode))
    standing = Counter((parts, k.node) for k in keep if (k.tp, k.pp) == prefill and k.decode_tp == decode[0])
    return _groups(_place(Counter({parts: count}), standing, inventory))


def only_full(reason: str) -> bool:
    """Whether a node is refused for want of room only: what stands there may stay (hardware's own words)."""
    return (
        reason.endswith("GPUs are taken by other pods")
        or reason == "its pods are as many as it allows"
        or " is short: an instance asks for " in reason
    )


def _place(
    counts: Counter[_Key],
    standing: Mapping[tuple[_Key, str], int],
    inventory: Inventory,
    turns: Mapping[_Key, Collection[Role]] = types.MappingProxyType({}),
) -> Counter[tuple[_Key, str]]:
    usable = {n.name for n in inventory.nodes} | {r.name for r in inventory.refused if only_full(r.reason)}
    left = +counts
    placed: Counter[tuple[_Key, str]] = Counter()
    # Where more stand than are wanted, those stay that stand together with the most others.
    company = Counter[str]()
    for (_, name), n in standing.items():
        company[name] += n
    order = sorted(
        (s for s in standing.items() if s[0][1] in usable),
        key=lambda s: (-company[s[0][1]], s[0][1], s[0][0]),
    )
    spare = Counter(standing)
    for (key, name), n in order:
        kept = min(n, left[key])
        left[key] -= kept
        spare[key, name] -= kept
        placed[key, name] += kept
    for (key, name), _ in order:
        for other in sorted(left):
            if other[0][1:] == key[0][1:] and other[0][0] in turns.get(key, ()):
                turned = min(spare[key, name], left[other])
                left[other] -= turned
                spare[key, name] -= turned
                placed[other, name] += turned
    placed = +placed
    items = sorted((key for key, n in left.items() for _ in range(n)), key=lambda k: (-_gpus(k), k))
    if not items:
        return placed
    nodes = sorted(inventory.nodes, key=lambda n: n.name)
    used = {name for _, name in placed}
    # The second way spends nothing on neatness: best-fit decreasing, NVLink kept for those that need it.
    for way in (_few_nodes, _best_fit):
        found, over = way(items, nodes, used)
        if not over:
            return placed + found
    raise _no_room(over, nodes)


def _gpus(key: _Key) -> int:
    return sum(tp * pp for _, tp, pp in key)


def _needs_nvlink(key: _Key) -> bool:
    return any(tp > 1 for _, tp, _ in key)


class _Room:
    """What is left of a node while it is being filled."""

    def __init__(self, node: Node) -> None:
        self.node, self.gpus, self.pods = node, node.gpus_free, node.pods_free

    def fits(self, key: _Key) -> bool:
        if _needs_nvlink(key) and not self.node.nvlink:
            return False
        return self.pods > 0 and _gpus(key) <= self.gpus

    def take(self, key: _Key) -> None:
        self.gpus -= _gpus(key)
        self.pods -= 1


_Found = tuple[Counter[tuple[_Key, str]], list[_Key]]


def _few_nodes(items: Sequence[_Key], nodes: Sequence[Node], used: set[str]) -> _Found:
    """Node after node is filled: one that already has an instance, else the tightest that holds all that is
    left, else the one that holds most; the nearest in the fabric among equals."""
    found: Counter[tuple[_Key, str]] = Counter()
    left = list(items)
    rooms = {n.name: n for n in nodes}
    near = _by_fabric(n for n in nodes if n.name in used)
    around = _by_fabric(nodes, weigh=True)  # with nothing placed yet: begin where most is free nearby
    while left and rooms:
        fills = {name: _fill(left, n) for name, n in rooms.items()}

        def rank(name: str, filled: Sequence[_Key], wanted: int) -> tuple[float, ...]:
            held, node, all_held = sum(map(_gpus, filled)), rooms[name], len(filled) == wanted
            spare = node.gpus_free if all_held else -node.gpus_free
            held = 0 if all_held else held
            return (
                name not in used,
                not all_held,
                -held,
                -_shared(near, node),
                spare,
                -_shared(around, node),
            )

        _, name = min((rank(n, filled, len(left)), n) for n, filled in fills.items())
        node, filled = rooms.pop(name), fills[name]
        for key in filled:
            found[key, name] += 1
            left.remove(key)
        if filled:
            near.update(_by_fabric([node]))
    return found, left


def _fill(items: Sequence[_Key], node: Node) -> list[_Key]:
    room, filled = _Room(node), []
    for key in items:
        if not room.gpus:
            break
        if room.fits(key):
            room.take(key)
            filled.append(key)
    return filled


def _best_fit(items: Sequence[_Key], nodes: Sequence[Node], used: set[str]) -> _Found:
    found: Counter[tuple[_Key, str]] = Counter()
    over: list[_Key] = []
    rooms = [_Room(n) for n in nodes]
    for key in sorted(items, key=lambda k: (not _needs_nvlink(k), -_gpus(k), k)):
        fitting = [r for r in rooms if r.fits(key)]
        if not fitting:
            over.append(key)
            continue
        wastes = not _needs_nvlink(key)
        best = min(fitting, key=lambda r: (wastes and r.node.nvlink, r.gpus, -r.pods, r.node.name))
        best.take(key)
        found[key, best.node.name] += 1
    return found, over


def _by_fabric(nodes: Iterable[Node], weigh: bool = False) -> Counter[tuple[str, ...]]:
    """Nodes (or their free GPUs) by every part of the fabric that they stand in, outermost levels first."""
    found: Counter[tuple[str, ...]] = Counter()
    for n in nodes:
        for depth in range(1, len(n.fabric) + 1):
            found[n.fabric[:depth]] += n.gpus_free if weigh else 1
    return found


def _shared(near: Mapping[tuple[str, ...], int], node: Node) -> int:
    """Fabric levels that the node shares with all those counted, summed over them."""
    return sum(near.get(node.fabric[:depth], 0) for depth in range(1, len(node.fabric) + 1))


def _no_room(over: Sequence[_Key], nodes: Sequence[Node]) -> NoRoom:
    key = over[0]
    missing = sum(map(_gpus, over))
    what = " + ".join(f"{role} tp {tp}, pp {pp}" for role, tp, pp in key)
    able = [n for n in nodes if n.nvlink or not _needs_nvlink(key)]
    if not nodes:
        why = "no node has a free GPU"
    elif not able:
        why = "tp above 1 needs NVLink between the GPUs of a node, which no usable node shows"
    else:
        most = max(n.gpus_free for n in able)
        why = f"{sum(n.gpus_free for n in nodes)} GPUs are free, at most {most} on a node that would do"
    found_none = "1 instance finds" if len(over) == 1 else f"{len(over)} instances find"
    return NoRoom(f"{found_none} no node ({what}; {missing} GPUs are missing): {why}", missing)


def _groups(placed: Mapping[tuple[_Key, str], int]) -> tuple[Group, ...]:
    nodes: dict[tuple[Role, int, int], Counter[str]] = {}
    for (key, name), n in placed.items():
        for part in key:
            nodes.setdefault(part, Counter())[name] += n
    return tuple(
        Group(role, tp, pp, where.total(), tuple(sorted(where.items())))
        for (role, tp, pp), where in sorted(nodes.items(), key=lambda g: (g[0][0] != "prefill", g[0]))
    )

"""Packing, on generated inventories: what holds whatever the nodes look like."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from disaggserve import catalogue
from disaggserve.hardware import Inventory, Node, Refusal
from disaggserve.search import NoRoom, Standing, pack, pack_pairs

A100 = catalogue.gpu("A100-80G")
SHAPES = [
    ("prefill", 1, 1),
    ("prefill", 2, 1),
    ("prefill", 4, 1),
    ("decode", 1, 1),
    ("decode", 2, 2),
    ("decode", 1, 4),
    ("mixed", 2, 1),
]


@st.composite
def inventories(draw):
    nodes = []
    for i in range(draw(st.integers(0, 6))):
        total = draw(st.sampled_from([1, 4, 8]))
        fabric = draw(st.sampled_from([(), ("f", "a"), ("f", "b")]))
        free, pods = draw(st.integers(1, total)), draw(st.integers(1, 8))
        nodes.append(Node(f"n{i}", A100, total, free, pods, draw(st.booleans()), True, fabric, "", False))
    return Inventory(
        tuple(nodes),
        (Refusal("full", "all its 8 GPUs are taken by other pods"), Refusal("gone", "it is cordoned")),
    )


wanted = st.lists(st.tuples(st.sampled_from(SHAPES), st.integers(1, 4)), min_size=1, max_size=4).map(
    lambda rows: [(*shape, n) for shape, n in rows]
)
standing = st.lists(
    st.builds(
        lambda s, n: Standing(*s, n), st.sampled_from(SHAPES), st.sampled_from(["n0", "n1", "full", "gone"])
    ),
    max_size=4,
)


def tried(*args):
    try:
        return pack(*args)
    except NoRoom as e:
        return str(e), e.missing


@given(inventories(), wanted, standing)
def test_never_more_than_is_free_and_everything_wanted(inventory, want, keep):
    found = tried(want, inventory, keep)
    if not isinstance(found[0], str):
        asked, got = Counter(), Counter()
        for *shape, n in want:
            asked[tuple(shape)] += n
        gpus, pods, nodes = Counter(), Counter(), {n.name: n for n in inventory.nodes}
        stands = Counter(keep)
        for g in found:
            got[g.role, g.tp, g.pp] += g.count
            assert sum(n for _, n in g.nodes) == g.count
            for name, n in g.nodes:
                new = max(0, n - stands[Standing(g.role, g.tp, g.pp, name)])
                gpus[name] += new * g.tp * g.pp
                pods[name] += new
                assert name != "gone"
                assert not new or nodes[name].nvlink or g.tp == 1
        assert got == asked
        for name in (name for name in gpus if gpus[name]):
            assert gpus[name] <= nodes[name].gpus_free
            assert pods[name] <= nodes[name].pods_free
    else:
        assert found[1] > 0


@given(inventories(), wanted, standing, st.randoms(use_true_random=False))
def test_the_order_of_nodes_wishes_and_standing_does_not_matter(inventory, want, keep, rng: random.Random):
    def mixed(values):
        values = list(values)
        rng.shuffle(values)
        return values

    other = Inventory(tuple(mixed(inventory.nodes)), tuple(mixed(inventory.refused)))
    assert tried(mixed(want), other, mixed(keep)) == tried(want, inventory, keep)


@given(inventories(), st.lists(st.sampled_from(["n0", "n1", "full"]), min_size=1, max_size=5))
def test_what_stands_and_is_wanted_stays(inventory, where):
    known = {n.name for n in inventory.nodes} | {"full"}
    keep = [Standing("decode", 1, 1, name) for name in where if name in known]
    if keep:
        (group,) = pack([("decode", 1, 1, len(keep))], inventory, keep)
        assert dict(group.nodes) == Counter(k.node for k in keep)


@given(inventories(), st.integers(1, 3))
def test_both_parts_of_a_pair_stand_on_one_node(inventory, count):
    try:
        prefill, decode = pack_pairs((2, 1), (1, 1), count, inventory)
    except NoRoom:
        assert sum(n.gpus_free // 3 and n.nvlink for n in inventory.nodes) < count
    else:
        assert prefill.nodes == decode.nodes
        assert all(n.nvlink for n in inventory.nodes if n.name in dict(prefill.nodes))


@given(
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=12),
    st.lists(st.integers(1, 8), min_size=1, max_size=6),
)
def test_sizes_that_divide_each_other_fit_whenever_they_can(sizes, free):
    nodes = tuple(Node(f"n{i}", A100, 8, f, 100, True, True, (), "", False) for i, f in enumerate(free))
    left = list(free)
    fits = True
    for size in sorted(sizes, reverse=True):  # any greedy order is optimal for such sizes
        i = next((i for i, f in enumerate(left) if f >= size), None)
        fits = fits and i is not None
        if i is not None:
            left[i] -= size
    found = tried([("prefill", s, 1, n) for s, n in Counter(sizes).items()], Inventory(nodes, ()))
    assert (not isinstance(found[0], str)) == fits

"""Packing by example: few nodes, near ones, what stands first, and the sentence when there is no room."""

import pytest

from disaggserve import catalogue, hardware
from disaggserve.hardware import Inventory, Node
from disaggserve.search import Group, NoRoom, Standing, pack, pack_pairs
from disaggserve.search.packing import only_full

A100 = catalogue.gpu("A100-80G")


def node(name, free=8, pods=100, nvlink=True, fabric=()):
    return Node(name, A100, 8, free, pods, nvlink, True, fabric, "", False)


def where(*args):
    return {(g.role, g.tp): dict(g.nodes) for g in pack(*args)}


def test_one_node_that_holds_all_before_two_that_fit_tighter():
    found = where(
        [("prefill", 4, 1, 1), ("decode", 2, 1, 1)],
        Inventory((node("a", 4), node("b", 2), node("c", 8), node("d", 6)), ()),
    )
    assert found == {("prefill", 4): {"d": 1}, ("decode", 2): {"d": 1}}


def test_the_second_node_is_near_the_first():
    nodes = tuple(node(f"n{i}", fabric=("f", leaf)) for i, leaf in enumerate(["x", "y", "z", "y"]))
    assert where([("prefill", 8, 1, 1), ("decode", 8, 1, 1)], Inventory(nodes, ())) == {
        ("decode", 8): {"n1": 1},
        ("prefill", 8): {"n3": 1},
    }


def test_new_instances_come_beside_those_that_stand():
    keep = [Standing("decode", 1, 1, "b"), Standing("decode", 1, 1, "c"), Standing("prefill", 2, 1, "c")]
    found = pack(
        [("prefill", 2, 1, 1), ("decode", 1, 1, 2)], Inventory((node("a"), node("b"), node("c", 1)), ()), keep
    )
    assert found == (Group("prefill", 2, 1, 1, (("c", 1),)), Group("decode", 1, 1, 2, (("b", 1), ("c", 1))))
    assert where([("decode", 1, 1, 3)], Inventory((node("a"), node("b", 1), node("c", 1)), ()), keep[:2]) == {
        ("decode", 1): {"b": 2, "c": 1}
    }


def test_nodes_that_are_only_full_keep_what_stands_on_them():
    def kube(name, free=True, **spec):
        return {
            "metadata": {"name": name, "labels": {"nvidia.com/gpu.product": A100.product}},
            "spec": spec,
            "status": {
                "allocatable": {"nvidia.com/gpu": "2", "cpu": "4", "pods": "3"},
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }

    def pods(on, n, **requests):
        return [
            {"metadata": {}, "spec": {"nodeName": on, "containers": [{"resources": {"requests": requests}}]}}
            for _ in range(n)
        ]

    inventory = hardware.read(
        [kube("gpus"), kube("pods"), kube("cpu"), kube("cordoned", unschedulable=True)],
        [*pods("gpus", 1, **{"nvidia.com/gpu": "2"}), *pods("pods", 3), *pods("cpu", 1, cpu="4")],
        pod_request=hardware.PodRequest(cpu="1"),
    )
    assert {r.name: only_full(r.reason) for r in inventory.refused} == {
        "gpus": True,
        "pods": True,
        "cpu": True,
        "cordoned": False,
    }
    stands = [Standing("decode", 2, 1, name) for name in ("gpus", "cordoned", "unknown")]
    assert where([("decode", 2, 1, 1)], inventory, stands) == {("decode", 2): {"gpus": 1}}
    with pytest.raises(NoRoom):
        pack([("decode", 2, 1, 2)], inventory, stands)


def test_tp_needs_nvlink_and_pipeline_stages_do_not():
    inventory = Inventory((node("a", nvlink=False),), ())
    assert where([("decode", 1, 8, 1)], inventory) == {("decode", 1): {"a": 1}}
    with pytest.raises(NoRoom, match="needs NVLink"):
        pack([("decode", 2, 1, 1)], inventory)
    both = Inventory((node("a", 4, nvlink=False), node("b", 4)), ())
    assert where([("decode", 1, 4, 1), ("prefill", 2, 1, 2)], both) == {
        ("decode", 1): {"a": 1},
        ("prefill", 2): {"b": 2},
    }


def test_no_room_says_what_is_missing():
    with pytest.raises(NoRoom) as e:
        pack([("prefill", 4, 1, 3)], Inventory((node("a", 6), node("b", 3)), ()))
    assert e.value.missing == 8
    assert str(e.value) == (
        "2 instances find no node (prefill tp 4, pp 1; 8 GPUs are missing): 9 GPUs are free, at most 6 on a node that would do"
    )
    with pytest.raises(NoRoom, match="no node has a free GPU"):
        pack([("prefill", 1, 1, 1)], Inventory((), ()))
    with pytest.raises(NoRoom):
        pack([("prefill", 1, 1, 2)], Inventory((node("a", pods=1),), ()))


def test_pairs_keep_together():
    inventory = Inventory((node("a", 3), node("b", 7)), ())
    groups = pack_pairs((2, 1), (1, 1), 3, inventory)
    assert [dict(g.nodes) for g in groups] == [{"a": 1, "b": 2}] * 2
    full = Inventory((node("a", 3), node("c", 1)), ())
    groups = pack_pairs((2, 1), (1, 1), 2, full, [Standing("prefill", 2, 1, "c", decode_tp=1)])
    assert [dict(g.nodes) for g in groups] == [{"a": 1, "c": 1}] * 2


def test_a_pair_is_one_pod_neither_made_of_two_nor_taken_apart():
    full = Inventory((node("a", 2), node("c", 1)), ())
    apart = [Standing("prefill", 2, 1, "c"), Standing("decode", 1, 1, "c")]
    for keep in (apart, [Standing("prefill", 2, 1, "c", decode_tp=2)]):
        with pytest.raises(NoRoom):
            pack_pairs((2, 1), (1, 1), 1, full, keep)
    pair = [Standing("prefill", 2, 1, "c", decode_tp=1)]
    assert where([("prefill", 2, 1, 1)], full, pair) == {("prefill", 2): {"a": 1}}


def test_an_error_crosses_processes():
    import pickle

    assert str(pickle.loads(pickle.dumps(NoRoom("why", 3)))) == "why"

"""The inventory: which nodes count, what is free on them, and the sentence for each that does not."""

import copy
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggserve import catalogue, hardware
from disaggserve.hardware import BadQuantity, PodRequest, Refusal, quantity, read

RDMA = {"feature.node.kubernetes.io/rdma.capable": "true"}


def node(name="n", gpus=8, product="NVIDIA-A100-SXM4-80GB", labels=None, taints=(), ready="True", **spec):
    allocatable = {"cpu": "128", "memory": "1024Gi", "pods": "110", "nvidia.com/gpu": str(gpus)}
    return {
        "metadata": {"name": name, "labels": {"nvidia.com/gpu.product": product, **(labels or {})}},
        "spec": {"taints": list(taints), **spec},
        "status": {
            "allocatable": allocatable,
            "conditions": [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": ready}],
        },
    }


def pod(on="n", gpus=1, phase="Running", cpu="1", **status):
    resources = {"requests": {"nvidia.com/gpu": str(gpus), "cpu": cpu}}
    return {
        "metadata": {"name": "p"},
        "spec": {"nodeName": on, "containers": [{"resources": resources}]},
        "status": {"phase": phase, **status},
    }


def reason(n, pods=(), **kwargs):
    inventory = read([n], pods, **kwargs)
    assert not inventory.nodes
    assert [r.name for r in inventory.refused] == [n["metadata"]["name"]]
    return inventory.refused[0].reason


def only(n, pods=(), **kwargs):
    inventory = read([n], pods, **kwargs)
    assert inventory.refused == ()
    return inventory.nodes[0]


# ------------------------------------------------------------------------------------------------------ quantities


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        (2, 2),
        (0.5, Fraction(1, 2)),
        ("100m", Fraction(1, 10)),
        ("1.5Gi", 3 * 2**29),
        ("1e3", 1000),
        ("12E2", 1200),
        ("1E", 10**18),
        ("3k", 3000),
        ("5M", 5_000_000),
        ("2Ki", 2048),
        ("1n", Fraction(1, 10**9)),
        (".5", Fraction(1, 2)),
        ("+1.", 1),
        ("-1", -1),
    ],
)
def test_quantities_are_read_exactly(text, value):
    assert quantity(text) == value


@pytest.mark.parametrize("text", ["", "x", "1 Gi", "1gi", "1KI", "1e", "--1", "0x10", "NaN", True, "1e999"])
def test_what_is_no_quantity_is_refused(text):
    with pytest.raises(BadQuantity, match="is not a Kubernetes quantity"):
        quantity(text)


# ------------------------------------------------------------------------------------------------------------ pods


def test_a_pod_takes_the_more_of_running_and_starting_and_its_overhead():
    p = {
        "spec": {
            "initContainers": [
                {"resources": {"requests": {"cpu": "5"}}},
                {"restartPolicy": "Always", "resources": {"requests": {"cpu": "1", "memory": "1Gi"}}},
                {"resources": {"requests": {"cpu": "6", "nvidia.com/gpu": "1"}}},
            ],
            "containers": [
                {"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "8", "nvidia.com/gpu": 2}}},
                {"resources": {"requests": {"cpu": "500m"}}},
                {},
            ],
            "overhead": {"cpu": "250m"},
        }
    }
    # Running: 2 + 0.5 + sidecar 1 = 3.5; starting: max(5, 1 + 6) = 7.
    assert hardware.requests(p) == {
        "cpu": Fraction("7.25"),
        "memory": 2**30,
        "nvidia.com/gpu": 2,
    }


def test_requests_of_the_whole_pod_stand_for_its_containers():
    p = {
        "spec": {
            "resources": {"requests": {"cpu": "3"}},
            "containers": [{"resources": {"requests": {"cpu": "8", "nvidia.com/gpu": "1"}}}],
        }
    }
    assert hardware.requests(p) == {"cpu": 3, "nvidia.com/gpu": 1}


@pytest.mark.parametrize(
    ("pods", "free"),
    [
        ([], 8),
        ([pod(gpus=3), pod(gpus=1)], 4),
        ([pod(gpus=3, phase="Succeeded"), pod(gpus=3, phase="Failed")], 8),
        ([pod(gpus=3, phase="Pending")], 5),
        ([pod(on="other", gpus=3)], 8),
        ([pod(on=None, gpus=3, nominatedNodeName="n")], 5),
        ([pod(on=None, gpus=3)], 8),
        ([pod(gpus=2) | {"metadata": {"name": "p", "deletionTimestamp": "2026-01-01T00:00:00Z"}}], 6),
    ],
)
def test_free_gpus(pods, free):
    assert only(node(), pods).gpus_free == free


def test_pods_of_one_s_own_count_as_free():
    mine = pod(gpus=5) | {"metadata": {"name": "p", "labels": {"disaggserve.dev/resource": "chat"}}}
    assert only(node(), [mine, pod()]).gpus_free == 2
    ignore = lambda p: "labels" in p["metadata"]  # noqa: E731
    assert only(node(), [mine, pod()], ignore_pods=ignore).gpus_free == 7


# ------------------------------------------------------------------------------------------------------ eligibility

GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("toleration", "yes"),
    [
        ({"operator": "Exists"}, True),
        ({"operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, True),
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}, True),
        ({"key": "nvidia.com/gpu", "value": "present"}, True),
        ({"key": "nvidia.com/gpu", "operator": "Equal", "value": "present", "effect": ""}, True),
        ({"key": "nvidia.com/gpu", "value": "absent"}, False),
        ({"key": "nvidia.com/gpu"}, False),
        ({"key": "other", "operator": "Exists"}, False),
        ({"value": "present"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Gt", "value": "1"}, False),
    ],
)
def test_tolerations(toleration, yes):
    assert hardware.tolerated(GPU_TAINT, [toleration]) is yes
    assert bool(read([node(taints=[GPU_TAINT])], [], tolerations=[toleration]).nodes) is yes


def test_a_taint_without_value_is_equal_to_no_value():
    assert hardware.tolerated({"key": "a", "effect": "NoSchedule"}, [{"key": "a"}])


def test_every_taint_needs_its_toleration_and_a_preference_needs_none():
    taints = [
        GPU_TAINT,
        {"key": "spot", "effect": "NoExecute"},
        {"key": "soft", "effect": "PreferNoSchedule"},
    ]
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert reason(node(taints=taints), tolerations=tolerations) == "its taint spot:NoExecute is not tolerated"
    assert only(node(taints=taints), tolerations=[*tolerations, {"key": "spot", "operator": "Exists"}])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ready": "False"}, "it is not Ready"),
        ({"ready": "Unknown"}, "it is not Ready"),
        ({"unschedulable": True}, "it is cordoned"),
        ({"taints": [GPU_TAINT]}, "its taint nvidia.com/gpu=present:NoSchedule is not tolerated"),
        ({"gpus": 0}, "no nvidia.com/gpu is allocatable"),
        ({"product": "NVIDIA-B300"}, "GPU product 'NVIDIA-B300' is not in the catalogue"),
        ({"product": ""}, "no label tells its GPU product (nvidia.com/gpu.product)"),
        ({"product": "NVIDIA-A100-SXM4-80GB-SHARED"}, "shared between pods"),
        ({"labels": {"nvidia.com/gpu.sharing-strategy": "mps"}}, "shared between pods"),
        ({"labels": {"nvidia.com/mig.strategy": "single"}}, "split by MIG (nvidia.com/mig.strategy single)"),
        ({"labels": {"nvidia.com/mig.strategy": "mixed"}, "gpus": 0}, "split by MIG"),
        ({"product": "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb"}, "split by MIG"),
    ],
)
def test_each_refused_node_says_why(change, words):
    assert words in reason(node(**change))


def test_mig_that_its_manager_has_disabled_is_no_mig():
    labels = {"nvidia.com/mig.strategy": "single", "nvidia.com/mig.config": "all-disabled"}
    assert only(node(labels=labels)).gpus_free == 8
    assert only(node(labels={"nvidia.com/mig.strategy": "none", "nvidia.com/gpu.sharing-strategy": "none"}))


def test_other_refusals():
    assert reason(node(), [pod(gpus=8)]) == "all its 8 GPUs are taken by other pods"
    assert reason(node(), excluded={"n": "a pod stayed pending on it"}) == "a pod stayed pending on it"
    assert reason(node(), node_selector={"pool": "a"}) == "nodeSelector asks for pool=a, it has no such label"
    in_b = node(labels={"pool": "b"})
    assert reason(in_b, node_selector={"pool": "a"}) == "nodeSelector asks for pool=a, it has 'b'"
    assert only(in_b, node_selector={"pool": "b"})
    gone = node()
    gone["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert reason(gone) == "it is being deleted"
    silent = node()
    silent["status"]["conditions"] = []
    assert reason(silent) == "its kubelet has not said that it is Ready"
    bare = {"metadata": {"name": "n"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    assert reason(bare) == "no nvidia.com/gpu is allocatable"


def test_what_an_instance_pod_asks_for_must_fit():
    asks = PodRequest(cpu="4", memory="64Gi", devices={"rdma/hca_shared_devices_a": 1})
    assert reason(node(), pod_request=asks).startswith("rdma/hca_shared_devices_a is short")
    n = node()
    n["status"]["allocatable"]["rdma/hca_shared_devices_a"] = "63"
    assert only(n, pod_request=asks).pods_free == 16  # by memory
    assert only(n, [pod(cpu="120")], pod_request=asks).pods_free == 2
    assert reason(n, [pod(cpu="125")], pod_request=asks) == "cpu is short: an instance asks for 4, 3 is free"
    # Ephemeral storage that the node does not tell is not known to lack.
    assert only(n, pod_request=PodRequest(ephemeral_storage="10Gi"))
    n["status"]["allocatable"]["ephemeral-storage"] = "5Gi"
    assert "10Gi, 5Gi is free" in reason(n, pod_request=PodRequest(ephemeral_storage="10Gi"))
    n["status"]["allocatable"]["pods"] = "1"
    assert reason(n, [pod()]) == "its pods are as many as it allows"


def test_a_bad_quantity_of_a_pod_is_not_swallowed():
    with pytest.raises(BadQuantity):
        read([node()], [pod(cpu="many")])


# ------------------------------------------------------------------------------------------------- what a node has


def test_products_from_fallback_labels():
    n = node(product="")
    n["metadata"]["labels"]["cloud.google.com/gke-accelerator"] = "nvidia-h100-80gb"
    assert only(n).gpu.short == "H100"
    n["metadata"]["labels"] = {"node.kubernetes.io/instance-type": "p4de.24xlarge"}
    assert only(n).gpu.short == "A100-80G"


@pytest.mark.parametrize(
    ("product", "labels", "nvlink"),
    [
        ("NVIDIA-A100-SXM4-80GB", {}, True),
        ("NVIDIA-H200", {}, True),
        ("NVIDIA-H100-PCIe", {}, False),
        ("NVIDIA-L40S", {}, False),
        ("NVIDIA-L40S", {"nvidia.com/gpu.clique": "u.1"}, True),
    ],
)
def test_nvlink(product, labels, nvlink):
    assert only(node(product=product, labels=labels)).nvlink is nvlink


@pytest.mark.parametrize(
    ("labels", "resources", "rdma"),
    [
        ({}, {}, False),
        (RDMA, {}, True),
        ({"feature.node.kubernetes.io/rdma.available": "false"}, {}, False),
        ({"feature.node.kubernetes.io/custom-rdma.available": "true"}, {}, True),
        ({"feature.node.kubernetes.io/pci-15b3.present": "true"}, {}, True),
        ({"feature.node.kubernetes.io/pci-0207_15b3.present": "true"}, {}, True),
        ({}, {"rdma/hca_shared_devices_a": "8"}, True),
        ({}, {"rdma/hca_shared_devices_a": "0"}, False),
        ({}, {"vpc.amazonaws.com/efa": "4"}, True),
        ({}, {"nvidia.com/hostdev": "8"}, True),
    ],
)
def test_rdma(labels, resources, rdma):
    n = node(labels=labels)
    n["status"]["allocatable"].update(resources)
    assert only(n).rdma is rdma


@pytest.mark.parametrize(
    ("labels", "fabric"),
    [
        ({}, ()),
        ({"topology.kubernetes.io/zone": "z"}, ("z",)),
        (
            {f"network.topology.nvidia.com/{k}": v for k, v in (("leaf", "l"), ("spine", "s"), ("core", "c"))}
            | {"topology.kubernetes.io/zone": "z", "cloud.google.com/gce-topology-block": "b"},
            ("c", "s", "l"),
        ),
        ({"fabric.topograph.run/tier-0": "leaf", "fabric.topograph.run/tier-1": "spine"}, ("spine", "leaf")),
        ({f"topology.k8s.aws/network-node-layer-{i}": str(i) for i in (3, 1, 2)}, ("1", "2", "3")),
        (
            {f"cloud.google.com/gce-topology-{k}": k for k in ("host", "block", "subblock")},
            ("block", "subblock", "host"),
        ),
    ],
)
def test_fabric_levels_outermost_first(labels, fabric):
    assert only(node(labels=labels)).fabric == fabric


def test_simulated_nodes_are_marked():
    simulated = node("s", labels={hardware.SIMULATED_LABEL: "true"})
    assert only(simulated).simulated
    assert read([simulated], []).simulated
    assert not read([simulated, node()], []).simulated
    assert not read([], []).simulated


# ----------------------------------------------------------------------------------------------------------- fabric


@pytest.mark.parametrize(
    ("with_rdma", "without", "override", "answer", "words"),
    [
        (4, 0, "Auto", "High", "4 usable nodes show RDMA"),
        (1, 0, "Auto", "High", "1 usable node shows RDMA"),
        (0, 1, "Auto", "Low", "1 of 1 usable node shows no RDMA (e0)"),
        (2, 5, "Auto", "Low", "5 of 7 usable nodes show no RDMA (e0, e1, e2, …)"),
        (0, 0, "Auto", "Low", "no node is usable"),
        (0, 4, "High", "High", "hardware.affinity says High"),
        (4, 0, "Low", "Low", "hardware.affinity says Low"),
    ],
)
def test_affinity(with_rdma, without, override, answer, words):
    nodes = [node(f"r{i}", labels=RDMA) for i in range(with_rdma)] + [node(f"e{i}") for i in range(without)]
    found, why = hardware.affinity(read(nodes, []), override)
    assert found == answer
    assert words in why


def test_nodes_that_are_not_usable_have_no_say_in_affinity():
    nodes = [node("a", labels=RDMA), node("b", unschedulable=True)]
    assert hardware.affinity(read(nodes, []))[0] == "High"


def test_kv_links():
    a, b, eth = only(node("a", labels=RDMA)), only(node("b", labels=RDMA)), only(node("c"))
    assert hardware.kv_link(a, b, same_container=False) == catalogue.RDMA_200G
    assert (
        hardware.kv_link(a, a, same_container=False) == catalogue.RDMA_200G
    )  # one node is no NVLink between pods
    assert hardware.kv_link(a, eth, same_container=False) == catalogue.TCP
    assert hardware.kv_link(eth, eth, same_container=False) == catalogue.TCP
    assert hardware.kv_link(eth, eth, same_container=True) == catalogue.NVLINK
    l40s = only(node(product="NVIDIA-L40S"))
    assert hardware.kv_link(l40s, l40s, same_container=True).name == "pcie"


# ------------------------------------------------------------------------------------------------------- properties


def cluster():
    nodes = [
        node("a", labels=RDMA),
        node("b", taints=[GPU_TAINT, {"key": "spot", "effect": "NoExecute"}]),
        node("c", gpus=4, product="NVIDIA-L40S"),
        node("d", unschedulable=True),
        node("e", ready="False"),
    ]
    pods = [pod("a", 1), pod("a", 2, cpu="100m"), pod("c", 1), pod("c", 3, "Failed"), pod("b", 8)]
    return nodes, pods


@given(st.randoms(use_true_random=False))
def test_order_does_not_matter_and_nothing_is_changed(rng: random.Random):
    nodes, pods = cluster()
    expected = read(nodes, pods)
    before = copy.deepcopy((nodes, pods))
    rng.shuffle(nodes)
    rng.shuffle(pods)
    assert read(nodes, pods) == expected
    assert sorted(nodes, key=lambda n: n["metadata"]["name"]) == before[0]


def test_every_node_is_either_used_or_refused_with_a_sentence():
    nodes, pods = cluster()
    inventory = read(nodes, pods)
    assert [(n.name, n.gpus_free) for n in inventory.nodes] == [("a", 5), ("c", 3)]
    assert inventory.gpus_free == 8
    assert inventory.refused == (
        Refusal("b", "its taint nvidia.com/gpu=present:NoSchedule is not tolerated"),
        Refusal("d", "it is cordoned"),
        Refusal("e", "it is not Ready"),
    )

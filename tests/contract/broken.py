"""Twenty broken manifests: each is the good one with one thing wrong, and the field that a refusal must name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

GOOD: dict[str, Any] = {
    "apiVersion": "disaggserve.dev/v1alpha1",
    "kind": "DisaggServe",
    "metadata": {"name": "chat", "namespace": "default"},
    "spec": {
        "model": {"id": "facebook/opt-13b"},
        "slo": {"ttft": "250ms", "tpot": "100ms", "attainment": 0.9},
        "workload": {"rate": 5, "lengths": {"preset": "sharegpt"}},
        "engine": {"type": "torch"},
    },
}


def _with(path: str, value: Any) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Any]:
        document = copy.deepcopy(GOOD)
        *parents, last = path.split(".")
        at: Any = document
        for part in parents:
            at = at.setdefault(part, {})
        if value is _GONE:
            del at[last]
        else:
            at[last] = value
        return document

    return build


_GONE = object()

BROKEN: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no unit": (_with("spec.slo.ttft", "250"), "spec.slo.ttft"),
    "a number for a duration": (_with("spec.slo.tpot", 100), "spec.slo.tpot"),
    "no promise": (_with("spec.slo", _GONE), "spec.slo"),
    "a promise of nothing": (_with("spec.slo.ttft", "0ms"), "spec.slo.ttft"),
    "attainment in percent": (_with("spec.slo.attainment", 90), "spec.slo.attainment"),
    "unknown field": (_with("spec.slo.latency", "1s"), "spec.slo.latency"),
    "no model": (_with("spec.model.id", _GONE), "spec.model.id"),
    "a model id with spaces": (_with("spec.model.id", "my model"), "spec.model.id"),
    "two places for weights": (
        _with("spec.model.weights", {"pvc": {"claimName": "w"}, "hostPath": {"path": "/w"}}),
        "spec.model.weights",
    ),
    "rate of zero": (_with("spec.workload.rate", 0), "spec.workload.rate"),
    "rate as text": (_with("spec.workload.rate", "5"), "spec.workload.rate"),
    "unknown preset": (_with("spec.workload.lengths.preset", "sharegtp"), "spec.workload.lengths.preset"),
    "bounds crossed": (
        _with("spec.workload", {"rate": 5, "lengths": {"preset": "sharegpt"}, "minRate": 9, "maxRate": 3}),
        "spec.workload.minRate",
    ),
    "no engine type": (_with("spec.engine", {}), "spec.engine.type"),
    "an engine of a later release": (_with("spec.engine.type", "sglang"), "spec.engine.type"),
    "a flag that the operator owns": (_with("spec.engine.args", ["--tp=4"]), "spec.engine.args"),
    "an unknown search": (_with("spec.planner", {"algorithm": "Greedy"}), "spec.planner.algorithm"),
    "a price of nothing": (
        _with("spec.hardware", {"prices": {"NVIDIA-L40S": 0}}),
        "spec.hardware.prices.NVIDIA-L40S",
    ),
    "instances over two nodes": (
        _with("spec.hardware", {"maxNodesPerInstance": 2}),
        "spec.hardware.maxNodesPerInstance",
    ),
    "half a GPU": (_with("spec.hardware", {"maxGPUs": 1.5}), "spec.hardware.maxGPUs"),
    "a plan without decode": (
        _with("spec.plan", {"roles": [{"role": "prefill", "tp": 1, "pp": 1, "count": 1}]}),
        "spec.plan.roles",
    ),
    "nodes that do not add up": (
        _with(
            "spec.plan",
            {
                "roles": [
                    {
                        "role": "prefill",
                        "tp": 1,
                        "pp": 1,
                        "count": 2,
                        "nodes": [{"name": "gpu-0", "count": 1}],
                    },
                    {"role": "decode", "tp": 1, "pp": 1, "count": 1},
                ]
            },
        ),
        "spec.plan.roles[0].nodes",
    ),
    "a name that no pod can bear": (_with("metadata.name", "x" * 40), "metadata.name"),
    "an environment variable of the operator": (
        _with("spec.engine.pod", {"env": [{"name": "POD_IP", "value": "x"}]}),
        "spec.engine.pod.env[0].name",
    ),
    "a type that no profile has": (_with("spec.model.dtype", "float32"), "spec.model.dtype"),
    "mode of a later release": (_with("spec.replan", {"mode": "Approve"}), "spec.replan.mode"),
}

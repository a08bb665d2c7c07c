"""Which shapes are tried, and why the others are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from disaggserve import catalogue, engines, latency
from disaggserve.catalogue import BLOCK_TOKENS, GPU, Model
from disaggserve.engines import Engine, Role
from disaggserve.hardware import Node
from disaggserve.search.problem import Rejected, Shape
from disaggserve.workload import Lengths

Limit = Literal["Memory", "Engine", "Nodes", "Profile"]


@dataclasses.dataclass(frozen=True)
class Full:
    """A GPU that has no room for the longest request beside the weights. Tokens are of KV."""

    gpu: GPU
    weights: int  # bytes per GPU
    tokens: int  # that fit; 0: not even the weights do
    longest: int  # that must

    def words(self, many: bool = False) -> str:
        """The reason; of `many` shapes, this one being the roomiest, in bounds."""
        least, most = ("at least ", "at most ") if many else ("", "")
        weights = f"{least}{self.weights / 1e9:.1f} GB per GPU"
        if self.tokens == 0:
            room = (catalogue.MEMORY_UTILISATION - catalogue.ACTIVATION_SHARE) * self.gpu.memory_bytes / 1e9
            return f"weights take {weights}, {self.gpu.short} has {room:.1f} GB for them and KV"
        return (
            f"beside weights of {weights}, KV of {most}{self.tokens} tokens fits {self.gpu.short}; the longest request "
            f"needs {self.longest}"
        )


@dataclasses.dataclass(frozen=True)
class Refused:
    """A shape that the model takes and that is not tried."""

    role: Role
    shape: Shape
    limit: Limit
    reason: str
    full: Full | None = None  # of limit Memory


def shapes(
    model: Model,
    gpu: GPU,
    engine: Engine,
    role: Role,
    nodes: Iterable[Node],
    lengths: Lengths,
    profile: latency.Profile | None = None,
) -> tuple[tuple[Shape, ...], tuple[Refused, ...]]:
    """Shapes of one role to simulate, and those refused, each in order of GPUs, then pp.

    tp divides heads and feed-forward, pp the layers, and an instance has at most the GPUs of the largest
    node. Where a profile covers the model on this GPU, only shapes that it measured (REFERENCE § 3): the shipped
    one its tp at pp 1. One that measured a single tp is no choice among them: others are scaled from it. Its form can be stretched to any pp, but real decode at pp 2 ran 20 to 35 % slower than it
    says (REFERENCE § 1). The longest request must fit the KV blocks beside the weights (its prompt, for prefill).
    """
    nodes = list(nodes)
    most = max((n.gpus_total for n in nodes), default=0)
    nvlink = max((n.gpus_total for n in nodes if n.nvlink), default=0)
    profile = latency.profile_for(model, gpu, profile)
    total = lengths.input + (lengths.output if role == "decode" else 0)
    longest = int(total.max())
    tried: list[Shape] = []
    refused: list[Refused] = []
    splits = (Shape(tp, pp) for tp in range(1, most + 1) for pp in range(1, most // tp + 1))
    for shape in sorted(splits, key=lambda s: (s.gpus, s.pp)):
        if model.shape_fault(*shape):
            continue
        blocks = catalogue.kv_blocks(model, gpu, *shape)
        if blocks * BLOCK_TOKENS < longest:
            full = Full(gpu, model.weight_bytes(*shape), blocks * BLOCK_TOKENS, longest)
            refused.append(Refused(role, shape, "Memory", full.words(), full))
            continue
        limit: Limit
        if engine_says := engines.refuse_shape(engine, role, *shape):
            limit, reason = "Engine", engine_says
        elif profile is not None and not _known(shape, model, profile):
            limit, reason = "Profile", f"{profile.name} did not measure it"
        elif shape.tp > 1 and shape.gpus > nvlink:
            limit, reason = (
                "Nodes",
                "tp above 1 needs NVLink between the GPUs of a node, which no usable node of that size shows",
            )
        else:
            tried.append(shape)
            continue
        refused.append(Refused(role, shape, limit, reason))
    return tuple(tried), tuple(refused)


def _known(shape: Shape, model: Model, profile: latency.Profile) -> bool:
    return shape in profile.measured(model) or (shape.pp == 1 and len(profile.shapes(model)) == 1)


def summary(refused: Iterable[Refused]) -> list[Rejected]:
    """Refused shapes by role and limit (and GPU that is full), each with the reason of all its shapes.

    Shapes that a profile does not hold are no alternatives and are left out.
    """
    found: dict[tuple[Role, Limit, GPU | None], list[Refused]] = {}
    for r in refused:
        if r.limit != "Profile":
            found.setdefault((r.role, r.limit, r.full.gpu if r.full else None), []).append(r)
    return [
        Rejected(
            f"{role} "
            + "; ".join(str(r.shape) for r in rs[:4])
            + (f"; {len(rs) - 4} more" if len(rs) > 4 else ""),
            _reason(rs),
        )
        for (role, *_), rs in found.items()
    ]


def _reason(refused: list[Refused]) -> str:
    """What holds of all of them; else that of the first (smallest), by name."""
    first = refused[0]
    if len({r.reason for r in refused}) == 1:
        return first.reason
    full = [r.full for r in refused if r.full is not None]
    if not full:
        return f"{first.reason} ({first.shape}; the others alike)"
    weights, tokens = min(f.weights for f in full), max(f.tokens for f in full)
    return dataclasses.replace(full[0], weights=weights, tokens=tokens).words(many=True)
